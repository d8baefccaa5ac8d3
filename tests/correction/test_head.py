"""The correction of the head and of what else all samples share."""

import copy
import io
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dd
import dd.data
import dd.experiments.models
from dd.correction.head_record import HeadRecord
from dd.functional import shared_curvature, shared_shadow_gradient, softmax_curvature
from dd.watch.divergence import SharpnessWatch
from tests.reference import Head, decoupled_descent_with_head

N, D, K, C = 60, 24, 4, 3

create_graph_warns = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


def make_problem(n=N, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % C
    means = 1.5 * torch.randn(C, D, generator=g, dtype=torch.float64)
    return means[labels] + torch.randn(n, D, generator=g, dtype=torch.float64), labels


def make_model(seed=0, activation=nn.Tanh, bias=True):
    torch.manual_seed(seed)
    layers = nn.Linear(D, K, bias=bias), activation(), nn.Linear(K, C, bias=bias)
    return nn.Sequential(*layers).double()


def make_noise(inputs, labels):
    return dd.NoiseModel.fit(inputs, labels, bins=4, per_sample=False, separate_means=True)


def attached(model, inputs, labels, **settings):
    settings = {"lr": 0.2, "head": True, "noise": make_noise(inputs, labels)} | settings
    return dd.DecoupledDescent(model, **settings)


def train(model, optimizer, inputs, labels, steps=4, loss_fn=F.cross_entropy, graph=False):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(inputs), labels).backward(create_graph=graph)
        optimizer.step()


def shadows_of(optimizer, model) -> list[Tensor]:
    state = optimizer.state
    return [
        state[model[0].weight]["shadow"],
        state[model[0].weight]["signal_shadow"],
        *(state[p]["shadow"] for p in (model[0].bias, model[2].weight, model[2].bias)),
    ]


# --- The mathematics -------------------------------------------------------------------------


def test_softmax_curvature_is_the_hessian():
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(5, C, generator=g, dtype=torch.float64)
    weights = torch.rand(5, generator=g, dtype=torch.float64)
    for i, found in enumerate(softmax_curvature(scores, weights)):
        hessian = torch.func.hessian(lambda o: torch.logsumexp(o, 0))(scores[i])
        torch.testing.assert_close(found, weights[i] * hessian)


def test_shared_curvature_is_the_sum_of_outer_products():
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(2, *shape, generator=g, dtype=torch.float64)

    n, m, f = 7, 2, 5
    p, jacobian, signal, features = normal(n, C, C), normal(n, C, K), normal(n, m), normal(n, f)
    p = p + p.mT
    found = shared_curvature(p, jacobian, signal, features)
    for b in range(2):
        expected = torch.zeros_like(found[b])
        for i in range(n):
            j = torch.cat(
                [
                    torch.kron(jacobian[b, i], signal[b, i][None]),
                    torch.kron(torch.eye(C).double(), features[b, i][None]),
                ],
                1,
            )
            expected += j.T @ p[b, i] @ j
        torch.testing.assert_close(found[b], expected)


def test_shared_shadow_gradient_removes_the_samples_own_push():
    g = torch.Generator().manual_seed(0)
    gradient, e = torch.randn(6, K, generator=g), torch.randn(6, C, generator=g)
    signal, features = torch.randn(6, 2, generator=g), torch.randn(6, 5, generator=g)
    p = K * 2 + C * 5
    shadow, curvature = torch.randn(6, p, generator=g), torch.randn(p, p, generator=g)
    curvature = curvature + curvature.T
    found = shared_shadow_gradient(shadow, gradient, e, signal, features, curvature)
    for i in range(6):
        push = [torch.outer(gradient[i], signal[i]), torch.outer(e[i], features[i])]
        expected = curvature @ shadow[i] - torch.cat([part.flatten() for part in push])
        torch.testing.assert_close(found[i], expected)


@create_graph_warns
@pytest.mark.parametrize("apart", [2, D], ids=["the means", "every direction"])
def test_equals_the_slow_twin(apart):
    inputs, labels = make_problem(n=15)
    model = make_model()
    g = torch.Generator().manual_seed(3)
    directions = torch.linalg.qr(torch.randn(D, apart, generator=g, dtype=torch.float64))[0]
    variance, rates = 0.7, [0.3, 0.2, 0.3, 0.1]
    noise = dd.NoiseModel(
        torch.tensor([variance], dtype=torch.float64),
        torch.tensor([D - apart]),
        mean_directions=directions,
    )
    covariance = variance * (torch.eye(D).double() - directions @ directions.T)
    head = Head(*(p.detach().clone() for p in (model[0].bias, model[2].weight, model[2].bias)))
    steps = decoupled_descent_with_head(
        inputs,
        labels,
        model[0].weight.detach().T.clone(),
        head,
        torch.tanh,
        rates,
        covariance,
        directions,
    )
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=noise, curvature="exact", head=True)
    for rate, (step, _) in zip(rates, steps, strict=False):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        assert float(loss.detach()) == pytest.approx(step.loss, rel=1e-12)
        loss.backward(create_graph=True)
        optimizer.step()
    step, shared = steps[-1]
    bulk, along, bias, weight, last = shadows_of(optimizer, model)
    omega = torch.cat([along, bias[..., None]], -1).flatten(1)
    outer = torch.cat([weight, last[..., None]], -1).flatten(1)
    torch.testing.assert_close(model[0].weight.T, step.weight)
    torch.testing.assert_close(model[2].weight, step.head.weight)
    torch.testing.assert_close(bulk[0], step.shadow)
    torch.testing.assert_close(torch.cat([omega, outer], 1), shared)


RULES = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"maximize": True},
    {"momentum": 0.9, "fused": True},
    {"momentum": 0.9, "foreach": True},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_shadows_move_by_the_rule_of_their_parameter(monkeypatch, rule):
    # Without decay each shadow is all that its sample has pushed, under whatever linear rule; and
    # all samples' pushes together are what the parameter has moved.
    monkeypatch.setattr(
        "dd.correction.head.shared_curvature", lambda *parts: 0 * shared_curvature(*parts)
    )
    inputs, labels = make_problem()
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = attached(model, inputs, labels, **rule)
    directions = make_noise(inputs, labels).mean_directions
    # Heads at a rate of their own move their shadows at that rate.
    head = optimizer.param_groups[0]["params"][2:]
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][:2]
    optimizer.add_param_group({"params": head, "lr": 0.05})
    train(model, optimizer, inputs, labels)
    moved = [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]
    _, along, bias, weight, last = shadows_of(optimizer, model)
    torch.testing.assert_close(along.sum(0), -moved[0] @ directions)
    torch.testing.assert_close(bias.sum(0), -moved[1])
    torch.testing.assert_close(weight.sum(0), -moved[2])
    torch.testing.assert_close(last.sum(0), -moved[3])


def test_weight_decay_shrinks_the_shadows_with_the_parameters():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = attached(model, inputs, labels, weight_decay=0.5)
    train(model, optimizer, inputs, labels)
    before = [s.clone() for s in shadows_of(optimizer, model)]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for shadow, earlier in zip(shadows_of(optimizer, model), before, strict=True):
        torch.testing.assert_close(shadow, (1 - 0.2 * 0.5) * earlier)


# --- Leave-one-out ---------------------------------------------------------------------------


def weighted_loss(weights):
    def loss(scores, labels):
        return (weights * F.cross_entropy(scores, labels, reduction="none")).sum() / len(weights)

    return loss


def head_displacements(n: int, left_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Predicted and retrained change of a sample's scores by the head without it, (left_out, C).

    The head's features are those of the network trained on everything.
    """
    inputs, labels = make_problem(n, seed)
    noise = make_noise(inputs, labels)

    def trained(weights):
        model = make_model(seed)
        optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise, head=True)
        train(model, optimizer, inputs, labels, 20, weighted_loss(weights))
        return model, optimizer

    def matrix(model):
        return torch.cat([model[2].weight, model[2].bias[:, None]], 1).detach()

    full, optimizer = trained(torch.ones(n))
    seen = []
    full[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        full(inputs)
    features = torch.cat([seen[0], torch.ones(n, 1)], 1)[:left_out]
    *_, weight, bias = shadows_of(optimizer, full)
    shadow = torch.cat([weight, bias[..., None]], -1)[:left_out]
    moved = []
    for i in range(left_out):
        weights = torch.ones(n)
        weights[i] = 0
        moved.append((matrix(trained(weights)[0]) - matrix(full)) @ features[i])
    return torch.einsum("ncf,nf->nc", shadow, features), torch.stack(moved)


def test_head_shadow_follows_the_leave_one_out_displacement(monkeypatch):
    # Gauss-Newton leaves out the residual's curvature, so that the match is one of direction and
    # of size within a factor, at any n. Without decay the shadows are twice too large.
    def slope_and_correlation():
        predicted, moved = head_displacements(240, 30, seed=0)
        product = float((predicted * moved).sum())
        return product / float(predicted.square().sum()), product / float(
            predicted.norm() * moved.norm()
        )

    slope, correlation = slope_and_correlation()
    assert correlation > 0.8
    assert 2 / 3 < slope < 2
    monkeypatch.setattr(
        "dd.correction.head.shared_curvature", lambda *parts: 0 * shared_curvature(*parts)
    )
    slope, _ = slope_and_correlation()
    assert slope < 2 / 3


# --- In a training loop ----------------------------------------------------------------------


def test_corrects_in_train_mode_only_and_leaves_the_plain_network():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = attached(model, inputs, labels)
    train(model, optimizer, inputs, labels)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        corrected = model(inputs)
        model.eval()
        torch.testing.assert_close(model(inputs), plain(inputs), rtol=0, atol=0)
        assert not torch.allclose(corrected, plain(inputs))
        # The head is corrected too: the change is not that of the pre-activations alone.
        layer = plain[0](inputs)
        state = optimizer.state
        shift = state[model[0].weight]["shadow"].sum(0)
        assert not torch.allclose(corrected, plain[2](plain[1](layer + shift)), atol=1e-4)


@pytest.mark.parametrize("curvature", ["stein", "probe"])
def test_reduction_does_not_matter(curvature):
    inputs, labels = make_problem()
    weight = torch.tensor([1.0, 3.0, 0.5]).double()
    total = float(weight[labels].sum())
    models = []
    for reduction, lr in (("mean", 0.2), ("sum", 0.2 / total)):
        model = make_model()
        optimizer = attached(model, inputs, labels, lr=lr, curvature=curvature)
        train(
            model,
            optimizer,
            inputs,
            labels,
            loss_fn=nn.CrossEntropyLoss(weight, reduction=reduction),
        )
        models.append((model, optimizer))
    for a, b in zip(models[0][0].parameters(), models[1][0].parameters(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*(shadows_of(o, m) for m, o in models), strict=True):
        torch.testing.assert_close(a, b)


def test_weights_of_samples_are_read_off_the_gradient():
    g = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(50, C, generator=g)
    labels = torch.arange(50) % C
    weights = torch.rand(50, generator=g)
    weights[:5] = 0
    scores.requires_grad_()
    (weights * F.cross_entropy(scores, labels, reduction="none")).sum().backward()
    found = HeadRecord(scores.detach(), torch.ones(50, 1), torch.ones(50, C, K), scores.grad)
    torch.testing.assert_close(
        found.curvature(), softmax_curvature(scores.detach(), weights), rtol=1e-4, atol=1e-6
    )


def test_samples_are_those_of_the_first_step():
    # A forward on other data before it must leave nothing behind.
    (inputs, labels), (others, _) = make_problem(), make_problem(seed=5)
    models = []
    for first in (None, "no_grad", "refused", "dropped"):
        model = make_model()
        optimizer = attached(model, inputs, labels)
        if first == "no_grad":
            with torch.no_grad():
                model(others)
        elif first == "refused":
            with pytest.raises(ValueError, match="not among them"):
                model(others)
        elif first == "dropped":
            model(inputs[:20])
            optimizer.drop_forward()
        train(model, optimizer, inputs, labels)
        models.append(model)
    for model in models[1:]:
        assert torch.equal(model[2].weight, models[0][2].weight)


# The compiler itself looks at the .grad of tensors that have none.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_model_is_the_eager_one():
    inputs, labels = make_problem()
    weights = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="aot_eager")):
        model = make_model()
        optimizer = attached(model, inputs, labels)
        train(wrap(model), optimizer, inputs, labels)
        weights.append(model[2].weight.detach())
    torch.testing.assert_close(*weights)


def test_many_samples_take_memory_in_blocks(monkeypatch):
    g = torch.Generator().manual_seed(0)
    p, jacobian = torch.randn(2, 9, C, C, generator=g), torch.randn(2, 9, C, K, generator=g)
    signal, features = torch.randn(2, 9, 2, generator=g), torch.randn(2, 9, 5, generator=g)
    whole = shared_curvature(p, jacobian, signal, features)
    monkeypatch.setattr("dd.functional.head._AT_A_TIME", 2 * 5 * 5)
    torch.testing.assert_close(shared_curvature(p, jacobian, signal, features), whole)


@create_graph_warns
def test_graph_probe_and_second_hidden_layer():
    inputs, labels = make_problem()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(D, K), nn.SiLU(), nn.LayerNorm(K), nn.Linear(K, 5), nn.GELU(), nn.Linear(5, C)
    ).double()
    optimizer = attached(model, inputs, labels, curvature="probe_create_graph")
    train(model, optimizer, inputs, labels, graph=True)
    assert optimizer.state[model[5].weight]["shadow"].shape == (N, C, 5)
    assert "shadow" not in optimizer.state[model[3].weight]


def test_without_ids_and_without_biases():
    inputs, labels = make_problem()
    model = make_model(bias=False)
    optimizer = dd.DecoupledDescent(model, lr=0.2, head=True)
    train(model, optimizer, inputs, labels)
    assert optimizer.state[model[0].weight]["signal_shadow"].shape == (N, K, 0)
    assert optimizer.state[model[2].weight]["shadow"].abs().max() > 0


def test_resumes_bit_for_bit():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = attached(model, inputs, labels, momentum=0.9)
    train(model, optimizer, inputs, labels)
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    train(model, optimizer, inputs, labels)
    saved.seek(0)
    content = torch.load(saved, weights_only=True)
    again = make_model(1)
    resumed = attached(again, inputs, labels, momentum=0.9)
    again.load_state_dict(content["model"])
    resumed.load_state_dict(content["optimizer"])
    train(again, resumed, inputs, labels)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(shadows_of(optimizer, model), shadows_of(resumed, again), strict=True):
        assert torch.equal(a, b)


def test_detach_leaves_plain_sgd():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = attached(model, inputs, labels, momentum=0.9)
    train(model, optimizer, inputs, labels)
    optimizer.detach()
    assert not model[0]._forward_hooks
    assert not model[2]._forward_hooks
    for state in optimizer.state.values():
        assert set(state) == {"momentum_buffer"}


def test_identity_holds_with_an_over_fitted_head():
    # A head of many units on few samples: what is left of the gap without its correction is far
    # more than the two samples' own noise, sqrt(p(1 − p)(1/n + 1/n_test)) ≈ 0.03.
    g = torch.Generator().manual_seed(0)
    d, n, classes, k = 300, 300, 8, 48
    means = 3.5 * torch.nn.functional.normalize(torch.randn(classes, d, generator=g), dim=1)

    def sample(count):
        labels = torch.randint(classes, (count,), generator=g)
        return means[labels] + torch.randn(count, d, generator=g), labels

    (inputs, labels), (fresh, answers) = sample(n), sample(4000)
    gaps = {}
    for head in (False, True):
        model = dd.experiments.models.two_layer(
            d, k, classes, activation="tanh", generator=torch.Generator().manual_seed(1)
        )
        noise = dd.NoiseModel.fit(inputs, labels, bins=1, per_sample=False, separate_means=head)
        optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise, head=head)
        train(model, optimizer, inputs, labels, 150)
        with torch.no_grad():
            corrected = float(F.cross_entropy(model(inputs), labels))
            model.eval()
            gaps[head] = corrected - float(F.cross_entropy(model(fresh), answers))
    assert abs(gaps[True]) < abs(gaps[False]) / 2


def test_the_head_may_run_by_itself_between_steps():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = attached(model, inputs, labels)
    train(model, optimizer, inputs, labels)
    with torch.no_grad():
        hidden, expected = model[1](model[0](inputs)), model(inputs)
    torch.testing.assert_close(model[2](hidden), expected)
    train(model, optimizer, inputs, labels)


def test_wrong_component_ids_are_found_with_a_corrected_head():
    split = dd.data.xor(dimension=200, num_train=1600, num_test=10, separation=3.5, seed=0)
    warned = {}
    for name, ids in (("labels", split.train_targets), ("clusters", split.train_components)):
        model = dd.experiments.models.two_layer(
            200, 8, 2, generator=torch.Generator().manual_seed(0)
        )
        noise = dd.NoiseModel.fit(split.train_inputs, ids, separate_means=True)
        optimizer = dd.DecoupledDescent(model, lr=0.5, noise=noise, head=True, curvature="stein")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, optimizer, split.train_inputs, split.train_targets, 50)
        warned[name] = any(issubclass(w.category, dd.CurvatureWarning) for w in caught)
    assert warned == {"labels": True, "clusters": False}


# --- Errors ----------------------------------------------------------------------------------


def test_refuses_what_it_cannot_correct():
    inputs, labels = make_problem()
    with pytest.raises(ValueError, match="no head to correct"):
        dd.DecoupledDescent(nn.Sequential(nn.Linear(D, C)), lr=0.1, head=True)
    model = make_model()
    with pytest.raises(ValueError, match="not part of the model"):
        dd.DecoupledDescent(model, lr=0.1, head="missing")
    with pytest.raises(TypeError, match=r"expected nn\.Linear"):
        dd.DecoupledDescent(model, lr=0.1, head="1")
    with pytest.raises(ValueError, match="separate_means=True"):
        dd.DecoupledDescent(model, lr=0.1, head=True, noise=dd.NoiseModel.isotropic(inputs, labels))
    with pytest.raises(ValueError, match="only head=True follows"):
        dd.DecoupledDescent(model, lr=0.1, head=False, noise=make_noise(inputs, labels))
    with pytest.raises(ValueError, match="damping=1"):
        dd.DecoupledDescent(model, lr=0.1, head=True, damping=0.5)
    optimizer = dd.DecoupledDescent(model[0].parameters(), lr=0.1, head=True)
    with pytest.raises(ValueError, match=r"'2.weight' is not among"):
        optimizer.attach(model)
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="head=False for a fixed head"):
        dd.DecoupledDescent(model, lr=0.1, head=True)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda scores, labels: ((scores - F.one_hot(labels, C)) ** 2).mean(),
        lambda scores, labels: F.cross_entropy(scores, labels, label_smoothing=0.1),
        lambda scores, labels: -F.cross_entropy(scores, labels),
    ],
)
def test_other_losses_are_refused(loss_fn):
    inputs, labels = make_problem()
    model = make_model()
    optimizer = attached(model, inputs, labels)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="softmax cross-entropy"):
        train(model, optimizer, inputs, labels, loss_fn=loss_fn)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


class Skips(nn.Module):
    """A network whose loss can leave out the head."""

    def __init__(self):
        super().__init__()
        self.layer, self.last, self.twice = nn.Linear(D, C), nn.Linear(C, C), False

    def forward(self, inputs):
        hidden = self.layer(inputs).tanh()
        if self.twice:
            self.last(hidden)
            return self.last(hidden)
        return hidden


def test_a_head_that_is_left_out_or_used_twice_is_an_error():
    inputs, labels = make_problem()
    model = Skips().double()
    optimizer = attached(model, inputs, labels)
    with pytest.raises(RuntimeError, match="took no part"):
        train(model, optimizer, inputs, labels)
    optimizer.drop_forward()
    model.twice = True
    with pytest.raises(RuntimeError, match="once in every training forward"):
        train(model, optimizer, inputs, labels)


def test_a_head_beside_the_decoupled_layer_is_an_error():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = attached(model, inputs, labels)
    model[0](inputs)
    with pytest.raises(RuntimeError, match="does not depend on the decoupled layer"):
        model[2](torch.randn(N, K).double())
    optimizer.drop_forward()


def test_a_head_of_too_many_parameters_is_an_error(monkeypatch):
    monkeypatch.setattr("dd.correction.head._MOST_PARAMETERS", K * 4 + C * 5 - 1)
    inputs, labels = make_problem()
    with pytest.raises(ValueError, match=f"would follow {K * 4 + C * 5} shared parameters"):
        attached(make_model(), inputs, labels)


@pytest.mark.parametrize("edit", ["weight", "bias", "layer bias", "penalty"])
def test_edited_gradients_are_an_error(edit):
    inputs, labels = make_problem()
    model = make_model()
    optimizer = attached(model, inputs, labels)
    loss = F.cross_entropy(model(inputs), labels)
    if edit == "penalty":
        loss = loss + 0.1 * model[2].weight.square().sum()
    loss.backward()
    edited = {"weight": model[2].weight, "bias": model[2].bias, "layer bias": model[0].bias}
    if edit in edited:
        edited[edit].grad.mul_(0.5)
    with pytest.raises(RuntimeError, match="is not the one that the last backward"):
        optimizer.step()


def test_a_head_changed_outside_step_is_an_error():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = attached(model, inputs, labels)
    train(model, optimizer, inputs, labels)
    with torch.no_grad():
        model[2].weight.mul_(0.9)
    with pytest.raises(RuntimeError, match="weight of head '2' was changed outside"):
        model(inputs)


def test_states_of_another_kind_are_refused():
    inputs, labels = make_problem()
    plain = dd.NoiseModel.fit(inputs, labels, bins=1, per_sample=False)
    kinds = {
        "head": {},
        "no head": {"head": False, "noise": plain},
        "bins": {"head": False, "noise": dd.NoiseModel(torch.ones(2), torch.tensor([4, D - 4]))},
    }
    saved = {}
    for kind, settings in kinds.items():
        model = make_model()
        optimizer = attached(model, inputs, labels, **settings)
        train(model, optimizer, inputs, labels)
        saved[kind] = model.state_dict(), optimizer.state_dict()
    for old in kinds:
        for new, settings in kinds.items():
            model = make_model()
            optimizer = attached(model, inputs, labels, **settings)
            model.load_state_dict(saved[old][0])
            optimizer.load_state_dict(saved[old][1])
            if old == new:
                train(model, optimizer, inputs, labels)
            else:
                with pytest.raises(RuntimeError, match="Load a state into an optimizer of"):
                    model(inputs)


def test_scores_changed_in_place_are_not_those_of_the_loss():
    inputs, labels = make_problem()
    model = make_model()
    optimizer = attached(model, inputs, labels)
    with pytest.raises(RuntimeError, match="softmax cross-entropy"):
        train(model, optimizer, inputs, labels, loss_fn=lambda s, y: F.cross_entropy(s.div_(2), y))


def test_past_the_edge_it_warns():
    g = torch.Generator().manual_seed(99)
    labels = torch.arange(120) % C
    inputs = 0.35 * torch.randn(C, D, generator=g)[labels] + torch.randn(120, D, generator=g)
    warned, losses = {}, {}
    for rate in (0.2, 1.0):
        model = make_model(activation=nn.GELU).float()
        optimizer = attached(model, inputs, labels, lr=rate)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, optimizer, inputs, labels, 200)
        warned[rate] = any(w.category is dd.DivergenceWarning for w in caught)
        with torch.no_grad():
            losses[rate] = float(F.cross_entropy(model(inputs), labels))
    assert warned == {0.2: False, 1.0: True}, losses


@pytest.mark.parametrize(
    ("excess", "steps", "warns"), [(1.01, 5, True), (1.01, 4, False), (0.99, 9, False)]
)
def test_the_edge_is_that_of_heavy_ball(excess, steps, warns):
    curvature = torch.diag(torch.tensor([1.0, 0.2, 0.1]))
    watch = SharpnessWatch()
    groups = [{"lr": excess * 2 * 1.9, "momentum": 0.9}]
    # The power iteration has to find the direction first.
    for _ in range(20):
        watch.look(curvature, [{"lr": 0.0, "momentum": 0.9}])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            watch.look(curvature, groups)
        watch.tell()
    assert len(caught) == warns


def test_separated_means_leave_the_noise_beside_them():
    inputs, labels = make_problem(n=600)
    noise = dd.NoiseModel.fit(inputs, labels, bins=1, per_sample=True, separate_means=True)
    u = noise.mean_directions
    torch.testing.assert_close(u.T @ u, torch.eye(C).double())
    beside = inputs - inputs @ u @ u.T
    # Each sample's mass is exactly its length beside the means.
    torch.testing.assert_close(noise.relative_mass * noise.mass.sum(), beside.square().sum(1))
    assert str(noise).endswith(
        "3 components, 3 directions of their means apart, a mass for every sample"
    )
    # Unit noise in D − C directions of 600 samples.
    assert noise.dimension == D
    assert float(noise.eigenvalues) == pytest.approx(1, abs=4 * math.sqrt(2 / (600 * D)))
    with pytest.raises(ValueError, match="needs the component of every sample"):
        dd.NoiseModel.fit(inputs, separate_means=True)
    with pytest.raises(ValueError, match="span all 2 input dimensions"):
        dd.NoiseModel.fit(inputs[:, :2], labels, separate_means=True)
