"""Second oracle: a shadow is what retraining without the sample would do to its pre-activation.

Section 2 of ``docs/theory.md`` defines q_i = x_iᵀ(W^(−i) − W), with W^(−i) trained while sample i
weighs nothing and the 1/n is kept. Here every W^(−i) is trained, all other parameters too, by the
fast functions with the left-out sample as leading dimension, and compared with the Q they keep.

The match is to leading order. The remainder at small n grows with the steps and the size of the
head: with head weights N(0, 1.5²) and 30 steps the error at n = 240 is 0.26, not 0.12, while at
n = 960 it is 0.06 either way.
"""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dd.functional import corrected_preactivation, shadow_gradient
from tests.reference import Head, sample_loss

K, CLASSES, RATE, STEPS, SIGNAL = 3, 2, 0.1, 20, 2.5

ShadowRule = Callable[..., Tensor]


def xor_mixture(n: int, d: int, seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """Four clusters at ±μ_a, ±μ_b with unit noise, labelled by the axis.

    Args:
        n: samples.
        d: dimension.
        seed: of the generator that is handed on.

    Returns:
        Inputs (n, d), labels (n,), and the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, d, generator=generator, dtype=torch.float64)
    axis, sign = torch.randint(2, (2, n), generator=generator)
    inputs[torch.arange(n), axis] += SIGNAL * (2.0 * sign - 1.0)
    return inputs, axis, generator


def pointwise_derivatives(
    r: Tensor, labels: Tensor, hidden_bias: Tensor, head_weight: Tensor, head_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives by hand of cross-entropy ∘ linear head ∘ tanh, for M networks at once.

    With h = tanh(r + b), J = ∂o/∂r = A diag(1 − h²) and e = softmax(o) − onehot: g = Jᵀe, and
    ∂²ℓ/∂r² = Jᵀ(diag p − ppᵀ)J + diag(−2h(1 − h²) Aᵀe).

    Args:
        r: shape (M, n, k).
        labels: shape (n,).
        hidden_bias: b, shape (M, k).
        head_weight: A, shape (M, C, k).
        head_bias: shape (M, C).

    Returns:
        g (M, n, k); the Hessians (M, n, k, k); e (M, n, C); h (M, n, k).
    """
    hidden = torch.tanh(r + hidden_bias[:, None])
    slope = 1 - hidden.square()
    probabilities = torch.softmax(hidden @ head_weight.mT + head_bias[:, None], -1)
    residual = probabilities - torch.nn.functional.one_hot(labels, CLASSES)
    pulled = residual @ head_weight
    jacobian = head_weight[:, None] * slope[:, :, None]
    centred = jacobian - (probabilities[..., None] * jacobian).sum(-2, keepdim=True)
    hessian = (probabilities[..., None] * centred).mT @ jacobian
    hessian = hessian + torch.diag_embed(-2 * hidden * slope * pulled)
    return slope * pulled, hessian, residual, hidden


@functools.cache
def displacements(
    n: int,
    d: int,
    seed: int,
    rule: ShadowRule = shadow_gradient,
    left_out: int | None = None,
    own_mass: bool = False,
) -> tuple[Tensor, Tensor]:
    """Predicted and retrained displacement of every left-out sample after ``STEPS`` steps.

    Args:
        n: samples.
        d: dimension.
        seed: of data and initialisation.
        rule: gradient of the shadows.
        left_out: how many samples to leave out in turn (the first ones); all by default.
        own_mass: give each sample its own mass ‖x_i‖² instead of d.

    Returns:
        Q_i and D_i = x_iᵀ(W^(−i) − W), each of shape (left out, k).
    """
    inputs, labels, generator = xor_mixture(n, d, seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    m = n if left_out is None else left_out
    # Network m is trained on everything; network i < m weighs sample i by nothing.
    weights = torch.ones(m + 1, n, 1, dtype=torch.float64)
    weights[torch.arange(m), torch.arange(m)] = 0.0

    weight = (0.5 * normal(K, d) / math.sqrt(d)).repeat(m + 1, 1, 1)
    head_weight = (normal(CLASSES, K) / math.sqrt(K)).repeat(m + 1, 1, 1)
    hidden_bias = torch.zeros(m + 1, K, dtype=torch.float64)
    head_bias = torch.zeros(m + 1, CLASSES, dtype=torch.float64)
    shadow = torch.zeros(m + 1, 1, n, K, dtype=torch.float64)
    eigenvalues = torch.ones(1, dtype=torch.float64)
    mass = torch.tensor([float(d)], dtype=torch.float64)
    # Mass multiplies G alone, so a mass of one's own is a factor on G.
    relative_mass = inputs.square().sum(1, keepdim=True) / d if own_mass else torch.ones(n, 1)

    for _ in range(STEPS):
        r = corrected_preactivation(inputs @ weight.mT, shadow)
        g, hessian, residual, hidden = pointwise_derivatives(
            r, labels, hidden_bias, head_weight, head_bias
        )
        gradient, residual = weights * g / n, weights * residual / n
        curvature = (weights[..., None] * hessian).sum(1) / n
        # The left-out sample keeps its shadow's equation; its g is zero, so its shadow stays zero.
        shadow = shadow - RATE * rule(
            shadow, gradient * relative_mass, curvature, eigenvalues, mass
        )
        weight = weight - RATE * gradient.mT @ inputs
        hidden_bias = hidden_bias - RATE * gradient.sum(1)
        head_weight = head_weight - RATE * residual.mT @ hidden
        head_bias = head_bias - RATE * residual.sum(1)

    moved = ((weight[:m] - weight[m]) @ inputs[:m, :, None]).squeeze(-1)
    return shadow[m, 0, :m], moved


def wrong_sign(shadow: Tensor, gradient: Tensor, *rest: Tensor) -> Tensor:
    """Shadow gradient with the push added where it is to be removed."""
    return shadow_gradient(shadow, -gradient, *rest)


def no_decay(*arguments: Tensor) -> Tensor:
    """Shadow gradient in which removed pushes never decay."""
    return shadow_gradient(*arguments, damping=0.0)


def mean_relative_error(n: int, d: int, seeds: int, **options: object) -> float:
    """‖Q − D‖/‖D‖ over the left-out samples, averaged over seeds 0, 1 and so on."""
    errors = []
    for seed in range(seeds):
        predicted, moved = displacements(n, d, seed, **options)
        errors.append(float((predicted - moved).norm() / moved.norm()))
    return sum(errors) / seeds


def mean_correlation(n: int, d: int, seeds: int, **options: object) -> float:
    """Correlation of the entries of Q and D, averaged over seeds 0, 1 and so on."""
    pairs = (displacements(n, d, seed, **options) for seed in range(seeds))
    return (
        sum(float(torch.corrcoef(torch.stack([q, m]).flatten(1))[0, 1]) for q, m in pairs) / seeds
    )


def mass_deviation(d: int) -> float:
    """Relative error of putting d for ‖z_i‖², which is chi-squared: √(2/d)."""
    return math.sqrt(2 / d)


def test_pointwise_derivatives_equal_autograd():
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 5, K), (2, K), (2, CLASSES, K), (2, CLASSES)
    r, *head = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)
    labels = torch.arange(5) % CLASSES
    g, hessian, _, _ = pointwise_derivatives(r, labels, *head)
    for m in range(2):
        theta = Head(*(p[m] for p in head))
        for i in range(5):
            arguments = r[m, i], theta, int(labels[i]), torch.tanh
            torch.testing.assert_close(g[m, i], torch.func.grad(sample_loss)(*arguments))
            torch.testing.assert_close(hessian[m, i], torch.func.hessian(sample_loss)(*arguments))


@pytest.mark.parametrize(("n", "d", "seeds"), [(60, 40, 12), (240, 160, 3)])
def test_shadow_is_the_leave_one_out_displacement(n, d, seeds):
    # To leading order D_i = Q_i ‖z_i‖²/d, so the error is the deviation √(2/d) of ‖z_i‖²/d from 1,
    # and the correlation 1/√(1 + 2/d). Beyond it: the spread of a standard deviation estimated from
    # n samples, 1/√(2n) a seed, at most 0.03; and remainders such as ‖μ‖²/d.
    error = mean_relative_error(n, d, seeds)
    assert error / mass_deviation(d) == pytest.approx(1, abs=0.25)
    assert mean_correlation(n, d, 1) > 1 - 1.5 * mass_deviation(d) ** 2 / 2 - 1 / n


def test_own_mass_leaves_an_error_that_falls_with_size():
    # With ‖x_i‖² for d the leading term is gone; what is left falls at least like n^{-1/2}, by half
    # for four times the size; half as much again is allowed for the spread over seeds.
    small = mean_relative_error(60, 40, 12, own_mass=True)
    large = mean_relative_error(240, 160, 3, own_mass=True)
    assert large / small < 0.75
    assert small < mass_deviation(40) / 2
    assert large < mass_deviation(160) / 2


def test_wrong_corrections_lose_the_match():
    n, d, seeds = 240, 160, 2
    assert mean_relative_error(n, d, seeds, rule=wrong_sign, own_mass=True) > 1.0
    assert mean_correlation(n, d, 1, rule=wrong_sign, own_mass=True) < -0.5
    # Without decay the shadows are too large by what has decayed, a few times the error that is
    # left when every sample has its own mass.
    right = mean_relative_error(n, d, seeds, own_mass=True)
    assert mean_relative_error(n, d, seeds, rule=no_decay, own_mass=True) > 2.5 * right


@pytest.mark.slow
def test_error_falls_like_root_n():
    seeds, left_out = 4, 100
    errors = {
        n: mean_relative_error(n, 2 * n // 3, s, left_out=min(n, left_out))
        for n, s in ((60, 12), (240, 6), (960, seeds))
    }
    # Four times the samples, half the error: √(2/d) at each size, see above. The largest leaves out
    # 4 × 100 samples, hence a spread of 0.04.
    for n, error in errors.items():
        assert error / mass_deviation(2 * n // 3) == pytest.approx(1, abs=0.25)
    assert errors[240] / errors[60] == pytest.approx(0.5, rel=0.2)
    assert errors[960] / errors[240] == pytest.approx(0.5, rel=0.2)
    own = mean_relative_error(960, 640, seeds, left_out=left_out, own_mass=True)
    assert own < mass_deviation(640) / 2
    lost = mean_relative_error(960, 640, seeds, left_out=left_out, own_mass=True, rule=no_decay)
    assert lost > 2.5 * own
    assert mean_correlation(960, 640, 1, left_out=left_out) > 0.997
