"""``dd.decouple``: any optimizer, tracked by hooks alone."""

import copy
import io
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import dd
from dd.rules.quantities import AVERAGE_RATES, OptimizerStep, after_step, average_name, state_name
from dd.rules.response import ResponseIdentifier

N, D, K = 240, 60, 4


def problem(seed=0, n=N, d=D, size=2.5):
    """XOR of four Gaussian classes: inputs, labels, components, and fresh samples."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, 2, generator=generator))[0].T
    means = size * torch.stack([basis[0], -basis[0], basis[1], -basis[1]])

    def draw(count):
        component = torch.arange(count) % 4
        noise = torch.randn(count, d, generator=generator)
        return noise + means[component], component // 2, component

    return draw(n), draw(5000)


def network(d=D, k=K, seed=1, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, k), nn.Tanh(), nn.Linear(k, 2)).to(dtype)


def rest_of(model):
    return [model[0].bias, *model[2].parameters()]


def train(model, optimizers, batches, between=lambda: None):
    for inputs, labels in batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        between()
        for optimizer in optimizers:
            optimizer.step()


def states_from_file(parts, *, weights_only=True):
    """The states of model, optimizers and tracker, as a file gives them back."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def load_all(parts, states):
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)


def full(X, y, steps):
    return [(X, y)] * steps


def mini(X, y, steps, size=80, seed=3):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(len(X), generator=generator)[:size] for _ in range(steps)]
    return [(X[r], y[r]) for r in rows]


def decoupled(make):
    """XOR, a network, an optimizer of all its parameters and the tracker of both."""
    (X, y, components), _ = problem()
    model = network()
    optimizer = make(model.parameters())
    tracker = dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X, components))
    return X, y, model, optimizer, tracker


def closure_of(model, optimizer, X, y):
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), y)
        loss.backward()
        return loss

    return closure


RULES = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov and decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "dampening": {"momentum": 0.5, "dampening": 0.3},
    "maximize": {"maximize": True, "lr": 0.01},
}


@pytest.mark.parametrize("batches", [full, mini])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("bins", [1, 3])
def test_response_of_sgd_moves_shadows_as_its_own_call_does(batches, rule, bins):
    (X, y, components), _ = problem()
    if bins > 1:
        X = X * torch.linspace(0.5, 1.5, D)
    noise = dd.NoiseModel.fit(X, components, bins=bins)
    rule = {"lr": 0.1} | rule
    shadows = []
    for identified in (True, False):
        model = network()
        rest = torch.optim.SGD(rest_of(model), lr=0.1)
        if identified:
            optimizer = torch.optim.SGD([model[0].weight], **rule)
            tracker = dd.decouple(model, optimizer, rest, noise=noise, curvature="stein")
        else:
            optimizer = tracker = dd.DecoupledDescent(
                [model[0].weight], **rule, curvature="stein", head=False
            )
            optimizer.attach(model, noise=noise)
        if identified:
            train(model, [optimizer, rest], batches(X, y, 12))
            assert tracker.response.exact
        else:
            with warnings.catch_warnings():
                # The rest of the model is another optimizer's.
                warnings.simplefilter("ignore", dd.StrainWarning)
                train(model, [optimizer, rest], batches(X, y, 12))
        shadows.append(tracker.shadow.clone())
    found, expected = shadows
    # Weights in single precision: their differences over a step of a hundredth of them are known
    # to 1e-5, and so is what is identified from them.
    assert torch.linalg.vector_norm(found - expected) < 1e-3 * torch.linalg.vector_norm(expected)


def coordinatewise(name):
    return {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
        "NAdam": lambda p: torch.optim.NAdam(p, lr=0.02),
        "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
        "Lion": lambda p: pytest.importorskip("lion_pytorch").Lion(p, lr=0.01),
    }[name]


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "RMSprop", "Lion"])
def test_regression_finds_the_mean_derivative_through_the_whole_history(name):
    """On Gaussian gradients the regression is Stein's lemma; the derivative is that of a twin."""
    # A sign has no derivative but that of its mean: over some hundred coordinates that turn.
    d, k, steps, size = 20_000, 2, 6, 0.05 if name == "Lion" else 1e-6
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(k, d, generator=generator, dtype=torch.float64) for _ in range(steps)]
    pushed = torch.randn(k, d, generator=generator, dtype=torch.float64)
    start = 0.1 * torch.randn(k, d, generator=generator, dtype=torch.float64)

    def path(sign):
        weight = nn.Parameter(start.clone())
        optimizer = coordinatewise(name)([weight])
        found = []
        for step, gradient in enumerate(gradients):
            before = weight.detach().clone()
            states = own(optimizer, weight)
            weight.grad = gradient + sign * size * pushed * (step == 1)
            optimizer.step()
            found.append((before, weight.detach().clone(), states, own(optimizer, weight)))
        return found

    def own(optimizer, weight):
        state = optimizer.state.get(weight, {})
        return {key: v.clone() for key, v in state.items() if v.shape == weight.shape}

    # How the weight moves with the gradient of the second step, by the derivative of the whole.
    ahead, behind, middle = path(1.0), path(-1.0), path(0.0)
    true = [(a[1] - b[1]) / (2 * size) for a, b in zip(ahead, behind, strict=True)]
    true = [(t * pushed).sum(1) / (pushed * pushed).sum(1) for t in true]

    identifier, averages = ResponseIdentifier(), [torch.zeros(k, d, dtype=torch.float64)] * 2
    known = {"weight": torch.zeros(k, dtype=torch.float64)}
    for step, (before, after, states, later) in enumerate(middle):
        averages = [
            rate * average + (1 - rate) * gradients[step]
            for rate, average in zip(AVERAGE_RATES, averages, strict=True)
        ]
        seen = OptimizerStep(
            before,
            after,
            gradients[step],
            identifier.watched(states),
            identifier.watched(later),
            {at: averages[at] for at in identifier.missing_averages},
            None,
        )
        response = identifier.identify(seen)
        known["gradient"] = torch.full((k,), float(step == 1), dtype=torch.float64)
        for position, rate in enumerate(AVERAGE_RATES):
            name_ = average_name(position)
            known[name_] = (
                rate * known.get(name_, 0 * known["gradient"]) + (1 - rate) * known["gradient"]
            )
        moved = {}
        for key, change in response.states.items():
            old = known.get(state_name(key), torch.zeros(k, dtype=torch.float64))
            terms = zip(change.names, change.coefficients, strict=True)
            moved[state_name(key)] = old + sum(known.get(n, 0.0) * c for n, c in terms)
            known[after_step(state_name(key))] = moved[state_name(key)]
        terms = zip(response.weight.names, response.weight.coefficients, strict=True)
        weight = known["weight"] + sum(known.get(n, 0.0) * c for n, c in terms)
        known |= moved | {"weight": weight}
        if step >= 1:
            # Products of means stand for means of products; each of d coordinates adds noise of
            # its own size, and independent gradients leave next to nothing between steps.
            scale = true[1].abs().max()
            assert (known["weight"] - true[step]).abs().max() < 0.15 * scale, (step, known, true)


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.003),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.003),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.001),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.5),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda p: torch.optim.Muon(p, lr=0.02)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("batches", [full, mini])
def test_training_error_is_the_test_error(make, batches):
    n, d = 1600, 400
    (X, y, components), (X_test, y_test, _) = problem(n=n, d=d, size=3.5)
    model = network(d=d, k=8)
    model[1] = nn.GELU()
    optimizer, rest = make([model[0].weight]), torch.optim.SGD(rest_of(model), lr=0.2)
    noise = dd.NoiseModel.fit(X, components)
    tracker = dd.decouple(model, optimizer, rest, noise=noise)
    steps = {"size": 400} if batches is mini else {}
    train(model, [optimizer, rest], batches(X, y, 100, **steps))

    def figures(batch):
        scores = model(batch[0])
        loss = nn.functional.cross_entropy(scores, batch[1])
        return torch.stack([(scores.argmax(1) != batch[1]).float().mean(), loss])

    tracked = tracker.evaluate([(X, y)], figures)
    model.eval()
    with torch.no_grad():
        plain, test = figures((X, y)), figures((X_test, y_test))
    # Far from chance: something was learnt, and of the samples' noise more than of the signal.
    assert test[0] < 0.35
    off, fooled = (tracked - test).abs(), test - plain
    # Three deviations of an error rate on n samples, and what d inputs leave of a concentration.
    assert off[0] < 3 * float(test[0] * (1 - test[0]) / n) ** 0.5 + 1 / d**0.5 / 5
    assert bool((fooled > 2 * off).all())


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("batches", [full, mini])
def test_training_goes_on_from_saved_states_bit_for_bit(make, batches):
    (X, y, components), _ = problem()
    noise = dd.NoiseModel.fit(X, components)
    passes = batches(X, y, 14)

    def build():
        model = network()
        optimizer, rest = make([model[0].weight]), torch.optim.SGD(rest_of(model), lr=0.1)
        return model, [optimizer, rest], dd.decouple(model, optimizer, rest, noise=noise)

    model, optimizers, tracker = build()
    train(model, optimizers, passes[:7])
    states = states_from_file([model, *optimizers, tracker])
    train(model, optimizers, passes[7:])
    again, again_optimizers, again_tracker = build()
    load_all([again, *again_optimizers, again_tracker], states)
    train(again, again_optimizers, passes[7:])
    assert torch.equal(again[0].weight, model[0].weight)
    if batches is full:
        assert torch.equal(again_tracker.shadow, tracker.shadow)
    else:
        # A saved state is up to date, where the unbroken run goes through the same maps later.
        torch.testing.assert_close(again_tracker.shadow, tracker.shadow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        # beta_1 is the rate of the first average, for which the state then stands.
        (lambda p: torch.optim.AdamW(p, lr=0.003), {"average_1", "state.exp_avg"}),
        (
            lambda p: torch.optim.AdamW(p, lr=0.003, betas=(0.8, 0.99)),
            {"average_0", "average_1", "state.exp_avg"},
        ),
        (lambda p: torch.optim.Muon(p, lr=0.02), {"state.momentum_buffer"}),
    ],
    ids=["AdamW", "AdamW-0.8", "Muon"],
)
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_no_more_shadows_are_kept_than_a_response_needs(make, expected, scale):
    """Squares of small gradients are far below a weight's rounding, and no combination for that."""
    (X, y, components), _ = problem()
    model = network()
    optimizer, rest = make([model[0].weight]), torch.optim.SGD(rest_of(model), lr=0.1)
    tracker = dd.decouple(model, optimizer, rest, noise=dd.NoiseModel.fit(X, components))
    for _ in range(6):
        optimizer.zero_grad()
        rest.zero_grad()
        (scale * nn.functional.cross_entropy(model(X), y)).backward()
        optimizer.step()
        rest.step()
    kept = {key for key in tracker.state_dict()["state"] if key.startswith("shadow.")}
    assert kept == {f"shadow.{name}" for name in expected}


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_rules_by_coordinate_answer_to_each_bin_by_itself(name):
    (X, y, components), _ = problem(d=150)
    X[:, :4] *= 3
    noise = dd.NoiseModel.fit(X, components)
    assert noise.leading_directions.shape[1] == 4
    model = network(d=150)
    optimizer = OPTIMIZERS[name]([model[0].weight])
    tracker = dd.decouple(model, optimizer, torch.optim.SGD(rest_of(model), lr=0.1), noise=noise)
    train(model, [optimizer], full(X, y, 3))
    found = tracker.response.weight.by_bin
    if name == "SGD":
        assert found is None
    else:
        width = len(model[0].weight)
        assert found.shape == (len(tracker.response.weight.names), len(noise.eigenvalues), width)
    # Sixteen rows a direction: fewer are not worth their products.
    train(model, [optimizer], mini(X, y, 1, size=40))
    assert tracker.response.weight.by_bin is None


@pytest.mark.parametrize(("d", "across"), [(400, True), (100, False)])
def test_units_that_share_a_factor_answer_to_each_other(d, across):
    """Where ten inputs or more tell each of the k times four columns of the regression."""
    (X, y, components), _ = problem(d=d)
    model = network(d=d, k=8)
    optimizer = OPTIMIZERS["Adafactor"]([model[0].weight])
    noise = dd.NoiseModel.fit(X, components)
    tracker = dd.decouple(model, optimizer, torch.optim.SGD(rest_of(model), lr=0.1), noise=noise)
    train(model, [optimizer], full(X, y, 3))
    assert tracker.response.across_units == across
    assert not tracker.response.exact


@pytest.mark.parametrize("name", ["AdamW", *(["Muon"] if "Muon" in OPTIMIZERS else [])])
def test_noise_of_few_dimensions_is_told_whatever_the_inputs_number(name):
    (X, y, components), _ = problem()
    X[:, :10] *= 30
    noise = dd.NoiseModel.fit(X, components)
    assert noise.effective_rank < 20
    model = network()
    optimizer = OPTIMIZERS[name]([model[0].weight])
    dd.decouple(model, optimizer, torch.optim.SGD(rest_of(model), lr=0.1), noise=noise)
    with pytest.warns(dd.ResponseWarning, match="scale the columns of the inputs alike"):
        train(model, [optimizer], full(X, y, 1))


def test_detached_model_and_optimizer_are_plain_ones():
    (X, y, components), _ = problem()
    models = [network(), network()]
    for model, decoupled in zip(models, (True, False), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if decoupled:
            tracker = dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X, components))
            nn.functional.cross_entropy(model(X), y).backward()
            tracker.detach()
            assert tracker.layer is None
        train(model, [optimizer], full(X, y, 5))
    assert torch.equal(models[0][0].weight, models[1][0].weight)


def test_copy_of_an_optimizer_is_plain():
    X, y, model, optimizer, _ = decoupled(partial(torch.optim.AdamW, lr=0.01))
    train(model, [optimizer], full(X, y, 2))
    other = copy.deepcopy(optimizer)
    assert not other._optimizer_step_pre_hooks


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_clipped_gradients_are_followed(clip):
    (X, y, components), _ = problem()
    noise, shadows = dd.NoiseModel.fit(X, components), []
    for through_hooks in (True, False):
        model = network()
        optimizer = torch.optim.SGD([model[0].weight], lr=0.5)
        rest = torch.optim.SGD(rest_of(model), lr=0.1)
        tracker = dd.decouple(model, optimizer, rest, noise=noise)

        def edit(model=model):
            if clip == "norm":
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            else:
                nn.utils.clip_grad_value_([model[0].weight], 0.01)

        train(model, [optimizer, rest], full(X, y, 5), edit if through_hooks else lambda: None)
        shadows.append(tracker.shadow.clone())
        if through_hooks:
            assert tracker.response.exact == (clip == "norm")
            assert tracker.response.share > 0.5
    # Clipped steps are smaller, and leave smaller imprints.
    assert 0 < shadows[0].norm() < 0.9 * shadows[1].norm()


def test_gradient_changed_otherwise_is_refused():
    X, y, model, optimizer, _ = decoupled(torch.optim.AdamW)
    nn.functional.cross_entropy(model(X), y).backward()
    model[0].weight.grad += 0.1 * torch.randn_like(model[0].weight)
    with pytest.raises(RuntimeError, match="is not the one that the last backward"):
        optimizer.step()


class Averaging(torch.optim.Optimizer):
    """SGD on z, gradients at y, evaluated at the mean x: as Schedule-Free swaps them."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "beta": 0.9, "k": 0, "train": True})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["z"] = p.clone()
                share = 1 / (group["k"] + 1)
                p.lerp_(state["z"], share)
                p.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                state["z"].sub_(p.grad, alpha=group["lr"])

    @torch.no_grad()
    def swap(self, *, train):
        for group in self.param_groups:
            beta = group["beta"]
            for p in group["params"]:
                if group["train"] != train and "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], 1 - beta if train else 1 - 1 / beta)
            group["train"] = train


def test_weights_swapped_outside_of_a_step_are_followed():
    (X, y, components), _ = problem()
    model = network()
    optimizer = Averaging([model[0].weight], lr=0.5)
    tracker = dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X, components))
    train(model, [optimizer], full(X, y, 8))
    assert tracker.response.exact
    left = tracker.shadow.clone()
    z = tracker._state[model[0].weight]["shadow.state.z"].clone()

    def loss(batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    optimizer.swap(train=False)
    tracker.evaluate([(X, y)], loss)
    expected = torch.lerp(left, z, 1 - 1 / 0.9)
    torch.testing.assert_close(tracker.shadow, expected, rtol=1e-3, atol=1e-4)
    optimizer.swap(train=True)
    tracker.evaluate([(X, y)], loss)
    torch.testing.assert_close(tracker.shadow, left, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        model[0].weight.add_(0.1 * torch.randn_like(model[0].weight))
    with pytest.raises(RuntimeError, match="was changed outside step"):
        tracker.evaluate([(X, y)], loss)


def test_closure_is_run_once_and_followed():
    shadows = []
    for with_closure in (True, False):
        X, y, model, optimizer, tracker = decoupled(partial(torch.optim.AdamW, lr=0.01))
        closure = closure_of(model, optimizer, X, y)
        for _ in range(4):
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        shadows.append(tracker.shadow.clone())
    assert torch.equal(*shadows)


class Twice(torch.optim.SGD):
    """Evaluates its closure twice, as a line search does."""

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
            return super().step(closure)


def test_several_evaluations_a_step_are_refused():
    X, y, model, optimizer, _ = decoupled(partial(Twice, lr=0.1))
    with pytest.raises(RuntimeError, match="more than once a step"):
        optimizer.step(closure_of(model, optimizer, X, y))


def test_micro_batches_add_up_to_one_step():
    (X, y, components), _ = problem()
    shadows = []
    for parts in (1, 3):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        noise = dd.NoiseModel.fit(X, components)
        tracker = dd.decouple(model, optimizer, noise=noise)
        for _ in range(4):
            optimizer.zero_grad()
            for rows in torch.arange(N).chunk(parts):
                loss = nn.functional.cross_entropy(model(X[rows]), y[rows])
                (loss * len(rows) / N).backward()
            optimizer.step()
        shadows.append(tracker.shadow.clone())
    # AdamW divides by gradients, which rounding of their sums turns by its share of the smallest.
    torch.testing.assert_close(*shadows, rtol=0.02, atol=1e-3)


def refused(match):
    return pytest.raises((ValueError, TypeError, RuntimeError), match=match)


def test_what_cannot_be_followed_is_refused():
    model = network()
    with refused("LBFGS cannot be followed"):
        dd.decouple(model, torch.optim.LBFGS(model.parameters()))
    with refused("none of the optimizers holds"):
        dd.decouple(model, torch.optim.AdamW(model[2].parameters()))
    with refused("none of the optimizers holds"):
        dd.decouple(model)
    with refused("2 optimizers hold"):
        dd.decouple(model, torch.optim.SGD(model.parameters()), torch.optim.SGD(model.parameters()))
    with refused("expected torch.optim.Optimizer"):
        dd.decouple(model, model.parameters())
    with refused("expected a module"):
        dd.decouple(torch.optim.SGD(model.parameters()))
    with refused("corrects the model by itself"):
        optimizer = dd.DecoupledDescent(model.parameters(), lr=0.1)
        dd.decouple(model, optimizer)
    with refused("differentiable"):
        dd.decouple(model, torch.optim.SGD(model.parameters(), differentiable=True))


def test_optimizer_that_has_moved_is_refused():
    (X, y, components), _ = problem()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, [optimizer], full(X, y, 1))
    dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X, components))
    with refused("has made steps on layer"):
        model(X)


def test_second_step_of_one_forward_is_refused():
    X, y, model, optimizer, _ = decoupled(torch.optim.AdamW)
    nn.functional.cross_entropy(model(X), y).backward()
    optimizer.step()
    with refused("without a training forward"):
        optimizer.step()


class Forgetful(torch.optim.SGD):
    """Throws its momentum away within a step."""

    def step(self, closure=None):
        super().step(closure)
        if self.param_groups[0]["forgets"]:
            for state in self.state.values():
                state.clear()


def test_state_that_vanishes_within_a_step_is_refused():
    X, y, model, optimizer, _ = decoupled(partial(Forgetful, lr=0.1, momentum=0.9))
    group = optimizer.param_groups[0]
    group["forgets"] = False
    train(model, [optimizer], full(X, y, 2))
    group["forgets"] = True
    with refused("has vanished"):
        train(model, [optimizer], full(X, y, 1))


def test_state_of_another_optimizer_is_refused():
    (X, y, components), _ = problem()
    noise, states = dd.NoiseModel.fit(X, components), []
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    tracker = dd.decouple(model, optimizer, noise=noise)
    train(model, [optimizer], full(X, y, 1))
    states = tracker.state_dict()
    tracker.detach()
    other = dd.decouple(model, torch.optim.SGD(model.parameters()), noise=noise)
    with refused("the state is of optimizer 'AdamW'"):
        other.load_state_dict(states)


def test_responses_known_poorly_are_told():
    (X, y, _), _ = problem()
    model = network()
    with pytest.warns(dd.ResponseWarning, match="Rprop is followed coarsely"):
        dd.decouple(model, torch.optim.Rprop(model.parameters()))
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    tracker = dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X))
    with pytest.warns(dd.ResponseWarning, match="found by regression"):
        train(model, [optimizer], full(X, y, 2))
    wrong = tracker.estimate([(X, y)], lambda b: (model(b[0]).argmax(1) != b[1]).float())
    assert any("coarsely" in doubt for doubt in wrong.doubts)


class Unmeasured(torch.optim.RMSprop):
    """An optimizer that nobody has measured."""


def test_regression_of_an_unknown_optimizer_is_told():
    X, y, model, optimizer, _ = decoupled(partial(Unmeasured, lr=0.01))
    with pytest.warns(dd.ResponseWarning, match="not measured"):
        train(model, [optimizer], full(X, y, 1))
