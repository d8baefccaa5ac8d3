"""Functions, curvature estimators and noise model, against the slow twin and against theory."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from dd.curvature import estimators as curvature
from dd.curvature.choice import build
from dd.functional import (
    centre_within_components,
    corrected_preactivation,
    damped_weight_gradient,
    kink_curvature,
    probe_curvature,
    rademacher,
    shadow_gradient,
    stein_curvature,
    symmetric_curvature,
)
from dd.noise.model import NoiseModel
from dd.support.ranks import Ranks
from tests.reference import Head, Step, decoupled_descent, kinks_of, stein_of

FIXED = (0.4,) * 8
VARYING = (0.7, 0.1, 0.5, 0.0, 0.9, 0.3, 0.6, 0.2)


def generator(seed: int) -> torch.Generator:
    """A fresh CPU generator."""
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal entries in float64."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def rms(values: Tensor, dims: int | tuple[int, ...] = (-2, -1)) -> float:
    """Root over leading dimensions of the mean squared Frobenius norm."""
    return float(values.square().sum(dims).mean().sqrt())


# --- step by step against the slow twin -----------------------------------------------------------


class Problem(NamedTuple):
    """A small full-batch problem: n = 9, d = 6, k = 3, two classes, τ/n of order one."""

    inputs: Tensor
    labels: Tensor
    weight: Tensor
    head: Head


@pytest.fixture(scope="module")
def problem() -> Problem:
    n, d, k, classes = 9, 6, 3, 2
    return Problem(
        inputs=1.2 * normal(0, n, d),
        labels=torch.arange(n) % classes,
        weight=normal(1, d, k) / math.sqrt(d),
        head=Head(0.1 * normal(2, k), 1.5 * normal(3, classes, k), 0.1 * normal(4, classes)),
    )


def fast_trajectory(
    problem: Problem,
    activation: Callable[[Tensor], Tensor],
    rates: Sequence[float],
    noise_variance: float | Tensor,
    damping: float,
    reduction: str = "mean",
    relative_mass: Tensor | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Decoupled descent by the recursions of ``dd.functional`` and the exact curvature of ``dd``.

    Args:
        problem: data and initialisation.
        activation: of the hidden layer.
        rates: learning rates; divided by n here where the loss is summed.
        noise_variance: λ, or with ρ = 1 the d eigenvalues of Σ, each a bin of its own.
        damping: ρ.
        reduction: of the cross-entropy over samples.
        relative_mass: ‖z_i‖² over its mean, shape (n,).

    Returns:
        W (d, k) and Q (n, k) at every step, the initial one included.
    """
    n, d = problem.inputs.shape
    weight, head = problem.weight.T.clone(), problem.head
    eigenvalues = torch.as_tensor(noise_variance, dtype=torch.float64).reshape(-1)
    mass = eigenvalues * (d / len(eigenvalues))
    shadow = torch.zeros(len(eigenvalues), n, weight.shape[0], dtype=torch.float64)
    estimator = curvature.Exact(relative_mass)
    trajectory = [(weight.T, shadow.sum(0))]
    for rate in rates:
        rate = rate if reduction == "mean" else rate / n
        r = corrected_preactivation(problem.inputs @ weight.T, shadow).requires_grad_()
        hidden_bias, head_weight, head_bias = (p.detach().requires_grad_() for p in head)
        outputs = activation(r + hidden_bias) @ head_weight.T + head_bias
        loss = torch.nn.functional.cross_entropy(outputs, problem.labels, reduction=reduction)
        g, *head_gradients = torch.autograd.grad(
            loss, (r, hidden_bias, head_weight, head_bias), create_graph=True
        )
        observed = estimator.observe(r, 0)
        h = estimator.estimate(observed, curvature.BackwardResult(g, None, get_gradient_edge(r)))
        g = g.detach()

        descent = damped_weight_gradient(g.T @ problem.inputs, weight, h, eigenvalues[0], damping)
        weight = weight - rate * descent
        shadow = shadow - rate * shadow_gradient(
            shadow, g, h, eigenvalues, mass, damping, relative_mass=relative_mass
        )
        head = Head(*(p - rate * dp.detach() for p, dp in zip(head, head_gradients, strict=True)))
        trajectory.append((weight.T, shadow.sum(0)))
    return trajectory


def slow_trajectory(
    problem: Problem,
    activation: Callable[[Tensor], Tensor],
    rates: Sequence[float],
    noise_variance: float,
    damping: float,
) -> list[Step]:
    """The slow twin on ``problem``."""
    return decoupled_descent(*problem, activation, rates, noise_variance, damping)


@pytest.mark.parametrize("damping", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rates", [FIXED, VARYING], ids=["fixed", "varying"])
@pytest.mark.parametrize("activation", [torch.tanh, torch.nn.functional.gelu], ids=["tanh", "gelu"])
def test_recursion_equals_sums_over_the_past(problem, activation, rates, damping):
    # λ = 1.4 and not 1, so that a λ dropped or doubled shows.
    fast = fast_trajectory(problem, activation, rates, 1.4, damping)
    slow = slow_trajectory(problem, activation, rates, 1.4, damping)
    assert len(fast) == len(slow) == len(rates) + 1
    # Far enough from the start that every term of the recursion has acted.
    assert slow[-1].shadow.abs().max() > 0.1
    for (weight, shadow), step in zip(fast, slow, strict=True):
        torch.testing.assert_close(weight, step.weight, rtol=0, atol=1e-10)
        torch.testing.assert_close(shadow, step.shadow, rtol=0, atol=1e-10)


@pytest.mark.parametrize("unequal", [False, True], ids=["equal-mass", "per-sample-mass"])
def test_one_bin_an_eigenvalue_equals_the_full_covariance(problem, unequal):
    n, d = problem.inputs.shape
    # Neither diagonal nor of small condition, and one eigenvalue at 0.
    eigenvalues = torch.tensor([4.0, 1.7, 0.9, 0.3, 0.05, 0.0], dtype=torch.float64)
    rotation = torch.linalg.qr(normal(11, d, d))[0]
    covariance = rotation @ torch.diag(eigenvalues) @ rotation.T
    relative = 0.3 + normal(12, n).square() if unequal else None
    fast = fast_trajectory(problem, torch.tanh, VARYING, eigenvalues, 1.0, relative_mass=relative)
    slow = decoupled_descent(
        *problem, torch.tanh, VARYING, noise=covariance, relative_mass=relative
    )
    assert slow[-1].shadow.abs().max() > 0.1
    for (weight, shadow), step in zip(fast, slow, strict=True):
        torch.testing.assert_close(weight, step.weight, rtol=0, atol=1e-10)
        torch.testing.assert_close(shadow, step.shadow, rtol=0, atol=1e-10)


@pytest.mark.parametrize("damping", [0.0, 0.5, 1.0])
def test_summed_loss_at_rate_over_n_is_the_same_trajectory(problem, damping):
    mean = fast_trajectory(problem, torch.tanh, VARYING, 1.4, damping)
    summed = fast_trajectory(problem, torch.tanh, VARYING, 1.4, damping, reduction="sum")
    for expected, actual in zip(mean, summed, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


# --- shapes and dtypes ----------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [1, 3])
def test_leading_dimensions_equal_a_loop(bins):
    lead, n, k, d = (2, 3), 7, 4, 5
    shadow, g = normal(0, *lead, bins, n, k), normal(1, *lead, n, k)
    h = normal(2, *lead, k, k)
    h = h + h.mT
    eigenvalues = normal(3, *lead, bins).square()
    mass = 5 * normal(4, *lead, bins).square()
    preactivation, components = normal(5, *lead, n, k), torch.tensor([0, 2, 2, 0, 1, 1, 4])
    weight, weight_gradient = normal(6, *lead, k, d), normal(7, *lead, k, d)
    probe = rademacher(preactivation, generator(8))

    batched = [
        shadow_gradient(shadow, g, h, eigenvalues, mass, 0.7),
        corrected_preactivation(preactivation, shadow),
        centre_within_components(preactivation, components, 5),
        stein_curvature(preactivation, g),
        probe_curvature(probe, g),
        kink_curvature(preactivation, g * (preactivation > 0)),
        kink_curvature(preactivation, g, leaky=True),
        damped_weight_gradient(weight_gradient, weight, h, 1.3, 0.7),
    ]
    for i in range(lead[0]):
        for j in range(lead[1]):
            looped = [
                torch.stack(
                    [
                        0.7 * eigenvalues[i, j, b] * shadow[i, j, b] @ h[i, j]
                        - mass[i, j, b] * g[i, j]
                        for b in range(bins)
                    ]
                ),
                preactivation[i, j] + sum(shadow[i, j, b] for b in range(bins)),
                centre_within_components(preactivation[i, j], components, 5),
                stein_curvature(preactivation[i, j], g[i, j]),
                probe_curvature(probe[i, j], g[i, j]),
                kink_curvature(preactivation[i, j], g[i, j] * (preactivation[i, j] > 0)),
                kink_curvature(preactivation[i, j], g[i, j], leaky=True),
                damped_weight_gradient(weight_gradient[i, j], weight[i, j], h[i, j], 1.3, 0.7),
            ]
            for whole, part in zip(batched, looped, strict=True):
                torch.testing.assert_close(whole[i, j], part, rtol=1e-10, atol=1e-12)


def test_shared_bins_broadcast_over_leading_dimensions():
    shadow, g, h = normal(0, 2, 3, 7, 4), normal(1, 2, 7, 4), normal(2, 2, 4, 4)
    eigenvalues, mass = normal(3, 3).square(), normal(4, 3).square()
    together = shadow_gradient(shadow, g, h, eigenvalues, mass)
    for i in range(2):
        alone = shadow_gradient(shadow[i], g[i], h[i], eigenvalues, mass)
        torch.testing.assert_close(together[i], alone)


def test_shadow_keeps_its_own_dtype():
    # Half-precision activations must not degrade what is accumulated over the run.
    shadow, g = torch.ones(1, 4, 2), torch.ones(4, 2, dtype=torch.bfloat16)
    h = torch.eye(2, dtype=torch.bfloat16)
    one = torch.ones(1)
    assert shadow_gradient(shadow, g, h, one, one).dtype == torch.float32
    assert corrected_preactivation(g, shadow).dtype == torch.bfloat16


# --- Rademacher probes ----------------------------------------------------------------------------


def test_rademacher_entries_and_moments():
    n, k = 20_000, 4
    probe = rademacher(torch.empty(n, k, dtype=torch.float64), generator(0))
    assert bool((probe.abs() == 1).all())
    # Entries, products of two columns and products of successive rows are ±1 with mean 0, so an
    # average over n of them has standard error n^{-1/2} (all but the diagonal of VᵀV, which is n).
    # Five standard errors: one of 26 averages then misses with probability 2e-5.
    tolerance = 5 / math.sqrt(n)
    assert bool((probe.mean(0).abs() < tolerance).all())
    second = probe.T @ probe / n
    assert bool(((second - torch.eye(k)).abs() < tolerance).all())
    successive = probe[1:].T @ probe[:-1] / n
    assert bool((successive.abs() < tolerance).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rademacher_is_deterministic_and_takes_after_its_model(dtype):
    like = torch.zeros(50, 3, dtype=dtype, requires_grad=True)
    first, second = (rademacher(like, generator(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, rademacher(like, generator(2)))
    assert first.dtype == dtype
    assert first.shape == like.shape
    assert not first.requires_grad


# --- Stein's lemma --------------------------------------------------------------------------------


class GaussianRows(NamedTuple):
    """Pre-activations of an XOR-like mixture, S independent data sets at once.

    Attributes:
        r: rows, Gaussian given their cluster, shape (S, n, k).
        cluster: one of four clusters, shape (n,).
        label: the two-valued label of the cluster, shape (n,).
        g: gradient of each row's loss, shape (S, n, k).
        hessian: second derivative of each row's loss, shape (S, n, k, k).
    """

    r: Tensor
    cluster: Tensor
    label: Tensor
    g: Tensor
    hessian: Tensor


def gaussian_rows(n: int, seeds: int) -> GaussianRows:
    """Draw rows around four means and differentiate ℓ(r) = log(1 + exp(−y aᵀtanh r)).

    Args:
        n: rows in each data set, a multiple of four.
        seeds: S, number of data sets.

    Returns:
        The rows and their derivatives.
    """
    k = 3
    cluster = torch.arange(n) % 4
    label = cluster // 2
    axes = torch.tensor([[3.0, 1.0, -1.0], [-1.0, 2.0, 3.0]], dtype=torch.float64)
    means = torch.stack([axes[0], -axes[0], axes[1], -axes[1]])
    factor = torch.tensor([[0.5, 0.0, 0.0], [0.2, 0.4, 0.0], [-0.15, 0.1, 0.3]]).double()
    r = means[cluster] + normal(n, seeds, n, k) @ factor.T
    a = torch.tensor([1.0, -1.5, 2.0], dtype=torch.float64)
    y = 2.0 * label[:, None] - 1.0
    h, slope = torch.tanh(r), 1 - torch.tanh(r).square()
    p = torch.sigmoid(-y * (h @ a)[..., None])
    g = -y * p * slope * a
    hessian = torch.einsum("...a,...b->...ab", slope * a, slope * a) * (p * (1 - p))[..., None]
    hessian = hessian + torch.diag_embed(2 * y * p * h * slope * a)
    return GaussianRows(r, cluster, label, g, hessian)


def stein_error(rows: GaussianRows, components: Tensor) -> Tensor:
    """Stein's estimate less the exact mean curvature, shape (S, k, k)."""
    n = rows.r.shape[-2]
    centred = centre_within_components(rows.r, components, 4)
    return stein_curvature(centred, rows.g / n, ridge=1e-9) - rows.hessian.mean(-3)


def stein_standard_error(rows: GaussianRows) -> float:
    """Expected size of the error of Stein's estimate, E‖·‖² = E‖φ‖²/n.

    To first order the error is the mean over rows of
    φ_i = sym[K⁻¹ r_i (g_i − E[g|a] − H̄r_i)ᵀ] − (H_i − H̄), r_i centred; Stein's lemma says E φ = 0.
    """
    n = rows.r.shape[-2]
    r = centre_within_components(rows.r, rows.cluster, 4)
    g = centre_within_components(rows.g, rows.cluster, 4)
    mean = rows.hessian.mean(-3)
    solved = torch.linalg.solve(r.mT @ r / n, r.mT).mT
    phi = torch.einsum("...a,...b->...ab", solved, g - r @ mean)
    phi = (phi + phi.mT) / 2 - (rows.hessian - mean[..., None, :, :])
    return rms(phi) / math.sqrt(n)


def test_stein_error_is_the_standard_error_and_falls_like_root_n():
    seeds = 64
    errors = {}
    for n in (400, 6400):
        rows = gaussian_rows(n, seeds)
        errors[n] = rms(stein_error(rows, rows.cluster))
        # The mean square of 64 errors has relative deviation at most √(2/64) (one degree of
        # freedom; a k × k error has more), its root at most 0.09: four deviations are 0.35.
        assert errors[n] / stein_standard_error(rows) == pytest.approx(1, abs=0.35)
    # 16 times the rows, a quarter of the error; two roots, each within 0.09, so 0.12: times four.
    assert errors[6400] / errors[400] == pytest.approx(0.25, rel=0.5)


@pytest.mark.parametrize("centring", ["label", "none"])
def test_stein_needs_the_right_components(centring):
    # Each label is two clusters: given the label R is not Gaussian and the lemma does not hold. The
    # error is a bias, which no amount of data lowers and which is as large as the curvature itself.
    biases = []
    for n in (400, 6400):
        rows = gaussian_rows(n, 16)
        wrong = rows.label if centring == "label" else torch.zeros_like(rows.label)
        biases.append(rms(stein_error(rows, wrong)))
    assert biases[1] > 5 * stein_standard_error(rows)
    assert biases[1] > 0.5 * rms(rows.hessian.mean(-3))
    assert biases[1] / biases[0] > 0.7


@pytest.mark.parametrize("spread", [1.0, 1e-3], ids=["", "a direction without variance"])
@pytest.mark.parametrize("ridge", [1e-4, 0.1])
def test_stein_solves_the_symmetric_equations(spread, ridge):
    """Rounding of 1e-16 grows by the condition of K, which the ridge keeps below 4 / ridge."""
    n, k = 40, 4
    labels = torch.arange(n) % 3
    r = normal(0, n, k) @ torch.diag(torch.tensor([2.0, 1.0, 1.0, spread]).double())
    r = r @ torch.linalg.qr(normal(1, k, k))[0] + labels.unsqueeze(1)
    g = normal(2, n, k)
    found = stein_curvature(centre_within_components(r, labels, 3), g, ridge)
    expected = stein_of(r, g, labels, ridge)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.norm()))


def test_noise_where_nothing_varies_stays_there():
    """An error in the row of C that belongs to a small κ reaches the other rows divided by 1 + κ.

    To symmetrise (K + ε)⁻¹C instead would put half of the error over κ into both.
    """
    kappa, error = 1e-6, 1e-3
    covariance = torch.diag(torch.tensor([1.0, kappa]).double())
    hessian = torch.tensor([[1.0, 0.3], [0.3, 0.5]]).double()
    cross = covariance @ hessian
    cross[1, 0] += error
    found = symmetric_curvature(covariance, cross, ridge=1e-9)
    assert abs(float(found[0, 1]) - 0.3) < 2 * error
    torch.testing.assert_close(found[0, 0], hessian[0, 0], rtol=1e-6, atol=0)


def test_stein_of_numbers_that_are_none_is_none():
    for place in range(2):
        both = [torch.eye(3).double(), torch.eye(3).double()]
        both[place][0, 0] = math.nan
        assert symmetric_curvature(*both, 1e-4).isnan().all()
    torch.testing.assert_close(symmetric_curvature(*[torch.eye(3)] * 2, 0.5), torch.eye(3) / 1.5)


def test_stein_on_a_layer_at_zero_is_zero():
    for dtype in (torch.float32, torch.float64):
        zero = stein_curvature(torch.zeros(50, 3, dtype=dtype), normal(0, 50, 3).to(dtype))
        assert torch.equal(zero, torch.zeros(3, 3, dtype=dtype))


def test_stein_with_a_dead_unit_is_finite():
    # A unit that is zero for every sample makes K singular; the ridge must carry it.
    r, g = normal(0, 200, 3), normal(1, 200, 3)
    r[:, 1] = 0
    h = stein_curvature(r, g / 200)
    assert bool(torch.isfinite(h).all())
    alive = stein_curvature(r[:, ::2], g[:, ::2] / 200)
    torch.testing.assert_close(h[::2, ::2], alive, rtol=1e-3, atol=1e-4)


def test_curvature_is_symmetric():
    # The estimates before symmetrisation are not: their halves differ by sampling noise.
    values, g = normal(0, 40, 3), normal(1, 40, 3)
    for h in (stein_curvature(values, g), probe_curvature(rademacher(values, generator(2)), g)):
        assert torch.equal(h, h.mT)
        assert float(h.abs().min()) > 0


def test_stein_estimator_takes_components_from_the_noise_model():
    rows = gaussian_rows(400, 1)
    inputs = normal(0, 400, 2)
    noise = NoiseModel.isotropic(inputs, 10 * rows.cluster - 7)
    estimator = build("stein", noise)
    observed = estimator.observe(rows.r[0], 0)
    backward = curvature.BackwardResult(rows.g[0] / 400, None, get_gradient_edge(_leaf(rows.r[0])))
    expected = stein_curvature(
        centre_within_components(rows.r[0], rows.cluster, 4), rows.g[0] / 400
    )
    torch.testing.assert_close(estimator.estimate(observed, backward), expected)


# --- one probe ------------------------------------------------------------------------------------


def symmetric_matrices(n: int, k: int = 4) -> Tensor:
    """Per-sample symmetric matrices around a common one, shape (n, k, k)."""
    matrices = normal(n, n, k, k)
    return matrices + matrices.mT + torch.diag(torch.arange(1.0, k + 1).double())


def probe_errors(matrices: Tensor, draws: int) -> Tensor:
    """Errors of the probe's estimate of ``matrices.sum(0)``, one a draw, shape (draws, k, k)."""
    n, k, _ = matrices.shape
    probe = rademacher(torch.empty(draws, n, k, dtype=torch.float64), generator(n))
    return probe_curvature(probe, (matrices @ probe[..., None]).squeeze(-1)) - matrices.sum(0)


def probe_standard_error(matrices: Tensor) -> float:
    """Expected size of the probe's error on a mean of n matrices.

    With O_i = v_i v_iᵀ − I and A_i = H_i − H̄ the error is, to first order, the mean of
    sym(O_i A_i). The entries of O_i off the diagonal are uncorrelated with variance one, whence
    E‖sym(O A)‖² = ½ [k‖A‖² + (tr A)² − 2 Σ_a A_aa²].
    """
    n, k, _ = matrices.shape
    a = matrices - matrices.mean(0)
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    square = k * a.square().sum((-2, -1)) + diagonal.sum(-1) ** 2 - 2 * diagonal.square().sum(-1)
    return math.sqrt(float(square.mean()) / (2 * n))


def test_probe_error_is_the_standard_error_and_falls_like_root_n():
    draws = 64
    errors = {}
    for n in (200, 3200):
        matrices = symmetric_matrices(n) / n
        error = probe_errors(matrices, draws)
        errors[n] = rms(error)
        # As for Stein's estimate: the root of 64 mean squares is within 0.09 of its expectation.
        expected = n * probe_standard_error(matrices)
        assert errors[n] / expected == pytest.approx(1, abs=0.35)
        # Unbiased up to O(1/n): the mean of the draws is smaller by √64; four deviations of its
        # norm, and for O(1/n) the squared standard error over the curvature's own size.
        bias_of_inverse = expected**2 / float(matrices.sum(0).norm())
        assert float(error.mean(0).norm()) < 4 * expected / math.sqrt(draws) + bias_of_inverse
    assert errors[3200] / errors[200] == pytest.approx(0.25, rel=0.5)


def test_probe_is_exact_on_identical_matrices():
    # Whatever the probe, as soon as its k columns are independent.
    matrices = symmetric_matrices(1).expand(12, -1, -1)
    torch.testing.assert_close(
        probe_errors(matrices, 5), torch.zeros(5, 4, 4).double(), rtol=0, atol=1e-10
    )


def test_probe_estimators_agree_with_the_function():
    matrices, r = symmetric_matrices(30), _leaf(normal(0, 30, 4))
    loss = torch.einsum("na,nab,nb->", r, matrices, r) / 2
    (g,) = torch.autograd.grad(loss, r, create_graph=True)
    probe = rademacher(r, generator(3))
    product = (matrices @ probe[..., None]).squeeze(-1)
    expected = probe_curvature(probe, product)
    for name in ("probe", "probe_create_graph"):
        estimator = build(name, None)
        observed = estimator.observe(r, 3)
        assert torch.equal(observed, probe)
        backward = curvature.BackwardResult(g, product, get_gradient_edge(r))
        torch.testing.assert_close(estimator.estimate(observed, backward), expected)


def test_estimators_refuse_what_they_cannot_do():
    r = _leaf(normal(0, 5, 2))
    lost = curvature.BackwardResult(r.detach(), None, get_gradient_edge(r))
    for name, message in (
        ("probe", "Remedy: construct with curvature=.probe_create_graph"),
        ("probe_create_graph", r"loss\.backward\(create_graph=True\)"),
        ("exact", r"loss\.backward\(create_graph=True\)"),
    ):
        estimator = build(name, None)
        observed = estimator.observe(r, 0)
        with pytest.raises(RuntimeError, match=message):
            estimator.estimate(observed, lost)
    with pytest.raises(ValueError, match=r"pass noise=dd\.NoiseModel"):
        build("stein", None)
    with pytest.raises(ValueError, match="must be one of"):
        build("hutchinson", None)


def test_second_differentiation_of_a_linear_loss_is_zero():
    # The gradient is part of a graph, through the head, but does not depend on R.
    r, head = _leaf(normal(0, 5, 2)), _leaf(normal(1, 2))
    (g,) = torch.autograd.grad((r @ head).mean(), r, create_graph=True)
    backward = curvature.BackwardResult(g, None, get_gradient_edge(r))
    for name in ("exact", "probe_create_graph"):
        estimator = build(name, None)
        h = estimator.estimate(estimator.observe(r, 0), backward)
        assert torch.equal(h, torch.zeros(2, 2).double())


def _leaf(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_()


# --- kinks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("masses", [None, 0.3 + normal(7, 200).square()], ids=["", "masses"])
@pytest.mark.parametrize("leaky", [False, True])
def test_kinks_equal_those_by_loops(leaky, masses):
    # Units of a ReLU, of a smooth activation, of a ReLU that is never negative, at other scales.
    r = normal(0, 200, 4) * torch.tensor([1.0, 3.0, 0.01, 0.5]).double()
    r[:, 2:3] += 0.02
    r[:, 3] = r[:, 3].abs()
    g = normal(1, 200, 4)
    g[:, [0, 2, 3]] *= r[:, [0, 2, 3]] > 0
    found = kink_curvature(r, g, masses, leaky=leaky)
    expected = kinks_of(r, g, masses, leaky=leaky)
    assert expected.ne(0).tolist() == [True, leaky, True, leaky]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["gelu", "tanh", "softplus"])
def test_smooth_units_have_no_kinks(name):
    r = _leaf(normal(0, 500, 3))
    torch.nn.functional.__dict__.get(name, torch.tanh)(r).sum().backward()
    assert not kink_curvature(r.detach(), r.grad).any()


SLOPES = {
    # g(r) of the loss Σ_j a(r_j), and the jump of g at 0.
    "relu": (lambda r: (r > 0).double(), 1.0),
    "squared relu": (lambda r: 2 * r.clamp_min(0), 0.0),
    "leaky relu": (lambda r: torch.where(r > 0, 1.0, 0.2).double(), 0.8),
}


@pytest.mark.parametrize("name", SLOPES)
def test_kinks_are_density_times_jump_to_their_standard_error(name):
    """Gaussian R: the mean is an integral over the density, the variance that of a sum."""
    slope, jump = SLOPES[name]
    seeds, mean = 400, 0.4
    errors = {}
    for n in (500, 8000):
        r = mean + normal(n, seeds, n, 1)
        found = kink_curvature(r, slope(r) / n, leaky=name == "leaky relu").squeeze(1)
        h = n**-0.2
        u = (torch.arange(20_000).double() + 0.5) / 20_000
        first = second = torch.zeros(())
        for side in (-1, 1):
            density = torch.exp(-((side * h * u - mean) ** 2) / 2) / math.sqrt(2 * math.pi)
            values = (4 - 6 * u) * slope(side * h * u)
            first = first + side * (density * values).mean()
            second = second + (density * values.square()).mean() / h
        standard_error = math.sqrt(float(second - first.square()) / n)
        # The mean of 400, to four standard errors; the deviation of R is known to 1/√(2n), which
        # moves the bias, of order h², by less than h/√n.
        assert abs(float(found.mean() - first)) < 4 * standard_error / 20 + h / n**0.5
        # A deviation of 400 has relative deviation about 1/√800; five, and as much for its tails.
        assert float(found.std()) == pytest.approx(standard_error, rel=0.35)
        truth = jump * math.exp(-(mean**2) / 2) / math.sqrt(2 * math.pi)
        # The bias is h² (f g)''/12, and f and its derivatives are below 1/2, slopes below 2.
        assert abs(float(first) - truth) < h**2 / 4
        errors[n] = float((found - truth).square().mean().sqrt())
    assert errors[8000] < errors[500] / 2


ACTIVATIONS = {
    "relu": torch.relu,
    "leaky relu": lambda r: torch.nn.functional.leaky_relu(r, 0.2),
    "gelu": torch.nn.functional.gelu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_probe_with_kinks_is_the_curvature_of_the_population(name):
    """Gaussian R, for which Stein's lemma gives the curvature without a second derivative.

    Cross-entropy of a linear head behind the activation. The difference of both estimates over
    independent data sets has mean zero, up to the kinks' bias of h² (f E[g])''/12 in the diagonal.
    """
    seeds, n, k, classes = 60, 4000, 3, 3
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.8, 0.0], [-0.3, 0.2, 0.7]]).double()
    r = _leaf(torch.tensor([0.2, -0.3, 0.1]).double() + normal(0, seeds, n, k) @ factor.T)
    head = 1.5 * normal(2, classes, k)
    scores = ACTIVATIONS[name](r) @ head.T
    labels = torch.arange(n) % classes
    loss = torch.nn.functional.cross_entropy(scores.mT, labels.expand(seeds, n), reduction="sum")
    (g,) = torch.autograd.grad(loss / n, r, create_graph=True)
    probe = rademacher(r, generator(3))
    (product,) = torch.autograd.grad(g, r, probe)
    g, rows = g.detach(), r.detach()
    kinks = kink_curvature(rows, g, leaky=name == "leaky relu")
    stein = stein_curvature(rows - rows.mean(-2, keepdim=True), g, ridge=1e-9)

    def distance(estimate):
        """Largest mean difference over its standard error, its allowance for bias taken off."""
        difference = estimate - stein
        bias = n**-0.4 * kinks.abs().mean(0).max() / 4
        excess = difference.mean(0).abs() - bias * torch.eye(k).double()
        return float((excess * math.sqrt(seeds) / difference.std(0)).max())

    # Six entries of a mean of 60: beyond four standard errors with probability 1e-3.
    assert distance(probe_curvature(probe, product, kinks)) < 4
    assert kinks.any() == (name != "gelu")
    if name != "gelu":
        assert distance(probe_curvature(probe, product)) > 12


def test_kinks_of_mini_batches_are_pooled():
    """Steps of 48 rows of a loss that is linear but for its kinks: H is their density alone."""
    m, k, steps = 48, 3, 1200
    estimator, memory, found = curvature.Probe(), None, []
    for step in range(steps):
        rows = normal(step, m, k)
        pushes = (rows > 0) * torch.tensor([1.0, -2.0, 0.5]).double() / m
        probe = rademacher(rows, generator(step))
        both = curvature.Rows(probe, torch.zeros(m, k).double(), None, Ranks(), rows, pushes)
        now = estimator.moments(both)
        memory = now if memory is None else estimator.pooled(now, memory, 1 - m / (16 * k * 4))
        found.append(estimator.solve_pooled(memory))
    density = 1 / math.sqrt(2 * math.pi)
    truth = torch.diag(torch.tensor([1.0, -2.0, 0.5]).double() * density)
    # One batch has variance 4 f/(m h) times the jump's square, of 1200 batches a mean; the bias is
    # h²/12 of the density at the mode, and VᵀV / m is known to 1/√m in each of them.
    h = m**-0.2
    error = 4 * math.sqrt(4 * density / (m * h) / steps) + density * (h**2 / 6 + 1 / m)
    difference = (torch.stack(found).mean(0) - truth).abs()
    assert float(difference.max()) < 2 * error
    later = torch.stack(found)[200:]
    assert float(later[:, 0, 0].std()) < math.sqrt(4 * density / (m * h)) / 1.5


def test_which_modules_have_leaky_kinks():
    for activation, leaky in (
        (torch.nn.ReLU(), False),
        (torch.nn.GELU(), False),
        (torch.nn.LeakyReLU(), True),
        (torch.nn.PReLU(), True),
    ):
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Sequential(activation))
        assert build("auto", None, model).leaky is leaky


# --- centring -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    ids=st.lists(st.integers(0, 6), min_size=1, max_size=30),
    k=st.integers(1, 4),
    lead=st.sampled_from([(), (1,), (2, 3)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_centring_removes_component_means_and_nothing_else(ids, k, lead, seed):
    # Seven components of which some, possibly all but one, have no sample.
    components = torch.tensor(ids)
    values = 1.0 + 3.0 * normal(seed, *lead, len(ids), k)
    centred = centre_within_components(values, components, 7)
    assert centred.shape == values.shape
    removed = values - centred
    for a in set(ids):
        mine = components == a
        torch.testing.assert_close(
            centred[..., mine, :].mean(-2), torch.zeros(*lead, k).double(), rtol=0, atol=1e-12
        )
        # One and the same row was subtracted from the whole component.
        spread = removed[..., mine, :] - removed[..., mine, :][..., :1, :]
        assert float(spread.abs().max()) < 1e-12
    again = centre_within_components(centred, components, 7)
    torch.testing.assert_close(again, centred, rtol=0, atol=1e-12)


# --- the noise model ------------------------------------------------------------------------------


def test_isotropic_estimates_the_noise_within_components():
    n, d, variance = 600, 50, 0.3
    ids = torch.tensor([3, 7, -2])[torch.arange(n) % 3]
    # Means of size 2 would add about 4 to the variance, were they not taken out.
    inputs = 2.0 * ids[:, None] + math.sqrt(variance) * normal(0, n, d)
    model = NoiseModel.isotropic(inputs, ids)
    # (n − C)d λ'/λ is chi-squared with (n − C)d degrees of freedom, hence this relative deviation.
    deviation = math.sqrt(2 / ((n - 3) * d))
    assert float(model.eigenvalues) == pytest.approx(variance, rel=4 * deviation)
    assert model.dimension == d
    torch.testing.assert_close(model.mass, d * model.eigenvalues)
    # Ids are renumbered from 0 in their own order: −2, 3, 7.
    assert torch.equal(model.components, torch.tensor([1, 2, 0])[torch.arange(n) % 3])
    assert float(NoiseModel.isotropic(inputs).eigenvalues) > 10 * variance


def test_isotropic_is_unbiased_when_components_are_small():
    # Two samples a component: dividing by n instead of n − C would halve the estimate.
    n, d = 400, 50
    inputs, ids = normal(1, n, d), torch.arange(n) // 2
    deviation = math.sqrt(2 / (n / 2 * d))
    estimate = float(NoiseModel.isotropic(inputs, ids).eigenvalues)
    assert estimate == pytest.approx(1, rel=4 * deviation)


def test_isotropic_takes_arrays_and_integer_images():
    images = torch.randint(256, (40, 6), generator=generator(0), dtype=torch.uint8)
    ids = torch.arange(40) % 2
    expected = NoiseModel.isotropic(images.double(), ids).eigenvalues
    from_array = NoiseModel.isotropic(images.numpy(), ids.numpy())
    assert from_array.eigenvalues.dtype == torch.float32
    torch.testing.assert_close(from_array.eigenvalues.double(), expected)
    moved = from_array.to(torch.device("cpu"), torch.float64)
    assert moved.eigenvalues.dtype == torch.float64
    assert torch.equal(moved.components, from_array.components)


@pytest.mark.parametrize(
    ("inputs", "components", "message"),
    [
        (torch.randn(10), None, "flatten each sample to one row"),
        (torch.randn(10, 2, 3), None, "flatten each sample to one row"),
        (torch.randn(0, 3), None, "flatten each sample to one row"),
        (torch.full((10, 2), math.nan), None, "clean them"),
        (torch.full((10, 2), math.inf), None, "clean them"),
        (torch.randn(10, 2), torch.zeros(9, dtype=torch.long), "expected 10 integer component ids"),
        (torch.randn(10, 2), torch.zeros(10, 1, dtype=torch.long), "one a sample"),
        (torch.randn(10, 2), torch.zeros(10), "integer component ids"),
        (torch.randn(10, 2), torch.arange(10), "more samples or fewer components"),
        (torch.randn(1, 2), None, "more samples or fewer components"),
        (torch.ones(10, 2), None, "needs noisy inputs"),
        (torch.arange(3.0)[torch.arange(9) % 3, None], torch.arange(9) % 3, "needs noisy inputs"),
    ],
    ids=[
        "vector", "images", "empty", "nan", "inf", "short-ids", "column-of-ids", "float-ids",
        "one-sample-each", "one-sample", "constant", "constant-within-components",
    ],
)  # fmt: skip
def test_isotropic_refuses_with_a_remedy(inputs, components, message):
    with pytest.raises(ValueError, match=message):
        NoiseModel.isotropic(inputs, components)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
def test_isotropic_bears_inputs_far_from_zero(offset):
    """float32 holds unit noise on an offset of 1e4 to 1e-3; λ's own standard error is 0.002."""
    inputs = torch.randn(20_000, 25, generator=generator(3)) + offset
    assert (
        abs(float(NoiseModel.isotropic(inputs).eigenvalues) - 1) < 4 * (2 / 500_000) ** 0.5 + 1e-3
    )


def test_isotropic_bears_a_constant_column():
    inputs = torch.randn(20_000, 25, generator=generator(3))
    inputs[:, 0] = 1e5
    expected = 24 / 25
    assert abs(float(NoiseModel.isotropic(inputs).eigenvalues) - expected) < 0.01


def test_isotropic_refuses_a_constant_that_rounds():
    with pytest.raises(ValueError, match="needs noisy inputs"):
        NoiseModel.isotropic(torch.full((1000, 4), 0.1))


@pytest.mark.parametrize(
    ("eigenvalues", "multiplicities", "message"),
    [
        ([1.0, -0.1], [3, 2], "not negative"),
        ([1.0, math.nan], [3, 2], "must be finite"),
        ([1.0, 0.5], [3], r"one shape \(bins,\)"),
        ([[1.0]], [[3]], r"one shape \(bins,\)"),
        ([1.0, 0.5], [3, 0], "must be positive"),
    ],
)
def test_noise_model_refuses_what_is_no_covariance(eigenvalues, multiplicities, message):
    with pytest.raises(ValueError, match=message):
        NoiseModel(torch.tensor(eigenvalues), torch.tensor(multiplicities))


def test_noise_model_of_several_bins():
    model = NoiseModel(torch.tensor([2.0, 0.5]), torch.tensor([3, 8]))
    assert model.dimension == 11
    assert torch.equal(model.mass, torch.tensor([6.0, 4.0]))
    assert model.components is None
