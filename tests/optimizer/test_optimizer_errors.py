"""Every misuse of the optimizer gets an error that names its remedy."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dd
from tests.optimizer.test_optimizer import (
    C,
    D,
    K,
    N,
    create_graph_warns,
    make_model,
    make_problem,
    train,
)


@pytest.fixture
def trained():
    """A model after two steps, its optimizer and its data."""
    inputs, targets = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.3)
    train(model, optimizer, inputs, targets, steps=2)
    yield model, optimizer, inputs, targets
    optimizer.detach()


# --- Construction ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lr", [-0.1, float("nan"), float("inf"), torch.tensor(-1.0), torch.tensor(float("nan"))]
)
def test_learning_rate_out_of_range(lr):
    with pytest.raises(ValueError, match=r"Invalid learning rate.*finite rate of at least 0"):
        dd.DecoupledDescent(make_model(), lr=lr)


def test_scheduled_learning_rate_out_of_range(trained):
    model, optimizer, inputs, targets = trained
    optimizer.param_groups[0]["lr"] = float("nan")
    weight = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"Invalid learning rate: nan.*schedule"):
        train(model, optimizer, inputs, targets, steps=1)
    assert torch.equal(weight, model[0].weight)


@pytest.mark.parametrize("damping", [-0.1, 1.1, float("nan")])
def test_damping_out_of_range(damping):
    with pytest.raises(ValueError, match=r"damping must lie in \[0, 1\]"):
        dd.DecoupledDescent(make_model(), lr=0.1, damping=damping)


def test_damping_with_anisotropic_noise():
    noise = dd.NoiseModel(torch.tensor([2.0, 1.0]), torch.tensor([10, D - 10]))
    with pytest.raises(ValueError, match=r"damping=0.5 is defined for isotropic.*2 bins"):
        dd.DecoupledDescent(make_model(), lr=0.1, damping=0.5, noise=noise)


def test_unknown_curvature():
    with pytest.raises(ValueError, match=r"curvature must be one of .*'stein', 'probe'.*'hutch'"):
        dd.DecoupledDescent(make_model(), lr=0.1, curvature="hutch")
    with pytest.raises(ValueError, match="curvature must be one of"):
        dd.DecoupledDescent(make_model().parameters(), lr=0.1, curvature="hutch")


def test_stein_without_components():
    inputs, _ = make_problem()
    for noise in (None, dd.NoiseModel.isotropic(inputs)):
        with pytest.raises(ValueError, match=r"needs the mixture component.*isotropic\(inputs"):
            dd.DecoupledDescent(make_model(), lr=0.1, curvature="stein", noise=noise)


def test_no_linear_layer():
    for model in (
        nn.Conv2d(1, 1, 3),
        nn.Sequential(nn.Linear(3, 2).requires_grad_(False), nn.PReLU()),
    ):
        with pytest.raises(ValueError, match=r"no nn.Linear with trainable weights.*SGD"):
            dd.DecoupledDescent(model, lr=0.1)


def test_layer_that_cannot_be_decoupled():
    model = make_model()
    with pytest.raises(
        ValueError, match=r"not part of the model; its linear layers are \['0', '2'\]"
    ):
        dd.DecoupledDescent(model, lr=0.1, layer="hidden")
    with pytest.raises(ValueError, match="not part of the model"):
        dd.DecoupledDescent(model, lr=0.1, layer=nn.Linear(D, K))
    with pytest.raises(TypeError, match=r"'1' is a Tanh; expected nn.Linear"):
        dd.DecoupledDescent(model, lr=0.1, layer="1")
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="weight of layer '0' must be a trainable"):
        dd.DecoupledDescent(model, lr=0.1, layer="0")


def test_parametrised_layer():
    model = make_model()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match="must be a trainable parameter of its own"):
        dd.DecoupledDescent(model, lr=0.1)


def test_noise_of_another_dimension():
    noise = dd.NoiseModel.isotropic(torch.randn(50, D + 1))
    with pytest.raises(ValueError, match=rf"describes {D + 1} inputs.*takes {D}"):
        dd.DecoupledDescent(make_model(), lr=0.1, noise=noise)


def test_layer_or_noise_without_a_module():
    model = make_model()
    with pytest.raises(ValueError, match=r"need a module.*attach\(module"):
        dd.DecoupledDescent(model.parameters(), lr=0.1, layer="0")


def test_double_attachment():
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1)
    with pytest.raises(ValueError, match=r"attached to layer '0' already; call detach\(\)"):
        optimizer.attach(model)
    optimizer.detach()
    dd.DecoupledDescent(model, lr=0.1)


def test_attach_to_a_module_of_other_parameters():
    optimizer = dd.DecoupledDescent(make_model().parameters(), lr=0.1)
    model = make_model()
    with pytest.raises(ValueError, match="not among this optimizer's parameters"):
        optimizer.attach(model)
    assert not model[0]._forward_hooks


def test_differentiable_while_attached():
    with pytest.raises(ValueError, match="only while unattached"):
        dd.DecoupledDescent(make_model(), lr=0.1, differentiable=True)


# --- The training forward --------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [True, False])
def test_samples_not_seen_before(trained, gradients):
    model, _, inputs, _ = trained
    with (
        torch.set_grad_enabled(gradients),
        pytest.raises(RuntimeError, match=rf"5 of 5 samples.*{N} seen.*NoiseModel.fit.*track"),
    ):
        model(make_problem(seed=5)[0][:5])
    inputs[4] += 1.0  # in place: the tensor is the same, its content is not
    with pytest.raises(RuntimeError, match=rf"1 of {N} samples.*unaugmented"):
        model(inputs)


def test_batch_of_another_size_than_the_components():
    inputs, targets = make_problem()
    model = make_model()
    noise = dd.NoiseModel.isotropic(inputs, targets)
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=noise)
    with pytest.raises(ValueError, match=rf"fitted on {N} inputs, and 7 of the 7 "):
        train(model, optimizer, inputs[:7] + 1, targets[:7], steps=1)
    train(model, optimizer, inputs, targets, steps=1)


def test_first_mini_batch_that_nobody_knows():
    inputs, targets = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1)
    train(model, optimizer, inputs[:60], targets[:60], steps=1)
    with pytest.raises(RuntimeError, match=r"60 of 60 samples.*mini-batches construct with noise="):
        model(inputs[60:])


def test_two_training_forwards_before_a_backward(trained):
    model, optimizer, inputs, targets = trained
    model(inputs)
    with pytest.raises(RuntimeError, match=r"two training forwards.*before a backward.*drop_f"):
        model(inputs)
    optimizer.drop_forward()
    train(model, optimizer, inputs, targets)


def test_skipped_step_after_backward_needs_no_call(trained):
    model, optimizer, inputs, targets = trained
    F.cross_entropy(model(inputs), targets).backward()
    train(model, optimizer, inputs, targets)


def test_a_sanity_forward_binds_nothing():
    inputs, targets = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1)
    with torch.no_grad():
        model(torch.zeros(2, D, dtype=inputs.dtype))
    model(inputs[:9])
    optimizer.drop_forward()
    train(model, optimizer, inputs, targets)
    assert optimizer.shadow.shape[1:] == (N, K)


def test_trainable_layer_before_the_decoupled_one():
    inputs, targets = make_problem()
    model = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, K), nn.Linear(K, C)).double()
    optimizer = dd.DecoupledDescent(model, lr=0.1)
    with pytest.raises(RuntimeError, match=r"depends on trainable.*0.weight, 0.bias.*freeze"):
        model(inputs)
    model[0].requires_grad_(False)
    train(model, optimizer, inputs, targets)


def test_input_that_is_not_a_matrix():
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1)
    with pytest.raises(ValueError, match=rf"one row a sample.*got \({D},\)"):
        model(torch.randn(D, dtype=torch.float64))
    assert optimizer.shadow is None


# --- The step --------------------------------------------------------------------------------


def test_step_without_a_forward(trained):
    model, optimizer, inputs, targets = trained
    model.eval()
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    with pytest.raises(RuntimeError, match=r"without a training forward.*model.train\(\)"):
        optimizer.step()


def test_step_on_no_or_zero_gradients_moves_nothing(trained):
    model, optimizer, _, _ = trained
    shadow, weight = optimizer.shadow.clone(), model[0].weight.detach().clone()
    optimizer.zero_grad()
    optimizer.step()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(shadow, optimizer.shadow)
    assert torch.equal(weight, model[0].weight)


def test_step_before_backward(trained):
    model, optimizer, inputs, targets = trained
    optimizer.zero_grad()
    loss = F.cross_entropy(model(inputs), targets)
    with pytest.raises(RuntimeError, match=r"step\(\) before loss.backward\(\)"):
        optimizer.step()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("place", ["loss", "head"])
def test_non_finite_gradients(trained, place):
    model, optimizer, inputs, targets = trained
    shadow = optimizer.shadow.clone()
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    loss = F.cross_entropy(model(inputs), targets)
    (loss * float("nan") if place == "loss" else loss).backward()
    if place == "head":
        model[2].bias.grad[0] = float("inf")
    name = "output of '0'" if place == "loss" else "gradient of 2.bias is"
    with pytest.raises(FloatingPointError, match=rf"{name}.*at step 2; nothing was.*learning rate"):
        optimizer.step()
    assert torch.equal(shadow, optimizer.shadow)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    optimizer.zero_grad()
    train(model, optimizer, inputs, targets)


def nudge(model):
    model[0].weight.grad[1] += 1e-3


def clip_by_value(model):
    nn.utils.clip_grad_value_(model.parameters(), 1e-4)


def clip_each(model):
    for row in model[0].weight.grad:
        row /= row.norm()


def erase(model):
    model[0].weight.grad.zero_()


@pytest.mark.parametrize("edit", [nudge, clip_by_value, clip_each, erase])
def test_gradient_edited_by_more_than_a_scale(trained, edit):
    model, optimizer, inputs, targets = trained
    shadow, weight = optimizer.shadow.clone(), model[0].weight.detach().clone()
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    edit(model)
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) after every step.*clip by norm"):
        optimizer.step()
    assert torch.equal(shadow, optimizer.shadow)
    assert torch.equal(weight, model[0].weight)


def test_gradients_that_no_forward_of_this_optimizer_made(trained):
    model, optimizer, inputs, targets = trained
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    older = model[0].weight.grad.clone()
    optimizer.step()
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    model[0].weight.grad += older
    with pytest.raises(RuntimeError, match=r"holds older gradients"):
        optimizer.step()


@pytest.mark.parametrize("strength", [1e-4, 1e-1])
def test_penalty_on_the_weights(trained, strength):
    model, optimizer, inputs, targets = trained
    optimizer.zero_grad()
    loss = F.cross_entropy(model(inputs), targets) + strength * model[0].weight.square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match=r"use weight_decay= for an L2 penalty"):
        optimizer.step()


@pytest.mark.parametrize("change", ["load", "clamp"])
def test_weights_changed_outside_step(trained, change):
    model, optimizer, inputs, targets = trained
    if change == "load":
        model.load_state_dict(make_model(seed=1).state_dict())
    else:
        model[0].weight.data.clamp_(-0.05, 0.05)
    with pytest.raises(RuntimeError, match=r"changed outside step\(\).*load_state_dict of both"):
        model(inputs)
    optimizer.detach()
    optimizer.attach(model)
    train(model, optimizer, inputs, targets)


def test_weights_swapped_and_restored_are_the_same(trained):
    model, optimizer, inputs, targets = trained
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(make_model(seed=1).state_dict())
    model.eval()
    model(inputs)
    model.train()
    model.load_state_dict(kept)
    train(model, optimizer, inputs, targets)


@pytest.mark.filterwarnings("ignore::dd.UnattachedWarning")
def test_momentum_from_uncorrected_steps():
    inputs, targets = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, inputs, targets)
    optimizer.attach(model)
    with pytest.raises(RuntimeError, match=r"momentum from steps without correction"):
        model(inputs)


def test_fewer_samples_than_units_under_the_probe():
    inputs = torch.randn(3, D, dtype=torch.float64)
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1)
    with pytest.raises(
        RuntimeError, match=r"3 samples do not resolve the curvature of the 4 units"
    ):
        train(model, optimizer, inputs, torch.tensor([0, 1, 2]), steps=1)
    assert optimizer.shadow is None


def test_layer_frozen_after_attaching(trained):
    model, _, inputs, _ = trained
    model[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"frozen after attaching.*detach\(\)"):
        model(inputs)


def test_resumed_run_with_other_samples(trained):
    model, optimizer, _, _ = trained
    twin = make_model()
    twin.load_state_dict(model.state_dict())
    resumed = dd.DecoupledDescent(twin, lr=0.3)
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=rf"{N} of {N} samples"):
        twin(make_problem(seed=5)[0])


def test_unattached_copy_of_the_shadows(trained):
    model, optimizer, _, _ = trained
    twin = dd.DecoupledDescent(model.parameters(), lr=0.3)
    twin.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"not attached, but its state holds shadows.*attach\("):
        twin.step()
    twin.detach()
    twin.step()


# --- The probe -------------------------------------------------------------------------------

SQUARE = nn.MSELoss()


def mean_square(output, targets):
    return SQUARE(output[:, 0], targets.to(output.dtype))


def huber(output, targets):
    return F.huber_loss(output[:, 0], targets.to(output.dtype))


WITHOUT_FORWARD_FORMULAS = {
    "silu": (nn.SiLU, F.cross_entropy),
    "mish": (nn.Mish, F.cross_entropy),
    "huber": (nn.Tanh, huber),
    "mean square": (nn.Identity, mean_square),
}


@create_graph_warns
@pytest.mark.parametrize("case", WITHOUT_FORWARD_FORMULAS)
def test_operators_without_forward_mode_need_nothing(case):
    activation, loss_fn = WITHOUT_FORWARD_FORMULAS[case]
    inputs, targets = make_problem()
    shadows = []
    for curvature in ("auto", "probe_create_graph", "stein", "exact"):
        model = make_model(activation=activation)
        noise = dd.NoiseModel.isotropic(inputs, targets)
        optimizer = dd.DecoupledDescent(model, lr=0.1, curvature=curvature, noise=noise)
        graph = optimizer.needs_graph
        train(model, optimizer, inputs, targets, loss_fn=loss_fn, create_graph=graph)
        shadows.append(optimizer.shadow)
    torch.testing.assert_close(shadows[0], shadows[1])
    for shadow in shadows[:3]:
        assert (shadow - shadows[3]).norm() < N**-0.5 * shadows[3].norm()


def test_elementary_form_of_the_square_loss_needs_no_remedy():
    inputs, targets = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1, curvature="probe")

    def loss_fn(output, y):
        return ((output[:, 0] - y) ** 2).mean()

    train(model, optimizer, inputs, targets, loss_fn=loss_fn)
    assert optimizer.shadow.abs().max() > 0


def test_a_backward_pass_that_is_not_met_is_told():
    inputs, targets = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1, curvature="probe")

    def loss_fn(output, y):
        return F.cross_entropy(output.as_subclass(torch.Tensor), y)

    weight = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"was not met.*Remedy"):
        train(model, optimizer, inputs, targets, loss_fn=loss_fn, steps=1)
    assert torch.equal(weight, model[0].weight)


def test_two_backward_passes_of_one_forward_are_one_of_their_sum():
    inputs, targets = make_problem()
    shadows = []
    for apart in (True, False):
        model = make_model()
        optimizer = dd.DecoupledDescent(model, lr=0.1, curvature="probe")
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            if apart:
                loss.backward(retain_graph=True)
                loss.backward()
            else:
                (2 * loss).backward()
            optimizer.step()
        shadows.append(optimizer.shadow)
    torch.testing.assert_close(*shadows)


@create_graph_warns
def test_a_graph_of_the_users_own_is_differentiated():
    inputs, targets = make_problem()
    shadows = []
    for graph in (True, False):
        model = make_model()
        optimizer = dd.DecoupledDescent(model, lr=0.1, curvature="probe")
        train(model, optimizer, inputs, targets, create_graph=graph)
        shadows.append(optimizer.shadow)
    torch.testing.assert_close(*shadows)


@create_graph_warns
@pytest.mark.parametrize("graph_first", [True, False])
def test_half_a_second_derivative_is_none(graph_first):
    inputs, targets = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1, curvature="probe")
    loss = F.cross_entropy(model(inputs), targets)
    loss.backward(retain_graph=True, create_graph=graph_first)
    loss.backward(create_graph=not graph_first)
    with pytest.raises(RuntimeError, match="was not met"):
        optimizer.step()


@pytest.mark.parametrize("curvature", ["probe_create_graph", "exact"])
def test_curvature_that_needs_a_graph(curvature):
    inputs, targets = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1, curvature=curvature)
    with pytest.raises(RuntimeError, match=r"call loss.backward\(create_graph=True\)"):
        train(model, optimizer, inputs, targets, steps=1)


def test_other_errors_in_the_head_are_left_as_they_are(trained):
    model, _, inputs, targets = trained
    with pytest.raises(RuntimeError, match=r"size|shape"):
        F.mse_loss(model(inputs) @ torch.ones(7, 1).double(), targets)
