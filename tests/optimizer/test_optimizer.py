"""The optimizer in an ordinary training loop."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dd
from dd.functional import corrected_preactivation, shadow_gradient

N, D, K, C = 120, 60, 4, 3

# Torch warns that create_graph=True keeps the graph alive until the gradients are cleared.
create_graph_warns = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


def make_problem(seed: int = 0, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(seed)
    components = torch.arange(N) % C
    means = torch.randn(C, D, generator=g, dtype=dtype)
    inputs = means[components] + torch.randn(N, D, generator=g, dtype=dtype)
    return inputs, components


def make_model(seed: int = 0, activation: type[nn.Module] = nn.Tanh, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, K), activation(), nn.Linear(K, C)).to(dtype)


def train(
    model, optimizer, inputs, targets, steps=5, *, create_graph=False, loss_fn=F.cross_entropy
):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward(create_graph=create_graph)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def parameters_of(model) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def exact_total_curvature(head, preactivation, targets, loss_fn=F.cross_entropy) -> Tensor:
    hessian = torch.autograd.functional.hessian(
        lambda r: loss_fn(head(r), targets), preactivation.detach()
    )
    return torch.einsum("iaib->ab", hessian)


# --- Equality with SGD -----------------------------------------------------------------------

SGD_SETTINGS = [
    {"lr": 0.1},
    {"lr": torch.tensor(0.1)},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    {"lr": 0.1, "weight_decay": 0.05, "momentum": 0.5},
    {"lr": 0.1, "maximize": True},
    {"lr": 0.1, "foreach": True, "momentum": 0.9},
    {"lr": 0.1, "fused": True, "momentum": 0.9},
]


@pytest.mark.parametrize("settings", SGD_SETTINGS, ids=str)
def test_unattached_is_sgd_bit_for_bit(settings):
    inputs, targets = make_problem(dtype=torch.float32)
    ours, theirs = make_model(dtype=torch.float32), make_model(dtype=torch.float32)
    optimizer = dd.DecoupledDescent(ours.parameters(), **settings)
    # Plain on purpose.
    optimizer.detach()
    train(ours, optimizer, inputs, targets)
    train(theirs, torch.optim.SGD(theirs.parameters(), **settings), inputs, targets)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_that_corrects_nothing_says_so_once():
    inputs, targets = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    # As checkpointing makes state, before anyone has attached.
    optimizer.step()
    with pytest.warns(dd.UnattachedWarning, match=r"DecoupledDescent\(model, .*attach\(model\)"):
        train(model, optimizer, inputs, targets, steps=1)
    train(model, optimizer, inputs, targets, steps=1)
    train(model, copy.deepcopy(optimizer), inputs, targets, steps=1)


def test_a_second_optimizer_of_a_layer_takes_it_over():
    """A trainer that keeps its optimizer fits a model again, from the weights of its start."""
    inputs, targets = make_problem()
    model, alone = make_model(), make_model()
    start = copy.deepcopy(model.state_dict())
    first = dd.DecoupledDescent(model, lr=0.3)
    train(model, first, inputs, targets)
    model.load_state_dict(start)
    second = dd.DecoupledDescent(model, lr=0.3)
    train(model, second, inputs, targets)
    single = dd.DecoupledDescent(alone, lr=0.3)
    train(alone, single, inputs, targets)
    assert torch.equal(second.shadow, single.shadow)
    second.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    with pytest.raises(RuntimeError, match=r"another optimizer was attached.*detach\(\)"):
        first.step()
    with pytest.raises(RuntimeError, match=r"another optimizer was attached"):
        first.evaluate([torch.arange(N)], lambda index: 0.0)
    first.detach()
    second.step()


def test_a_second_optimizer_that_goes_on_without_the_shadows_says_so():
    inputs, targets = make_problem()
    model = make_model()
    first = dd.DecoupledDescent(model, lr=0.3)
    train(model, first, inputs, targets)
    second = dd.DecoupledDescent(model, lr=0.3)
    with pytest.warns(UserWarning, match=r"trained by another optimizer.*state_dict"):
        train(model, second, inputs, targets, steps=1)


def test_a_second_optimizer_that_cannot_be_attached_leaves_the_first():
    inputs, targets = make_problem()
    model = make_model()
    first = dd.DecoupledDescent(model, lr=0.3)
    train(model, first, inputs, targets, steps=1)
    with pytest.raises(ValueError, match="differentiable"):
        dd.DecoupledDescent(model, lr=0.3, differentiable=True)
    train(model, first, inputs, targets, steps=1)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("what", ["all", "behind"])
def test_checkpointing_changes_nothing(what, head):
    inputs, targets = make_problem()
    results = []
    for checkpoints in (False, True):
        model = make_model()
        noise = dd.NoiseModel.isotropic(inputs)
        optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise, head=head)
        for _ in range(3):
            optimizer.zero_grad()
            if not checkpoints:
                output = model(inputs)
            elif what == "all":
                output = checkpoint(model, inputs, use_reentrant=False)
            else:
                output = checkpoint(model[1:], model[0](inputs), use_reentrant=False)
            F.cross_entropy(output, targets).backward()
            optimizer.step()
        results.append([optimizer.shadow, *model.parameters()])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_reentrant_checkpointing_of_the_layer_is_refused():
    inputs, targets = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.3)
    train(model, optimizer, inputs, targets, steps=1)
    output = checkpoint(model, inputs.clone().requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"DecoupledDescent.*checkpointing.*use_reentrant=False"):
        F.cross_entropy(output, targets).backward()


def test_first_step_attached_moves_the_weights_as_sgd_does():
    inputs, targets = make_problem()
    ours, theirs = make_model(), make_model()
    train(ours, dd.DecoupledDescent(ours, lr=0.3), inputs, targets, steps=1)
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.3), inputs, targets, steps=1)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


# --- The method ------------------------------------------------------------------------------


@create_graph_warns
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_loop_follows_the_recursion(damping, momentum):
    """The optimizer with exact curvature does what equation (1) says, momentum applied alike."""
    inputs, targets = make_problem()
    model, twin = make_model(), make_model()
    noise = dd.NoiseModel.isotropic(inputs, targets)
    optimizer = dd.DecoupledDescent(
        model, lr=0.4, momentum=momentum, noise=noise, curvature="exact", damping=damping
    )
    layer, head = twin[0], twin[1:]
    shadow = torch.zeros(1, N, K, dtype=inputs.dtype)
    velocity: dict[int, Tensor] = {}
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward(create_graph=True)
        optimizer.step()

        corrected = corrected_preactivation(layer(inputs), shadow)
        corrected.retain_grad()
        twin.zero_grad()
        F.cross_entropy(head(corrected), targets).backward()
        curvature = exact_total_curvature(head, corrected, targets)
        moves = [p.grad for p in twin.parameters()]
        moves[0] = moves[0] - (1 - damping) * noise.eigenvalues * (curvature @ layer.weight.data)
        moves.append(
            shadow_gradient(
                shadow, corrected.grad, curvature, noise.eigenvalues, noise.mass, damping
            )
        )
        for index, (value, move) in enumerate(
            zip([*twin.parameters(), shadow], moves, strict=True)
        ):
            velocity[index] = momentum * velocity.get(index, 0) + move.detach()
            value.data -= 0.4 * velocity[index]
        torch.testing.assert_close(optimizer.shadow, shadow)
        torch.testing.assert_close(model[0].weight, layer.weight)


def test_bins_of_one_variance_are_isotropic_noise():
    inputs, targets = make_problem()
    shadows = []
    for counts in ([D], [10, D - 10]):
        noise = dd.NoiseModel(torch.full((len(counts),), 1.3).double(), torch.tensor(counts))
        model = make_model()
        optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise)
        train(model, optimizer, inputs, targets)
        shadows.append(optimizer.shadow.sum(0))
    torch.testing.assert_close(*shadows)


@pytest.mark.parametrize("curvature", ["probe", "stein"])
def test_sum_and_mean_reduced_losses_give_one_trajectory(curvature):
    inputs, targets = make_problem()
    noise = dd.NoiseModel.isotropic(inputs, targets if curvature == "stein" else None)
    mean, total = make_model(), make_model()
    by_mean = dd.DecoupledDescent(mean, lr=0.3, noise=noise, curvature=curvature)
    by_sum = dd.DecoupledDescent(total, lr=0.3 / N, noise=noise, curvature=curvature)
    train(mean, by_mean, inputs, targets)
    train(
        total, by_sum, inputs, targets, loss_fn=lambda o, y: F.cross_entropy(o, y, reduction="sum")
    )
    torch.testing.assert_close(by_mean.shadow, by_sum.shadow)
    torch.testing.assert_close(mean[0].weight, total[0].weight)


@create_graph_warns
def test_probe_forms_agree_with_each_other_and_with_exact_curvature():
    """Forward-over-reverse and double backward see one probe; exact differs by its n^-1/2 noise."""
    inputs, targets = make_problem()
    shadows = {}
    for curvature in ("probe", "probe_create_graph", "exact"):
        model = make_model()
        optimizer = dd.DecoupledDescent(model, lr=0.3, curvature=curvature)
        train(model, optimizer, inputs, targets, create_graph=curvature != "probe")
        shadows[curvature] = optimizer.shadow
    torch.testing.assert_close(shadows["probe"], shadows["probe_create_graph"])
    deviation = (shadows["probe"] - shadows["exact"]).norm() / shadows["exact"].norm()
    assert 0 < deviation < N**-0.5


def test_in_place_activation_changes_nothing():
    inputs, targets = make_problem()
    results = []
    for inplace in (False, True):
        for curvature in ("probe", "stein"):
            model = make_model(activation=nn.ReLU)
            model[1] = nn.ReLU(inplace=inplace)
            noise = dd.NoiseModel.isotropic(inputs, targets)
            optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise, curvature=curvature)
            train(model, optimizer, inputs, targets)
            results.append(optimizer.shadow)
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[3])


def test_scheduled_learning_rate_moves_weights_and_shadows():
    inputs, targets = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.3)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], gamma=0.0)
    train(model, optimizer, inputs, targets, steps=1)
    scheduler.step()
    frozen, shadow = parameters_of(model), optimizer.shadow.clone()
    train(model, optimizer, inputs, targets, steps=1)
    assert torch.equal(optimizer.shadow, shadow)
    assert all(torch.equal(a, b) for a, b in zip(frozen, model.parameters(), strict=True))


def test_closure_gives_the_same_trajectory():
    inputs, targets = make_problem()
    plain, closed = make_model(), make_model()
    losses = train(plain, dd.DecoupledDescent(plain, lr=0.3), inputs, targets)
    optimizer = dd.DecoupledDescent(closed, lr=0.3)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(closed(inputs), targets)
        loss.backward()
        return loss

    assert [float(optimizer.step(closure).detach()) for _ in range(5)] == losses
    torch.testing.assert_close(plain[0].weight, closed[0].weight)


def test_global_random_state_is_left_alone():
    inputs, targets = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.3, curvature="probe")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train(model, optimizer, inputs, targets)
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_decides_the_probe():
    inputs, targets = make_problem()

    def shadow(seed):
        model = make_model()
        optimizer = dd.DecoupledDescent(model, lr=0.3, curvature="probe", seed=seed)
        train(model, optimizer, inputs, targets)
        return optimizer.shadow

    assert torch.equal(shadow(1), shadow(1))
    assert not torch.equal(shadow(1), shadow(2))


# --- Train, eval, attach, detach -------------------------------------------------------------


def test_eval_is_plain_and_train_is_corrected_with_and_without_gradients():
    inputs, targets = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.3)
    train(model, optimizer, inputs, targets)
    reference = make_model()
    reference.load_state_dict(model.state_dict())
    expected = model[1:](reference[0](inputs) + optimizer.shadow.sum(0))
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), expected)
    torch.testing.assert_close(model(inputs).as_subclass(Tensor), expected)
    optimizer.drop_forward()
    model.eval()
    torch.testing.assert_close(model(inputs), reference(inputs))
    torch.testing.assert_close(model(inputs[:7]), reference(inputs[:7]))


def test_detach_leaves_no_trace():
    inputs, targets = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.3, momentum=0.9)
    train(model, optimizer, inputs, targets)
    model(inputs)
    optimizer.detach()
    assert not model[0]._forward_hooks
    assert set(optimizer.state[model[0].weight]) == {"momentum_buffer"}
    assert optimizer.layer is optimizer.shadow is optimizer.noise is None
    assert torch.autograd.forward_ad._current_level == -1
    other = make_model()
    other.load_state_dict(model.state_dict())
    sgd = torch.optim.SGD(other.parameters(), lr=0.3, momentum=0.9)
    sgd.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, inputs, targets)
    train(other, sgd, inputs, targets)
    assert torch.equal(model[0].weight, other[0].weight)
    optimizer.detach()
    optimizer.attach(model)
    assert optimizer.layer is model[0]


def test_layer_is_found_or_named():
    frozen = nn.Linear(D, D).requires_grad_(False)
    model = nn.Sequential(frozen, nn.ReLU(), nn.Linear(D, K), nn.Linear(K, C))
    assert dd.DecoupledDescent(model, lr=0.1).layer is model[2]
    for layer in (model[3], "3"):
        other = copy.deepcopy(model) if isinstance(layer, str) else model
        assert dd.DecoupledDescent(other, lr=0.1, layer=layer).layer is other[3]


def test_attach_after_construction_with_parameters():
    inputs, targets = make_problem()
    early, late = make_model(), make_model()
    by_module = dd.DecoupledDescent(early, lr=0.3)
    by_parameters = dd.DecoupledDescent(late.parameters(), lr=0.3)
    by_parameters.attach(late)
    train(early, by_module, inputs, targets)
    train(late, by_parameters, inputs, targets)
    assert torch.equal(by_module.shadow, by_parameters.shadow)


def test_copies_of_the_model_are_plain():
    inputs, targets = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.3)
    train(model, optimizer, inputs, targets)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # noqa: S301
    copies.append(torch.load(buffer, weights_only=False))
    plain = make_model()
    plain.load_state_dict(model.state_dict())
    for twin in copies:
        assert twin.training
        torch.testing.assert_close(twin(inputs), plain(inputs))


def test_a_dead_optimizer_leaves_a_plain_model():
    inputs, targets = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.3)
    train(model, optimizer, inputs, targets)
    plain = make_model()
    plain.load_state_dict(model.state_dict())
    model(inputs)
    del optimizer
    torch.testing.assert_close(model(inputs), plain(inputs))
    assert torch.autograd.forward_ad._current_level == -1
    dd.DecoupledDescent(model, lr=0.3)


def test_two_optimizers_share_one_loop():
    inputs, targets = make_problem()
    alone, first, second = make_model(), make_model(), make_model(1)
    single = dd.DecoupledDescent(alone, lr=0.3, curvature="probe")
    train(alone, single, inputs, targets)
    optimizers = [dd.DecoupledDescent(m, lr=0.3, curvature="probe") for m in (first, second)]
    for _ in range(5):
        losses = [F.cross_entropy(m(inputs), targets) for m in (first, second)]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert torch.equal(single.shadow, optimizers[0].shadow)
    assert torch.autograd.forward_ad._current_level == -1


def test_a_forward_mode_level_of_the_caller_is_left_alone():
    inputs, targets = make_problem()
    model, alone = make_model(), make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.3, curvature="probe")
    with torch.autograd.forward_ad.dual_level():
        train(model, optimizer, inputs, targets)
        assert torch.autograd.forward_ad._current_level == 0
    single = dd.DecoupledDescent(alone, lr=0.3, curvature="probe")
    train(alone, single, inputs, targets)
    assert torch.equal(single.shadow, optimizer.shadow)


def test_full_batch_loader_with_a_fixed_order_is_recognised():
    inputs, targets = make_problem()
    model, alone = make_model(), make_model()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, targets), batch_size=N
    )
    optimizer = dd.DecoupledDescent(model, lr=0.3)
    for _ in range(5):
        for x, y in loader:
            train(model, optimizer, x, y, steps=1)
    single = dd.DecoupledDescent(alone, lr=0.3)
    train(alone, single, inputs, targets)
    assert torch.equal(single.shadow, optimizer.shadow)


@pytest.mark.parametrize("settings", [{"momentum": 0.9}, {"weight_decay": 0.1}, {}], ids=str)
def test_a_step_on_zero_gradients_moves_weights_and_shadows_alike(settings):
    """X(W' - W) and Q' - Q follow one rule, so momentum and decay move both or neither."""
    inputs, targets = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.3, **settings)
    train(model, optimizer, inputs, targets)
    weight, shadow = model[0].weight.detach().clone(), optimizer.shadow.clone()
    velocity = (
        optimizer.state[model[0].weight].get("shadow_momentum_buffer", torch.zeros(1)).clone()
    )
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    momentum, decay = settings.get("momentum", 0.0), settings.get("weight_decay", 0.0)
    expected = shadow - 0.3 * (momentum * velocity + decay * shadow)
    torch.testing.assert_close(optimizer.shadow, expected)
    assert torch.equal(weight, model[0].weight) == (not settings)


def test_losses_and_scores_are_printed_saved_and_copied_as_plain_tensors():
    inputs, targets = make_problem()
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.3, curvature="probe")
    scores = model(inputs)
    loss = F.cross_entropy(scores, targets)
    buffer = io.BytesIO()
    torch.save({"loss": loss.detach(), "scores": scores.detach()}, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True)["loss"], loss.detach())
    assert type(loss.detach()) is type(copy.deepcopy(loss.detach())) is Tensor
    assert type(pickle.loads(pickle.dumps(scores.detach()))) is Tensor  # noqa: S301
    assert f"{loss:.4f}" == f"{loss.item():.4f}"
    assert f"{loss}" == str(loss.item())
    assert f"{(scores.argmax(1) == targets).double().mean():.3f}"
    assert repr(loss).startswith("tensor(")
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("k", [1, 2, 8])
def test_rounding_is_no_edit_with_many_samples(k):
    torch.manual_seed(0)
    inputs, targets = torch.randn(60_000, 20), torch.randint(C, (60_000,))
    model = nn.Sequential(nn.Linear(20, k), nn.ReLU(), nn.Linear(k, C))
    optimizer = dd.DecoupledDescent(model, lr=0.5, curvature="probe")
    train(model, optimizer, inputs, targets, steps=10)
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    model[0].weight.grad[0, :10] *= 0.5
    with pytest.raises(RuntimeError, match="not the one that the last backward"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_no_edit_even_at_a_stationary_point(dtype):
    """The gradient's terms cancel there, and rounding is all that is left of their sum."""
    inputs, targets = make_problem(dtype=dtype)
    model = nn.Sequential(nn.Linear(D, C)).to(dtype)
    optimizer = dd.DecoupledDescent(model, lr=0.5, curvature="probe", weight_decay=0.1)
    train(model, optimizer, inputs + 100, targets, steps=400)
    assert optimizer.shadow.isfinite().all()


@pytest.mark.cuda
def test_cuda_follows_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    inputs, targets = make_problem()
    shadows = []
    for device in ("cpu", "cuda"):
        model = make_model().to(device)
        x, y = inputs.to(device), targets.to(device)
        noise = dd.NoiseModel.isotropic(inputs, targets)
        optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise)
        train(model, optimizer, x, y)
        shadows.append(optimizer.shadow.cpu())
        probing = dd.DecoupledDescent(make_model().to(device), lr=0.3, curvature="probe")
        assert probing.layer is not None
    torch.testing.assert_close(*shadows)
