"""State evolution against closed forms, quadrature, and decoupled descent of finite size."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dd
from dd.experiments.models import informed_two_layer, two_layer
from dd.theory.fresh_paths import FreshPaths, Start
from dd.theory.state_evolution import MonteCarlo
from tests.reference import LinearCase, linear_state_evolution

# Of eight simulations: a t variable of seven degrees of freedom exceeds it in 2 cases of 10,000.
FAR = 6.9


def _xor_means(dimension=6, separation=2.0):
    means = torch.zeros(4, dimension, dtype=torch.float64)
    means[0, 0], means[1, 0], means[2, 1], means[3, 1] = 1, -1, 1, -1
    return separation * means


def _xor(dimension=6, separation=2.0, **settings):
    return dd.GaussianMixture(
        _xor_means(dimension, separation), torch.tensor([0, 0, 1, 1]), **settings
    )


def _network(dimension=6, width=3, activation="gelu", scale=0.8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return two_layer(
        dimension, width, 2, activation=activation, hidden_scale=scale, generator=generator
    )


def _square(outputs, targets):
    return (outputs - targets).square().sum(1).mean() / 2


def _linear(weight, head, *, trained):
    model = nn.Sequential(
        nn.Linear(len(weight), weight.shape[1], bias=False),
        nn.Linear(head.shape[1], head.shape[0], bias=False),
    ).double()
    with torch.no_grad():
        model[0].weight.copy_(weight.T)
        model[1].weight.copy_(head)
    model[1].requires_grad_(trained)
    return model


def _agrees(found: MonteCarlo, exact, rounding=1e-9):
    """Whether every number lies within its Monte-Carlo error of the exact one."""
    off = (found.mean - torch.as_tensor(exact)).abs()
    return bool((off <= FAR * found.standard_error + rounding).all())


CASES = {
    "plain": {},
    "damped": {"damping": 0.4},
    "pure": {"damping": 0.0},
    "decay": {"decay": 0.3},
    "trained head": {"trained": True, "decay": 0.1},
    "two bins": {"variances": [2.0, 0.5], "sizes": [3, 5], "trained": True},
}


@pytest.mark.parametrize("name", CASES)
def test_linear_network_follows_the_exact_recursion(name):
    settings = {"damping": 1.0, "decay": 0.0, "trained": False} | CASES[name]
    sizes, variances = settings.pop("sizes", [8]), settings.pop("variances", [1.3])
    generator = torch.Generator().manual_seed(3)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    means, weight, head, targets = draw(3, 8), 0.5 * draw(8, 2), draw(2, 2), draw(3, 2)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    case = LinearCase(
        weights, means.split(sizes, 1), variances, sizes, targets, 1.7, 0.15, **settings
    )
    exact = linear_state_evolution(case, weight.split(sizes), head, 12)

    noise = dd.NoiseModel(torch.tensor(variances, dtype=torch.float64), torch.tensor(sizes))
    found = dd.state_evolution(
        _linear(weight, head, trained=case.trained),
        dd.GaussianMixture(means, targets, noise, weights),
        _square,
        alpha=case.alpha,
        steps=12,
        lr=case.rate,
        weight_decay=case.decay,
        damping=case.damping,
        paths=40_000,
        dtype=torch.float64,
    )
    losses = torch.tensor([limit.loss for limit in exact], dtype=torch.float64)
    # Standard errors that are small themselves, so that to agree means something.
    assert bool((found.loss.standard_error < 0.03 * losses).all())
    assert _agrees(found.loss, losses)
    assert _agrees(found.overlaps, torch.stack([limit.overlaps for limit in exact]))
    assert _agrees(found.covariance, torch.stack([limit.covariance for limit in exact]))
    assert bool(found.error.mean.isnan().all())


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_one_step_of_a_network_follows_quadrature(activation):
    mixture, model = _xor(), _network(width=1, activation=activation)
    with torch.no_grad():
        model[0].weight[0, :2] = torch.tensor([0.7, -0.3])
    alpha, rate = 2.0, 0.6
    found = dd.state_evolution(
        model, mixture, alpha=alpha, steps=1, lr=rate, paths=80_000, dtype=torch.float64
    )

    weight = model[0].weight.detach().double()[0]
    overlap, deviation = mixture.means @ weight, float(weight.norm())
    # A fine grid instead of Gauss-Hermite nodes, which a kink would cost their accuracy.
    nodes = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    shares = torch.exp(-nodes.square() / 2) * (nodes[1] - nodes[0]) / math.sqrt(2 * math.pi)
    rows = (overlap[:, None] + deviation * nodes).requires_grad_()
    head = _network(width=1, activation=activation)[1:].double()
    targets = mixture.targets.repeat_interleave(len(nodes))
    losses = F.cross_entropy(head(rows.reshape(-1, 1)), targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), rows)
    # Stein's lemma, which sees a kink too.
    curvature = float(((gradient * nodes) @ shares).mean()) / deviation
    signal = (gradient @ shares / 4) @ mixture.means
    moved = (1 - rate * curvature) * weight - rate * signal
    noise = rate**2 * float((gradient.square() @ shares).mean()) / alpha

    loss = float((losses.detach().reshape(4, -1) @ shares).mean())
    assert _agrees(MonteCarlo(found.loss.values[:, 0]), loss)
    assert _agrees(MonteCarlo(found.overlaps.values[:, 1, :, 0]), mixture.means @ moved)
    variance = float(moved @ moved) + noise
    assert _agrees(MonteCarlo(found.covariance.values[:, 1, 0, 0]), variance)


def _paths(count=400, width=3, steps=6, bins=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = [4] if bins == 1 else [2, 2]
    variances = torch.tensor([1.0, 0.3][:bins], dtype=torch.float64)
    mixture = dd.GaussianMixture(
        torch.randn(2, 4, generator=generator, dtype=torch.float64),
        torch.tensor([0, 1]),
        dd.NoiseModel(variances, torch.tensor(sizes)),
    )
    start = Start.measured(torch.randn(4, width, generator=generator, dtype=torch.float64), mixture)
    push = torch.tensor([0.7, 0.2][:bins], dtype=torch.float64)
    components = torch.arange(count) % 2
    sizes = {"width": width, "steps": steps, "dtype": dtype, "generator": generator}
    paths = FreshPaths(start, variances, push, components, **sizes)
    return paths, push, components


@pytest.mark.parametrize("bins", [1, 2])
def test_noise_of_the_weights_has_the_inner_products_of_the_gradients(bins):
    paths, push, _ = _paths(bins=bins)
    draw = partial(
        torch.randn, 400, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    first, second = draw(), draw()
    # The third lies in the span of the others, the fourth is the first again.
    gradients = [first, second, first @ torch.ones(3, 3).double() - 2 * second, first]
    none = torch.zeros(2, 3, dtype=torch.float64)
    moves = [paths.gradient(none, g, torch.zeros(3, 3).double()) for g in gradients]
    for left, g in zip(moves, gradients, strict=True):
        for right, h in zip(moves, gradients, strict=True):
            found, wanted = left.T @ right, push.sum() * g.T @ h
            # Innovations of 1e-4 of a gradient are left out.
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    # Nothing new was in the third and fourth.
    assert int((moves[3].abs().sum(1) > 0).sum()) <= 6 * bins


def test_paths_of_single_precision_lose_no_more_than_rounding():
    paths, push, _ = _paths(dtype=torch.float32, count=3000, steps=40)
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(3000, 3, generator=generator)
    # Nearly the same gradient forty times, as along a smooth curve.
    gradients = [base + 0.02 * t * base.sin() + 1e-4 * t**2 * base.cos() for t in range(40)]
    none = torch.zeros(2, 3)
    moves = [paths.gradient(none, g, torch.zeros(3, 3)) for g in gradients]
    wanted = push.sum() * gradients[-1].double().T @ gradients[3].double()
    found = moves[-1].double().T @ moves[3].double()
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-4 * float(wanted.abs().max()))


def test_start_keeps_every_inner_product_of_every_bin():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    means = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    noise = dd.NoiseModel(torch.tensor([2.0, 0.5]), torch.tensor([1, 8]))
    start = Start.measured(weight, dd.GaussianMixture(means, torch.arange(3), noise))
    for variance, columns in ((2.0, slice(0, 1)), (0.5, slice(1, 9))):
        rows = start.variance == variance
        torch.testing.assert_close(
            start.weight[rows].T @ start.weight[rows], weight[columns].T @ weight[columns]
        )
        torch.testing.assert_close(
            start.means[:, rows] @ start.weight[rows], means[:, columns] @ weight[columns]
        )


def test_only_inner_products_of_weights_and_means_matter():
    model, mixture = _network(dimension=40), _xor(dimension=40)
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q
    turned = _network(dimension=40)
    with torch.no_grad():
        turned[0].weight.copy_(turned[0].weight.double() @ turn)
    moved = dd.GaussianMixture(mixture.means @ turn, mixture.targets)
    run = partial(dd.state_evolution, alpha=2, steps=8, lr=0.4, paths=16_000)
    first, second = run(model, mixture), run(turned, moved, seed=1)
    apart = (first.loss.mean - second.loss.mean).abs()
    error = first.loss.standard_error.square() + second.loss.standard_error.square()
    # t of at least 7 degrees of freedom.
    assert bool((apart <= FAR * error.sqrt()).all())
    assert float(first.loss.standard_error.max()) < 0.01


def test_standard_error_falls_with_the_root_of_the_paths():
    run = partial(dd.state_evolution, _network(), _xor(), alpha=2, steps=3, lr=0.4, replicates=40)
    few, many = run(paths=4_000), run(paths=64_000)
    ratio = few.loss.standard_error / many.loss.standard_error
    # Each is known up to 1/√(2·39), the ratio up to 0.16 of its expected 4.
    assert bool(((ratio - 4).abs() < 4 * 4 * 0.16).all())


def test_a_law_of_initial_weights_is_averaged_over():
    drawn = []

    def draw(generator):
        drawn.append(two_layer(6, 3, 2, hidden_scale=2.0, generator=generator))
        return drawn[-1]

    found = dd.state_evolution(draw, _xor(), alpha=2, steps=1, lr=0.1, paths=8_000, replicates=5)
    assert len({float(model[0].weight.detach().sum()) for model in drawn}) == 5
    spread = found.loss.values[:, 0].std()
    assert float(spread) > 5 * float(
        dd.state_evolution(drawn[0], _xor(), alpha=2, steps=1, lr=0.1, paths=8_000, replicates=5)
        .loss.values[:, 0]
        .std()
    )


def test_results_repeat_and_leave_model_and_global_generator_alone():
    model = _network()
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    run = partial(dd.state_evolution, model, _xor(), alpha=2, steps=3, lr=0.4, paths=800)
    first = run()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, before, model.parameters()))
    assert torch.equal(first.loss.values, run().loss.values)
    assert not torch.equal(first.loss.values, run(seed=1).loss.values)


def test_results_print_in_a_line():
    found = dd.state_evolution(_network(), _xor(), alpha=2, steps=2, lr=0.4, paths=800)
    assert f"loss {float(found.loss.mean[0]):.4f} to " in repr(found)
    assert "steps 0 to 2" in repr(found)
    assert repr(found.overlaps).startswith("MonteCarlo(8 simulations of shape (3, 4, 3)")


def test_schedule_and_recorded_steps():
    model, mixture = _network(), _xor()
    run = partial(dd.state_evolution, model, mixture, alpha=2, paths=800)
    still = run(steps=7, lr=lambda step: 0.4 if step < 3 else 0.0, record_every=3)
    assert still.steps.tolist() == [0, 3, 6, 7]
    three = run(steps=3, lr=0.4)
    # Draws are made one gradient after the other, so that the first steps are the same.
    torch.testing.assert_close(still.loss.values[:, 1], three.loss.values[:, 3])
    torch.testing.assert_close(still.loss.values[:, 3], still.loss.values[:, 2])
    assert still.overlaps.mean.shape == (4, 4, 3)
    assert still.covariance.mean.shape == (4, 3, 3)


@pytest.mark.parametrize(
    "rule", [{"momentum": 0.8, "nesterov": True}, {"momentum": 0.8, "dampening": 0.4}]
)
def test_momentum_without_noise_is_the_population_gradient(rule):
    """At α → ∞ nothing but the population gradient is left, and SGD on many samples follows it."""
    model, mixture = _network(), _xor()
    settings = {"weight_decay": 0.05} | rule
    found = dd.state_evolution(
        model, mixture, alpha=1e9, steps=12, lr=0.3, paths=80_000, **settings
    )
    inputs, targets, _ = mixture.sample(100_000, torch.Generator().manual_seed(7))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, **settings)
    losses = []
    for _ in range(13):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    off = (found.loss.mean - torch.tensor(losses, dtype=torch.float64)).abs()
    # The samples' own error is that of paths, of which there are about as many.
    assert bool((off <= FAR * 1.5 * found.loss.standard_error).all())


def test_user_defined_error_and_float_targets():
    mixture = dd.GaussianMixture(_xor_means(), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    model = two_layer(6, 3, 1, generator=torch.Generator().manual_seed(1))
    run = partial(dd.state_evolution, model, mixture, alpha=2, steps=2, lr=0.4, paths=8_000)

    def loss(outputs, targets):
        return F.binary_cross_entropy_with_logits(outputs[:, 0], targets)

    assert bool(run(loss).error.mean.isnan().all())
    found = run(loss, error=lambda outputs, targets: (outputs[:, 0] > 0) != (targets > 0.5))
    assert 0.2 < float(found.error.mean[0]) < 0.8


class _Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.skip = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, inputs):
        return self.first(inputs) + self.skip(inputs)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"alpha": 0}, "alpha = n/d must be positive"),
        ({"alpha": math.nan}, "alpha must be a number, finite"),
        ({"lr": -0.1}, "lr at step 0 must be a number, finite and not negative"),
        ({"lr": lambda step: math.inf}, "lr at step 0 must be a number"),
        ({"damping": 1.5}, r"damping must lie in \[0, 1\], got 1.5"),
        ({"paths": 10}, "paths must be an integer of at least 64"),
        ({"replicates": 0}, "replicates must be a positive integer"),
        ({"record_every": 0}, "record_every must be a positive integer"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"dtype": torch.float16}, "dtype must be torch.float32 or torch.float64"),
        ({"momentum": -1.0}, "Invalid momentum value"),
        ({"damping": "half"}, "damping must be a number"),
        ({"model": two_layer(5, 2, 2)}, "takes 5 inputs, but the mixture's means have 6"),
        ({"model": nn.Sequential(nn.ReLU(), *_network())}, "something before the decoupled layer"),
        ({"model": nn.Sequential(*_network(), nn.Dropout(0.5))}, "drawn anew at every forward"),
        ({"model": nn.utils.parametrizations.weight_norm(_network()[0])}, "of its own"),
        ({"loss": partial(F.cross_entropy, reduction="sum")}, "must be the mean over samples"),
        ({"loss": partial(F.cross_entropy, reduction="none")}, "expected a loss of one number"),
        ({"loss": lambda outputs, targets: 1.0}, "expected a loss of one number"),
        ({"error": lambda outputs, targets: torch.ones(1)}, "a number for each of"),
        ({"model": _Skip(), "layer": "first"}, "uses its inputs beside the decoupled layer"),
    ],
)
def test_bad_arguments_are_refused(settings, words):
    arguments = {"model": _network(), "alpha": 2, "steps": 2, "lr": 0.1} | settings
    arguments.setdefault("loss", F.cross_entropy)
    with pytest.raises(ValueError, match=words):
        dd.state_evolution(arguments.pop("model"), _xor(), arguments.pop("loss"), **arguments)


class _Tied(nn.Module):
    def __init__(self, *, twice):
        super().__init__()
        self.first, self.twice = nn.Linear(6, 6, bias=False), twice

    def forward(self, inputs):
        rows = self.first(inputs)
        return rows + self.first(inputs) if self.twice else rows.tanh() @ self.first.weight


@pytest.mark.parametrize(("twice", "words"), [(True, "ran 2 times"), (False, "beside its layer")])
def test_a_weight_with_two_uses_is_refused(twice, words):
    with pytest.raises(ValueError, match=words):
        dd.state_evolution(_Tied(twice=twice), _xor(), alpha=2, steps=1, lr=0.1, paths=800)


def test_class_weights_are_refused():
    weights = torch.tensor([1.0, 9.0])
    loss = partial(F.cross_entropy, weight=weights)
    with pytest.raises(ValueError, match="no class weights"):
        dd.state_evolution(_network(), _xor(), loss, alpha=2, steps=1, lr=0.1, paths=800)


@pytest.mark.parametrize(
    ("model", "mixture", "words"),
    [(None, _xor(), "expected a module or"), (_network(), (1, 2), r"expected a dd\.GaussianMix")],
)
def test_other_kinds_are_refused(model, mixture, words):
    with pytest.raises(TypeError, match=words):
        dd.state_evolution(model, mixture, alpha=2, steps=1, lr=0.1)
    with pytest.raises(TypeError, match="expected targets in a tensor"):
        dd.GaussianMixture(_xor_means(), [0, 0, 1, 1])


def test_what_a_caller_may_do_changes_nothing():
    run = partial(dd.state_evolution, mixture=_xor(), alpha=2, steps=3, lr=0.4, paths=800)
    wanted = run(_network()).loss.values
    used = _network()
    F.cross_entropy(used(torch.randn(5, 6)), torch.zeros(5, dtype=torch.long)).backward()
    assert torch.equal(run(used).loss.values, wanted)
    assert torch.equal(run(lambda generator: used).loss.values, wanted)
    attached = _network()
    dd.DecoupledDescent(attached, lr=0.1)
    assert torch.equal(run(attached).loss.values, wanted)
    with torch.no_grad():
        assert torch.equal(run(_network()).loss.values, wanted)
    in_place = _network(activation="relu")
    in_place[0].bias = None
    in_place[1].inplace = True
    other = _network(activation="relu")
    other[0].bias = None
    assert torch.equal(run(in_place).loss.values, run(other).loss.values)


def test_damping_needs_isotropic_noise():
    noise = dd.NoiseModel(torch.tensor([2.0, 1.0]), torch.tensor([2, 4]))
    with pytest.raises(ValueError, match=r"damping=0\.5 is defined for isotropic"):
        dd.state_evolution(_network(), _xor(noise=noise), alpha=2, steps=1, lr=0.1, damping=0.5)


def test_divergence_says_the_step_and_the_cause():
    model = nn.Sequential(nn.Linear(6, 2))
    mixture = dd.GaussianMixture(_xor_means(), torch.randn(4, 2))
    with pytest.raises(FloatingPointError, match=r"not finite at step \d+.*learning rate"):
        dd.state_evolution(model, mixture, _square, alpha=2, steps=200, lr=50.0, paths=800)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"means": torch.zeros(3)}, "expected means of shape"),
        ({"means": torch.full((4, 6), math.nan)}, "means must be finite"),
        ({"targets": torch.tensor([0, 1])}, "a target for each of 4 components"),
        ({"weights": torch.tensor([0.5, 0.5, 0.5, -0.5])}, "4 positive weights of sum 1"),
        ({"weights": torch.ones(4)}, "4 positive weights of sum 1"),
        ({"noise": -1.0}, "noise must be a number"),
        (
            {"noise": dd.NoiseModel(torch.ones(1), torch.tensor([5]))},
            "has 5 dimensions, the means 6",
        ),
        (
            {
                "noise": dd.NoiseModel(
                    torch.ones(1), torch.tensor([6]), relative_mass=torch.ones(10)
                )
            },
            "per_sample=False",
        ),
        (
            {
                "noise": dd.NoiseModel(
                    torch.ones(1), torch.tensor([4]), mean_directions=torch.eye(6)[:, :2]
                )
            },
            "separate_means=False",
        ),
    ],
)
def test_bad_mixtures_are_refused(settings, words):
    arguments = {"means": _xor_means(), "targets": torch.tensor([0, 0, 1, 1])} | settings
    with pytest.raises(ValueError, match=words):
        dd.GaussianMixture(**arguments)


def test_samples_of_a_mixture_have_its_moments():
    noise = dd.NoiseModel(torch.tensor([4.0, 0.25]), torch.tensor([2, 4]))
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1])
    mixture = _xor(noise=noise, weights=weights)
    inputs, targets, components = mixture.sample(40_000, torch.Generator().manual_seed(0))
    assert torch.equal(targets, mixture.targets[components])
    shares = components.bincount() / 40_000
    # Five standard deviations, of a share and of a sample variance.
    assert bool(((shares - weights).abs() < 5 * (weights / 40_000).sqrt()).all())
    around = inputs - mixture.means.float()[components]
    variance = around.square().mean(0)
    wanted = torch.tensor([4.0, 4.0, 0.25, 0.25, 0.25, 0.25])
    assert bool(((variance / wanted - 1).abs() < 5 * (2 / 40_000) ** 0.5).all())


def _finite(dimension, seed, *, damping, momentum, steps, start, separation=2.5, alpha=4):
    """Test loss and error of decoupled descent after these steps."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(dimension, 2, generator=generator)).Q.T
    axes = torch.stack([axes[0], -axes[0], axes[1], -axes[1]])
    mixture = dd.GaussianMixture(separation * axes, torch.tensor([0, 0, 1, 1]))
    model = two_layer(dimension, 8, 2, hidden_scale=0.5, generator=generator)
    with torch.no_grad():
        weight = model[0].weight
        weight += (start["overlaps"] - weight @ axes[::2].T) @ axes[::2]
    model[2].load_state_dict(start["head"])
    inputs, targets, components = mixture.sample(alpha * dimension, generator)
    optimizer = dd.DecoupledDescent(
        model,
        lr=0.25,
        momentum=momentum,
        damping=damping,
        noise=dd.NoiseModel.isotropic(inputs, components),
    )
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    fresh, wanted, _ = mixture.sample(10_000, generator)
    with torch.no_grad():
        scores = model.eval()(fresh)
    return float(F.cross_entropy(scores, wanted)), float(
        (scores.argmax(1) != wanted).double().mean()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damping", "momentum", "steps"),
    [(1.0, 0.0, 60), (0.0, 0.0, 60), (0.5, 0.0, 60), (1.0, 0.8, 20)],
)
def test_decoupled_descent_of_finite_size_comes_near_the_prediction(damping, momentum, steps):
    generator = torch.Generator().manual_seed(1)
    start = {
        "overlaps": 0.2 * torch.randn(8, 2, generator=generator),
        "head": two_layer(10, 8, 2, generator=generator)[2].state_dict(),
    }
    # Coordinates in which the inner products are those of the limit d → ∞.
    model = two_layer(10, 8, 2, generator=generator)
    with torch.no_grad():
        model[0].weight.copy_(torch.cat([start["overlaps"], 0.5 * torch.eye(8)], 1))
    model[2].load_state_dict(start["head"])
    mixture = _xor(dimension=10, separation=2.5)
    predicted = dd.state_evolution(
        model,
        mixture,
        alpha=4,
        steps=steps,
        lr=0.25,
        momentum=momentum,
        damping=damping,
        paths=40_000,
        record_every=steps,
    )
    for dimension, seeds in ((500, 12), (1000, 8), (2000, 6)):
        found = torch.tensor(
            [
                _finite(dimension, s, damping=damping, momentum=momentum, steps=steps, start=start)
                for s in range(seeds)
            ],
            dtype=torch.float64,
        )
        spread = MonteCarlo(found)
        for column, curve in enumerate((predicted.loss, predicted.error)):
            off = abs(float(spread.mean[column] - curve.mean[-1]))
            known = math.hypot(spread.standard_error[column], curve.standard_error[-1])
            # t of 5 degrees of freedom at least: what finite size adds is below these errors.
            assert off < FAR * known, (dimension, column, off, known)
        # The two sources of error are small enough to see a wrong recursion.
        assert float(spread.standard_error[1]) < 0.006


LAWS = {
    "bins": (
        dd.NoiseModel(torch.tensor([2.2, 0.4]), torch.tensor([200, 400])),
        {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.02},
    ),
    "noisier": (1.4, {"momentum": 0.6, "nesterov": True, "weight_decay": 0.02, "damping": 0.5}),
    "quieter": (0.6, {"damping": 0.0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_other_laws_and_rules_are_those_of_finite_size(law):
    noise, rule = LAWS[law]
    dimension, alpha, steps = 600, 2.5, 30
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, dimension, generator=generator) * 2.2 / math.sqrt(dimension)
    means[:, :200] *= 1.5
    weights = torch.tensor([0.5, 0.2, 0.2, 0.1])
    mixture = dd.GaussianMixture(means, torch.tensor([0, 1, 2, 0]), noise, weights)
    model = informed_two_layer(
        dimension, 4, 3, mixture=mixture, overlap=0.5, hidden_scale=0.5, generator=generator
    )
    nn.init.constant_(model[0].bias, 0.1)

    def rate(step):
        return 0.3 * (1 - step / 40)

    predicted = dd.state_evolution(
        model, mixture, alpha=alpha, steps=steps, lr=rate, paths=40_000, record_every=10, **rule
    )
    found = []
    for _ in range(8):
        inputs, targets, components = mixture.sample(int(alpha * dimension), generator)
        fresh, wanted, _ = mixture.sample(6000, generator)
        twin = copy.deepcopy(model)
        known = dd.NoiseModel(
            mixture.eigenvalues.float(), torch.tensor(mixture.multiplicities), components
        )
        optimizer = dd.DecoupledDescent(twin, lr=0.3, noise=known, **rule)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate(step)
            optimizer.zero_grad()
            F.cross_entropy(twin(inputs), targets).backward()
            optimizer.step()
        with torch.no_grad():
            found.append(float(F.cross_entropy(twin.eval()(fresh), wanted)))
    spread = MonteCarlo(torch.tensor(found, dtype=torch.float64))
    off = abs(float(spread.mean - predicted.loss.mean[-1]))
    known_error = math.hypot(spread.standard_error, predicted.loss.standard_error[-1])
    # t of seven degrees of freedom; what finite size adds is below these errors.
    assert off < FAR * known_error, (off, known_error)
    assert known_error < 0.02


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_simulations_on_cuda_agree_with_those_on_the_cpu():
    run = partial(dd.state_evolution, _network(), _xor(), alpha=2, steps=20, lr=0.4)
    here, there = run(device="cpu"), run(device="cuda")
    error = here.loss.standard_error.square() + there.loss.standard_error.square()
    assert bool(((here.loss.mean - there.loss.mean).abs() <= FAR * error.sqrt()).all())
