"""The fitted noise model: spectra of known truth, refusals, and its way into the optimizer."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dd
from dd.noise import NoiseModel
from dd.nonnegative import nonnegative_least_squares
from dd.spectrum import population_eigenvalues, sample_eigenvalues

D = 300


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal entries in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def spectrum(name: str) -> Tensor:
    """A known spectrum of unit mean, shape (D,)."""
    values = torch.ones(D, dtype=torch.float64)
    if name == "spikes":
        values[:6] = torch.logspace(math.log10(30), math.log10(3), 6, dtype=torch.float64)
    elif name == "levels":
        values[D // 2 :] = 0.05
    elif name == "power":
        values = 1 / torch.arange(1, D + 1, dtype=torch.float64)
    return values / values.mean()


def decayed_trace(
    eigenvalues: Tensor, times: Tensor, multiplicities: Tensor | float = 1.0
) -> Tensor:
    """Traces tr Σ exp(−tΣ), shape (len(times),)."""
    return (multiplicities * eigenvalues * torch.exp(-times[:, None] * eigenvalues)).sum(1)


@pytest.mark.parametrize("name", ["flat", "spikes", "levels", "power"])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_known_spectra_are_recovered(name, ratio):
    n, truth = int(ratio * D), spectrum(name)
    sample = normal(0, n, D) * truth.sqrt()
    estimate = population_eigenvalues(sample_eigenvalues(sample, n), D, n)
    assert estimate.shape == (D,)
    assert bool((estimate >= 0).all())
    assert bool((estimate.diff() <= 1e-12).all())
    # The trace has relative deviation sqrt(2 tr Σ² / n) / tr Σ, and so has, at order one of t, any
    # smooth linear statistic. The inversion carries it on by the factor 1/(1 − df/m) at most, with
    # df the degrees of freedom that a ridge 1/t leaves.
    times = torch.tensor([0.03, 0.3, 1.0], dtype=torch.float64)
    deviation = math.sqrt(2 * float(truth.square().sum()) / n) / D
    freedom = (times[:, None] * truth / (1 + times[:, None] * truth)).sum(1) / n
    tolerance = 4 * deviation / (1 - freedom).clamp_min(0.1)
    error = (decayed_trace(estimate, times) / decayed_trace(truth, times) - 1).abs()
    assert bool((error < tolerance).all()), (error, tolerance)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_bins_reproduce_the_decay_and_the_trace(ratio):
    n, truth = int(ratio * D), spectrum("power")
    ids = torch.arange(n) % 3
    sample = normal(1, n, D) * truth.sqrt() + 5.0 * ids[:, None]
    model = NoiseModel.fit(sample, ids)
    assert model.dimension == D
    assert len(model.eigenvalues) <= 12
    assert model.relative_mass is None
    single = NoiseModel.isotropic(sample, ids)
    assert float(model.mass.sum()) == pytest.approx(float(single.mass.sum()), rel=1e-10)
    # Geometric bins of ratio q = d^(1/11) replace 1/rank by its mean over the bin: a relative
    # spread of (q − 1)/(2√3) within a bin, whose square enters the decay; twice for its curvature.
    q = D ** (1 / 11)
    times = torch.tensor([0.03, 0.3, 1.0], dtype=torch.float64)
    deviation = math.sqrt(2 * float(truth.square().sum()) / n) / D
    freedom = (times[:, None] * truth / (1 + times[:, None] * truth)).sum(1) / n
    tolerance = 4 * deviation / (1 - freedom).clamp_min(0.1) + 2 * (q - 1) ** 2 / 12
    binned = decayed_trace(model.eigenvalues, times, model.multiplicities)
    error = (binned / decayed_trace(truth, times) - 1).abs()
    assert bool((error < tolerance).all()), (error, tolerance)


def test_one_bin_is_the_isotropic_model():
    ids = torch.arange(90) % 4
    for n, d in ((90, 20), (90, 400)):
        sample = normal(2, n, d) + ids[:n, None]
        single, fitted = NoiseModel.isotropic(sample, ids), NoiseModel.fit(sample, ids, bins=1)
        torch.testing.assert_close(fitted.eigenvalues, single.eigenvalues)
        assert torch.equal(fitted.multiplicities, single.multiplicities)
        assert torch.equal(fitted.components, single.components)
        assert fitted.relative_mass is None


def test_gram_of_either_side_gives_the_same_eigenvalues():
    sample = normal(3, 40, 2500)
    dense = torch.linalg.eigvalsh(sample.mT @ sample / 37).flip(0)[:37]
    torch.testing.assert_close(sample_eigenvalues(sample, 37), dense)
    tall = normal(3, 2500, 40)
    dense = torch.linalg.eigvalsh(tall.mT @ tall / 2499).flip(0)
    torch.testing.assert_close(sample_eigenvalues(tall, 2499), dense)


def test_arrays_float32_and_dead_inputs():
    sample = normal(4, 200, 30)
    sample[:, 20:] = 1.0
    model = NoiseModel.fit(sample.float().numpy(), np.arange(200) % 2, bins=5)
    assert model.eigenvalues.dtype == torch.float32
    assert model.dimension == 30
    expected = NoiseModel.fit(sample, torch.arange(200) % 2, bins=5).eigenvalues
    torch.testing.assert_close(model.eigenvalues.double(), expected, rtol=1e-3, atol=1e-3)
    # Ten dimensions without noise: a third of the ranks carries next to nothing.
    ranks = torch.repeat_interleave(expected, model.multiplicities)
    assert float(NoiseModel.fit(sample, bins=30).eigenvalues[-1]) < 0.1 * float(ranks[0])


def test_sample_norms_are_used_where_they_vary_beyond_chance():
    n, d = 400, 100
    gaussian = normal(5, n, d)
    scale = torch.where(torch.arange(n) % 2 == 0, 0.5, 1.5).double()
    ids = torch.arange(n) // 2 % 2
    assert NoiseModel.fit(gaussian, ids).relative_mass is None
    assert NoiseModel.fit(gaussian * scale[:, None]).relative_mass is None
    model = NoiseModel.fit(gaussian * scale.sqrt()[:, None], ids)
    assert model.num_samples == n
    # ‖z_i‖² is chi-squared with d degrees of freedom, relative deviation sqrt(2/d); its mean over n
    # samples adds little; five deviations for the largest of 400.
    assert float((model.relative_mass / scale - 1).abs().max()) < 5 * math.sqrt(2 / d)
    assert NoiseModel.fit(gaussian * scale[:, None], per_sample=False).relative_mass is None
    assert NoiseModel.fit(gaussian, per_sample=True).relative_mass is not None
    moved = model.to(torch.device("cpu"), torch.float32)
    assert moved.relative_mass.dtype == torch.float32


@pytest.mark.parametrize("bins", [0, -1, 2.0, True, "12"])
def test_bins_must_be_a_positive_integer(bins):
    with pytest.raises(ValueError, match="bins must be a positive integer"):
        NoiseModel.fit(normal(6, 20, 5), bins=bins)


@pytest.mark.parametrize(
    ("inputs", "components", "message"),
    [
        (torch.randn(10), None, "flatten each sample to one row"),
        (torch.full((10, 2), math.nan), None, "clean them"),
        (torch.randn(10, 2), torch.zeros(9, dtype=torch.long), "expected 10 integer component ids"),
        (torch.randn(10, 2), torch.arange(10), "more samples or fewer components"),
        (torch.ones(10, 2), None, "needs noisy inputs"),
    ],
)
def test_fit_refuses_with_a_remedy(inputs, components, message):
    with pytest.raises(ValueError, match=message):
        NoiseModel.fit(inputs, components)


@pytest.mark.parametrize(
    ("relative", "message"),
    [
        (torch.ones(3), r"shape \(n,\), got \(3,\) for 2 component ids"),
        (torch.ones(2, 1), r"shape \(n,\)"),
        (torch.tensor([1.0, -1.0]), "not negative"),
        (torch.tensor([1.0, math.nan]), "must be finite"),
    ],
)
def test_relative_mass_is_checked(relative, message):
    with pytest.raises(ValueError, match=message):
        NoiseModel(torch.ones(1), torch.tensor([4]), torch.arange(2), relative)


def test_nonnegative_least_squares_satisfies_the_optimality_conditions():
    for seed in range(20):
        matrix, target = normal(seed, 30, 12).numpy(), normal(100 + seed, 30).numpy()
        x = nonnegative_least_squares(matrix, target)
        pull = matrix.T @ (target - matrix @ x)
        assert (x >= 0).all()
        assert (x > 0).any()
        np.testing.assert_allclose(pull[x > 0], 0, atol=1e-10)
        assert (pull[x == 0] < 1e-10).all()


def test_optimizer_moves_one_shadow_a_bin_with_every_sample_s_mass():
    n, d, k = 60, 25, 3
    inputs, targets = normal(8, n, d), torch.arange(n) % 2
    scale = 0.5 + torch.arange(n).double() / n
    model = nn.Sequential(nn.Linear(d, k), nn.Tanh(), nn.Linear(k, 2)).double()
    noise = NoiseModel.fit(inputs * scale[:, None], targets, bins=4, per_sample=True)
    optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise)
    captured = []
    handle = model[1].register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    loss = nn.functional.cross_entropy(model(inputs), targets)
    captured[0].retain_grad()
    loss.backward()
    gradient = captured[0].grad
    optimizer.step()
    handle.remove()
    # From Q = 0 the first step is Q_{b,i} = η τ_b r_i g_i.
    expected = 0.3 * noise.mass[:, None, None] * (noise.relative_mass[:, None] * gradient)
    torch.testing.assert_close(optimizer.shadow, expected)


def test_a_batch_of_another_size_than_the_masses_is_refused():
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    noise = NoiseModel.fit(normal(9, 30, 5), torch.arange(30) % 2, per_sample=True)
    optimizer = dd.DecoupledDescent(model, noise=noise)
    assert optimizer.noise is noise
    with pytest.raises(ValueError, match="expects the whole training set of 30 samples"):
        model(normal(9, 29, 5))


@pytest.mark.parametrize("curvature", ["auto", "probe", "exact"])
def test_masses_of_samples_are_refused_without_steins_curvature(curvature):
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    noise = NoiseModel.fit(normal(9, 30, 5), per_sample=True)
    with pytest.raises(ValueError, match=r"needs Stein's curvature.*fit\(per_sample=False\)"):
        dd.DecoupledDescent(model, noise=noise, curvature=curvature)


def test_mass_of_a_sample_does_not_depend_on_the_size_of_its_component():
    """Means over 100 classes of 2: ‖z‖²/d has spread √(2/d), and half that many free samples."""
    components = torch.cat(
        [torch.zeros(500), 1 + torch.arange(100).repeat(2), 101 + torch.zeros(1)]
    )
    noise = NoiseModel.fit(normal(4, 701, 50), components.long(), per_sample=True)
    pairs = noise.relative_mass[500:700].mean()
    assert abs(pairs - 1) < 4 * (2 / 50 / 100) ** 0.5
    assert noise.relative_mass[-1] == 1
