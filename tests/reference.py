"""The slow twin of decoupled descent: explicit loops in float64, every past step kept.

Written from ``docs/theory.md`` alone and sharing no code with the package, so that a slip in one is
seen as a disagreement with the other. Nothing here is a recursion: the weights and the Onsager
correction of step t are written out as sums over the steps s < t.

Where later features belong: a mini-batch makes the rows of ``Step.gradients`` outside the batch
zero and n the batch's size; momentum makes each factor a map of (position, velocity).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


class Head(NamedTuple):
    """θ: every parameter but W. Low-dimensional, so it needs no correction.

    Attributes:
        hidden_bias: bias of the hidden layer, shape (k,).
        weight: linear head, shape (C, k).
        bias: bias of the head, shape (C,).
    """

    hidden_bias: Tensor
    weight: Tensor
    bias: Tensor


class Step(NamedTuple):
    """Everything known at one step t, before its update.

    Attributes:
        weight: W^t, shape (d, k).
        shadow: Q^t, shape (n, k).
        head: θ^t.
        gradients: g_i^t = ∂ℓ_i/∂r at R^t = X W^t + Q^t, one row a sample, shape (n, k).
        curvature: H̄^t, mean over samples of r_i ∂²ℓ_i/∂r² at R^t, r_i = ‖z_i‖² / mean, shape
            (k, k).
        loss: mean of ℓ_i at R^t.
    """

    weight: Tensor
    shadow: Tensor
    head: Head
    gradients: Tensor
    curvature: Tensor
    loss: float


def sample_loss(r: Tensor, head: Head, label: int, activation: Activation) -> Tensor:
    """Softmax cross-entropy of one sample, ℓ_i(r; θ) = log Σ_c exp(o_c) − o_label.

    Args:
        r: pre-activation of the sample without the hidden bias, shape (k,).
        head: θ, with o = head.weight · activation(r + head.hidden_bias) + head.bias.
        label: class of the sample.
        activation: applied to each hidden unit.

    Returns:
        The loss, a scalar.
    """
    outputs = head.weight @ activation(r + head.hidden_bias) + head.bias
    return torch.log(torch.exp(outputs).sum()) - outputs[label]


def shadow_from_history(
    past: Sequence[Step],
    rates: Sequence[float],
    covariance: Tensor,
    damping: float,
    relative_mass: Tensor,
) -> Tensor:
    """Onsager correction as a sum over past steps: equation (3) unrolled, before any binning.

    The push x_i g_iᵀ of step s decays by W ↦ W − η_r ρ Σ W H̄^r at every later step r, a linear map
    of d × k matrices; x_iᵀ(·)x_i is replaced by its mean, the trace against Σ:

        Q_i^t = (r_i/n) Σ_{s<t} η_s tr_d[ (Σ ⊗ I) Π_{r=s+1}^{t−1} (I − η_r ρ Σ ⊗ H̄^r) ] g_i^s,

    the newest factor on the left, tr_d the trace over the input's index, r_i = ‖z_i‖² / mean.

    Args:
        past: steps 0 … t − 1, at least one.
        rates: learning rates η_0, η_1, …
        covariance: Σ, shape (d, d).
        damping: ρ.
        relative_mass: r, shape (n,).

    Returns:
        Q^t, shape (n, k).
    """
    n, k = past[0].gradients.shape
    d = len(covariance)
    identity = torch.eye(d * k, dtype=torch.float64)
    shadow = torch.zeros(n, k, dtype=torch.float64)
    for s in range(len(past)):
        survives = identity
        for r in range(s + 1, len(past)):
            decay = torch.kron(covariance, past[r].curvature)
            survives = (identity - rates[r] * damping * decay) @ survives
        response = torch.einsum("ab,bpaq->pq", covariance, survives.reshape(d, k, d, k))
        for i in range(n):
            push = rates[s] / n * relative_mass[i]
            shadow[i] = shadow[i] + push * (response @ past[s].gradients[i])
    return shadow


def weight_from_history(
    past: Sequence[Step],
    rates: Sequence[float],
    inputs: Tensor,
    initial: Tensor,
    covariance: Tensor,
    damping: float,
) -> Tensor:
    """Weights as a sum over past steps: section 6 unrolled.

        W^t = W^0 − Σ_{s<t} η_s [ (1/n) Σ_i x_i (g_i^s)ᵀ − (1 − ρ) Σ W^s H̄^s ].

    Args:
        past: steps 0 … t − 1.
        rates: learning rates η_0, η_1, …
        inputs: X, shape (n, d).
        initial: W^0, shape (d, k).
        covariance: Σ, shape (d, d).
        damping: ρ.

    Returns:
        W^t, shape (d, k).
    """
    weight = initial
    for s, step in enumerate(past):
        push = torch.zeros_like(initial)
        for x, g in zip(inputs, step.gradients, strict=True):
            push = push + torch.outer(x, g) / len(inputs)
        drift = covariance @ step.weight @ step.curvature
        weight = weight - rates[s] * (push - (1 - damping) * drift)
    return weight


def decoupled_descent(
    inputs: Tensor,
    labels: Tensor,
    weight: Tensor,
    head: Head,
    activation: Activation,
    rates: Sequence[float],
    noise: float | Tensor = 1.0,
    damping: float = 1.0,
    relative_mass: Tensor | None = None,
) -> list[Step]:
    """Full-batch decoupled descent on a two-layer network, exact curvature.

    θ descends the plain gradient (1/n) Σ_i ∂ℓ_i/∂θ taken at R.

    Args:
        inputs: X, shape (n, d), float64.
        labels: class of each sample, shape (n,).
        weight: W^0, shape (d, k), float64.
        head: θ^0.
        activation: applied to each hidden unit; twice differentiable.
        rates: learning rate of each step, η_0 … η_{T−1}.
        noise: covariance Σ, shape (d, d), or the variance λ of isotropic noise Σ = λI.
        damping: ρ.
        relative_mass: ‖z_i‖² over its mean, shape (n,); equal masses by default.

    Returns:
        The T + 1 steps, from the initial state to the state after the last update.
    """
    n, d = inputs.shape
    covariance = noise * torch.eye(d).double() if isinstance(noise, float) else noise
    relative_mass = torch.ones(n).double() if relative_mass is None else relative_mass
    gradient_of = torch.func.grad(sample_loss, argnums=(0, 1))
    hessian_of = torch.func.hessian(sample_loss)
    past: list[Step] = []
    for t in range(len(rates) + 1):
        current = weight_from_history(past, rates, inputs, weight, covariance, damping)
        shadow = torch.zeros(n, weight.shape[1], dtype=torch.float64)
        if past:
            shadow = shadow_from_history(past, rates, covariance, damping, relative_mass)
        gradients, head_gradients, hessians, losses = [], [], [], []
        for x, q, label in zip(inputs, shadow, labels.tolist(), strict=True):
            arguments = (current.T @ x + q, head, label, activation)
            g, head_gradient = gradient_of(*arguments)
            gradients.append(g)
            head_gradients.append(head_gradient)
            hessians.append(hessian_of(*arguments))
            losses.append(float(sample_loss(*arguments)))
        past.append(
            Step(
                weight=current,
                shadow=shadow,
                head=head,
                gradients=torch.stack(gradients),
                curvature=torch.stack(
                    [m * h for m, h in zip(relative_mass, hessians, strict=True)]
                ).mean(0),
                loss=sum(losses) / n,
            )
        )
        if t < len(rates):
            head = Head(
                *(
                    parameter - rates[t] * torch.stack(gradient).mean(0)
                    for parameter, gradient in zip(
                        head, zip(*head_gradients, strict=True), strict=True
                    )
                )
            )
    return past
