"""The fitted noise model: spectra of known truth, refusals, and its way into the optimizer."""

import dataclasses
import math
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dd
from dd.noise.model import NoiseModel
from dd.noise.spectrum import population_eigenvalues, sample_eigenvalues
from dd.support.nonnegative import nonnegative_least_squares

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


class Alive(TorchDispatchMode):
    """Most bytes that tensors made within were alive at once."""

    def __init__(self, given):
        super().__init__()
        self.most, self._sizes = 0, {given.untyped_storage().data_ptr(): 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage):
        pointer = storage.data_ptr()
        if pointer not in self._sizes and len(storage):
            self._sizes[pointer] = len(storage)
            weakref.finalize(storage, self._sizes.pop, pointer, None)
            self.most = max(self.most, sum(self._sizes.values()))


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
    times = torch.tensor([0.03, 0.3, 1.0], dtype=torch.float64)
    deviation = math.sqrt(2 * float(truth.square().sum()) / n) / D
    freedom = (times[:, None] * truth / (1 + times[:, None] * truth)).sum(1) / n
    # The bins' own error is half a per cent in the mean over times, and grows with them.
    tolerance = 4 * deviation / (1 - freedom).clamp_min(0.1) + 0.005
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


@pytest.mark.parametrize(("n", "d"), [(4000, 60), (400, 600)])
@pytest.mark.parametrize("apart", [None, True])
def test_leading_directions_are_those_of_the_largest_noise(n, d, apart):
    generator = torch.Generator().manual_seed(0)
    turned = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    noise = torch.randn(n, d, generator=generator)
    noise[:, :5] *= 20
    ids = torch.arange(n) % 2
    sample = noise @ turned.mT + 3 * turned[:, [30, 31]].mT[ids]
    model = NoiseModel.fit(sample, ids, separate_means=apart)
    found = model.leading_directions.double()
    assert found.shape == (d, 5)
    centred = torch.empty(n, d, dtype=torch.float64)
    for one in range(2):
        centred[ids == one] = (sample[ids == one] - sample[ids == one].mean(0)).double()
    if apart:
        along = model.mean_directions.double()
        centred -= centred @ along @ along.mT
    expected = torch.linalg.eigh(centred.mT @ centred)[1][:, -5:]
    # The span in single precision; no more is told by eigenvalues that are nearly equal.
    torch.testing.assert_close(found @ found.mT, expected @ expected.mT, atol=1e-4, rtol=0.0)


def test_leading_directions_are_kept_where_a_response_may_need_them():
    sample, ids = normal(5, 400, 40), torch.arange(400) % 2
    assert NoiseModel.fit(sample, ids).leading_directions is None
    sample[:, :3] *= 10
    assert NoiseModel.fit(sample).leading_directions is None
    model = NoiseModel.fit(sample, ids)
    assert model.leading_directions.shape == (40, 3)
    assert model.in_one_bin().leading_directions is None
    with pytest.raises(ValueError, match=r"expected leading_directions of shape \(40, r\), got"):
        dataclasses.replace(model, leading_directions=torch.eye(3))


def test_arrays_float32_and_dead_inputs():
    sample = normal(4, 200, 30)
    sample[:, 20:] = 1.0
    model = NoiseModel.fit(sample.float().numpy(), np.arange(200) % 2, bins=5)
    assert model.eigenvalues.dtype == torch.float32
    assert model.dimension == 30
    expected = NoiseModel.fit(sample, torch.arange(200) % 2, bins=5).eigenvalues
    torch.testing.assert_close(model.eigenvalues.double(), expected, rtol=1e-3, atol=1e-3)
    # Ten dimensions of thirty have no noise, and a bin of their own.
    assert float(expected[-1]) < 0.01 * float(expected[0])
    assert float(model.multiplicities[-1]) == pytest.approx(10, abs=1)


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
    optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise, head=False)
    captured = []
    handle = model[1].register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    loss = nn.functional.cross_entropy(model(inputs * scale[:, None]), targets)
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
    optimizer = dd.DecoupledDescent(model, noise=noise, head=False)
    assert optimizer.noise is noise
    with pytest.raises(ValueError, match=r"fitted on 30 inputs, and 4 of the 29 "):
        model(normal(9, 29, 5))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_every_second_derivative_is_weighed_by_the_masses_of_the_samples():
    """With one unit a probe is exact, so that all estimators agree to rounding."""
    n, d = 40, 12
    ids = torch.arange(n) % 2
    inputs = normal(9, n, d) * (0.5 + torch.arange(n) / n).double()[:, None]
    noise = NoiseModel.fit(inputs, ids, per_sample=True, bins=3)
    shadows = {}
    for curvature in ("exact", "probe", "probe_create_graph", "unweighted"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(d, 1), nn.Tanh(), nn.Linear(1, 2)).double()
        name = "exact" if curvature == "unweighted" else curvature
        optimizer = dd.DecoupledDescent(model, lr=2.0, noise=noise, curvature=name)
        if curvature == "unweighted":
            optimizer._attachment.estimator.relative_mass = None
        for _ in range(4):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), ids)
            loss.backward(create_graph=optimizer.needs_graph)
            optimizer.step()
        shadows[curvature] = optimizer.shadow
    for curvature in ("probe", "probe_create_graph"):
        torch.testing.assert_close(shadows[curvature], shadows["exact"], rtol=1e-9, atol=1e-12)
    assert float((shadows["unweighted"] - shadows["exact"]).abs().max()) > 1e-4


# --- The number of bins, the line that describes a model, and memory ---------------------------


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(5))
def test_flat_spectra_get_one_bin_and_steep_ones_twelve(ratio, seed):
    n = int(ratio * D)
    flat = NoiseModel.fit(normal(seed, n, D))
    assert flat.multiplicities.tolist() == [float(D)]
    torch.testing.assert_close(
        flat.eigenvalues, NoiseModel.isotropic(normal(seed, n, D)).eigenvalues
    )
    for name in ("spikes", "levels", "power"):
        steep = NoiseModel.fit(normal(seed, n, D) * spectrum(name).sqrt())
        assert 2 <= len(steep.eigenvalues) <= 12


def test_no_more_bins_than_the_correction_feels():
    # Two levels, resolved by many samples: far fewer bins than asked for.
    truth = torch.cat([torch.full((8,), 25.0), torch.ones(8)]).double()
    model = NoiseModel.fit(normal(0, 4000, 16) * truth.sqrt(), bins=16)
    assert model.dimension == 16
    assert len(model.eigenvalues) <= 3
    dead = torch.cat([normal(1, 2000, 4), torch.ones(2000, 60).double()], 1)
    model = NoiseModel.fit(dead, bins=64)
    assert len(model.eigenvalues) <= 3
    # The density of the four others reaches over a rank or two.
    assert float(model.multiplicities[-1]) >= 57


def test_a_model_describes_itself_in_one_line():
    n, d = 400, 100
    ids = torch.arange(n) % 4
    scale = torch.linspace(0.5, 1.5, n).double().sqrt()[:, None]
    model = NoiseModel.fit(normal(5, n, d) * scale, ids, bins=1, per_sample=True)
    # r is uniform on [0.5, 1.5], of variance 1/12; chi-squared norms add (1 + 1/12) 2/d.
    variation = math.sqrt(1 / 12 + (1 + 1 / 12) * 2 / d)
    assert model.norm_variation == pytest.approx(variation, rel=0.1)
    assert str(model) == (
        "noise model: 1 bin, effective rank 100 of 100, n/d 4, norm variation "
        f"{model.norm_variation:.2f} (Gaussian 0.14), 4 components, a mass for every sample"
    )
    assert str(model.to(torch.device("cpu"), torch.float32)) == str(model)
    by_hand = NoiseModel(torch.tensor([4.0, 1.0]), torch.tensor([1, 4]))
    # (4 + 4)² / (16 + 4)
    assert str(by_hand) == "noise model: 2 bins, effective rank 3.2 of 5"
    assert "effective rank" in str(NoiseModel(torch.zeros(1), torch.tensor([4])))


def test_spectra_beyond_memory_are_refused(monkeypatch):
    monkeypatch.setattr("dd.noise.measures.LARGEST_GRAM", 50)
    sample = normal(6, 60, 70)
    with pytest.raises(ValueError, match=r"60 × 60 matrix.*NoiseModel.isotropic.*at most 50 rows"):
        NoiseModel.fit(sample)
    assert len(NoiseModel.fit(sample, bins=1, per_sample=False).eigenvalues) == 1
    assert len(NoiseModel.fit(sample[:50]).eigenvalues) >= 1


def test_no_more_than_two_copies_of_the_inputs_are_alive():
    inputs, ids = normal(7, 6000, 64), torch.arange(6000) % 3
    with Alive(inputs) as alive:
        NoiseModel.fit(inputs, ids)
    # Beside the centred inputs: an eighth of them at a time, chunks of 1024 rows, and single rows.
    assert alive.most < 2 * inputs.nbytes


def test_mass_of_a_sample_does_not_depend_on_the_size_of_its_component():
    """Means over 100 classes of 2: ‖z‖²/d has spread √(2/d), and half that many free samples."""
    components = torch.cat(
        [torch.zeros(500), 1 + torch.arange(100).repeat(2), 101 + torch.zeros(1)]
    )
    noise = NoiseModel.fit(normal(4, 701, 50), components.long(), per_sample=True)
    pairs = noise.relative_mass[500:700].mean()
    assert abs(pairs - 1) < 4 * (2 / 50 / 100) ** 0.5
    assert noise.relative_mass[-1] == 1


# --- The ends of floating point, and inputs of other kinds ------------------------------------

GAUSSIAN = normal(0, 200, 20)
HALVES = torch.arange(200) % 2


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        *((scale, torch.float32) for scale in (1e-14, 1e-6, 1e6, 1e14)),
        *((scale, torch.float64) for scale in (1e-70, 1e-25, 1e20, 1e70)),
    ],
)
def test_the_model_is_of_the_scale_of_its_inputs(scale, dtype):
    plain = NoiseModel.fit(GAUSSIAN * torch.linspace(0.1, 2, 20), HALVES)
    inputs = (GAUSSIAN.double() * torch.linspace(0.1, 2, 20) * scale).to(dtype)
    model = NoiseModel.fit(inputs, HALVES)
    assert str(model) == str(plain)
    relative = model.eigenvalues.double() / scale / scale
    torch.testing.assert_close(relative.to(plain.eigenvalues), plain.eigenvalues, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        *((scale, torch.float32) for scale in (1e-44, 1e-25, 1e20, 1e37)),
        *((scale, torch.float64) for scale in (1e-300, 1e-100, 1e100, 1e300)),
    ],
)
@pytest.mark.parametrize("fit", [NoiseModel.fit, NoiseModel.isotropic])
def test_squares_out_of_range_are_an_error(fit, scale, dtype):
    with pytest.raises(ValueError, match=r"squares beyond the range of float.*divide them by"):
        fit((GAUSSIAN.double() * scale).to(dtype), HALVES)


@pytest.mark.parametrize("mean", [1e3, 1e6, 1e12])
def test_a_large_mean_takes_nothing_of_the_noise(mean):
    plain = NoiseModel.fit(GAUSSIAN.double(), HALVES)
    model = NoiseModel.fit(GAUSSIAN.double() + mean, HALVES)
    # Each input is rounded by half a unit of its mean at most.
    rounding = mean * torch.finfo(torch.float64).eps
    torch.testing.assert_close(model.mass, plain.mass, rtol=1e-9 + 8 * rounding, atol=0)
    assert model.copies == 0


def test_noise_lost_in_the_rounding_of_its_mean_is_an_error():
    with pytest.raises(ValueError, match=r"by more than the rounding of float32.*subtract it in"):
        NoiseModel.fit(GAUSSIAN.float() + 1e9, HALVES)


TEXT = np.array(["cat", "dog"])[HALVES.numpy()]


@pytest.mark.parametrize(
    ("inputs", "components", "message"),
    [
        (GAUSSIAN, TEXT, r"components must be .* got <U3; numpy\.unique"),
        (GAUSSIAN, TEXT.tolist(), r"components must be .* got list; numpy\.unique"),
        (GAUSSIAN, TEXT.astype(object), r"components must be .* got object"),
        (GAUSSIAN, HALVES.double(), r"integer component ids.*float64; numpy\.unique"),
        (GAUSSIAN.numpy().astype(str), None, "inputs must be real numbers, got data type <U"),
        (GAUSSIAN + 1j, None, "inputs must be real numbers, got data type torch.complex"),
        (GAUSSIAN.to_sparse(), None, "inputs must be dense"),
        ({"a": 1}, None, r"inputs must be .* got dict; .*to_numpy"),
        (torch.where(GAUSSIAN > 2, torch.inf, GAUSSIAN), None, "NaN or infinity"),
    ],
)
def test_inputs_that_are_no_numbers_are_named(inputs, components, message):
    with pytest.raises(ValueError, match=f"NoiseModel: .*{message}"):
        NoiseModel.fit(inputs, components)


def test_arrays_of_any_kind_make_the_same_model():
    expected = str(NoiseModel.fit(GAUSSIAN, HALVES))
    values, ids = GAUSSIAN.numpy(), HALVES.numpy()
    for other in (values.astype(">f8"), values.astype(np.longdouble), np.asfortranarray(values)):
        assert str(NoiseModel.fit(other, ids.astype(">i4"))) == expected
    assert str(NoiseModel.fit(values[::-1], ids[::-1].astype(np.uint16))) == expected


def test_independence_of_rows_counts_large_groups_by_their_rows():
    """White rows, many alone and others in groups of 16 that are nearly one: flat all the same."""
    generator = torch.Generator().manual_seed(0)
    singles, groups, d = 240, 60, 60
    shared = torch.randn(groups, d, generator=generator).repeat_interleave(16, 0)
    own = torch.randn(groups * 16, d, generator=generator)
    rows = torch.cat(
        [torch.randn(singles, d, generator=generator), 0.9**0.5 * shared + 0.1**0.5 * own]
    )
    ids = torch.cat([torch.arange(singles), singles + torch.arange(groups).repeat_interleave(16)])
    labels = ids % 2
    noise = NoiseModel.fit(rows, labels, groups=ids)
    # An effective rank of d / (1 + d / m) of m independent rows is put back to d.
    assert noise.effective_rank > 0.9 * d
