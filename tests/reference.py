"""The slow twin of decoupled descent: explicit loops in float64, every past step kept.

Written from ``docs/theory.md`` alone and sharing no code with the package, so that a slip in one is
seen as a disagreement with the other. Nothing here is a recursion: the weights and the Onsager
correction of step t are written out as sums over the steps s < t.

The mini-batch twin at the end is a recursion, but an eager one: every sample's shadow moves at
every step, and the optimizer's rule is written out for each number.
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


def scores_of(r: Tensor, head: Head, activation: Activation) -> Tensor:
    """Return the scores of one sample, shape (C,), at a pre-activation r, shape (k,)."""
    return head.weight @ activation(r + head.hidden_bias) + head.bias


def sample_loss(
    r: Tensor, head: Head, label: int, activation: Activation, shift: Tensor | float = 0.0
) -> Tensor:
    """Softmax cross-entropy of one sample, ℓ_i(r; θ) = log Σ_c exp(o_c) − o_label.

    Args:
        r: pre-activation of the sample without the hidden bias, shape (k,).
        head: θ, with o = head.weight · activation(r + head.hidden_bias) + head.bias.
        label: class of the sample.
        activation: applied to each hidden unit.
        shift: added to the scores, shape (C,).

    Returns:
        The loss, a scalar.
    """
    outputs = scores_of(r, head, activation) + shift
    return torch.log(torch.exp(outputs).sum()) - outputs[label]


def descended(head: Head, gradients: Sequence[Head], rate: float) -> Head:
    """Step θ by the plain mean of the samples' gradients."""
    means = (torch.stack(part).mean(0) for part in zip(*gradients, strict=True))
    return Head(*(parameter - rate * mean for parameter, mean in zip(head, means, strict=True)))


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
            head = descended(head, head_gradients, rates[t])
    return past


def shared_from_history(
    pushes: Sequence[Tensor], curvatures: Sequence[Tensor], rates: Sequence[float]
) -> Tensor:
    """Displacements of the shared parameters as a sum over past steps: equation (4) unrolled.

        ψ_i^t = Σ_{s<t} η_s Π_{r=s+1}^{t−1} (I − η_r H_ψ^r) ∂L_i/∂ψ^s.

    Args:
        pushes: ∂L_i/∂ψ at each past step, one row a sample, shape (n, p).
        curvatures: H_ψ at each past step, shape (p, p).
        rates: learning rates η_0, η_1, …

    Returns:
        ψ^t, shape (n, p).
    """
    displaced = torch.zeros_like(pushes[0])
    for s, push in enumerate(pushes):
        survives = torch.eye(push.shape[1], dtype=torch.float64)
        for r in range(s + 1, len(pushes)):
            survives = (torch.eye(push.shape[1]).double() - rates[r] * curvatures[r]) @ survives
        for i, row in enumerate(push):
            displaced[i] = displaced[i] + rates[s] * survives @ row
    return displaced


def decoupled_descent_with_head(
    inputs: Tensor,
    labels: Tensor,
    weight: Tensor,
    head: Head,
    activation: Activation,
    rates: Sequence[float],
    covariance: Tensor,
    directions: Tensor,
) -> list[tuple[Step, Tensor]]:
    """Decoupled descent that corrects the shared parameters ψ = (Ω, A) as well.

    Ω, shape (k, m + 1), is the layer along the m directions and its bias; A, shape (C, k + 1), is
    the head's weight and bias.

    Args:
        inputs: X, shape (n, d), float64.
        labels: class of each sample, shape (n,).
        weight: W^0, shape (d, k), float64.
        head: θ^0.
        activation: applied to each hidden unit; twice differentiable.
        rates: learning rate of each step.
        covariance: Σ in the complement of the directions, shape (d, d).
        directions: orthonormal columns, shape (d, m).

    Returns:
        Each step, and the displacements ψ of every sample at it, shape (n, p).
    """
    n, k = len(inputs), weight.shape[1]
    classes, along = len(head.bias), directions.shape[1] + 1
    masses = torch.ones(n).double()
    past: list[Step] = []
    pushes: list[Tensor] = []
    curvatures: list[Tensor] = []
    result: list[tuple[Step, Tensor]] = []
    for t in range(len(rates) + 1):
        current = weight_from_history(past, rates, inputs, weight, covariance, 1.0)
        bulk = torch.zeros(n, k).double()
        shared = torch.zeros(n, k * along + classes * (k + 1)).double()
        if past:
            bulk = shadow_from_history(past, rates, covariance, 1.0, masses)
            shared = shared_from_history(pushes, curvatures, rates)
        gradients, hessians, losses, push, head_gradients = [], [], [], [], []
        curvature = torch.zeros(shared.shape[1], shared.shape[1]).double()
        for i, (x, label) in enumerate(zip(inputs, labels.tolist(), strict=True)):
            u = torch.cat([directions.T @ x, torch.ones(1).double()])
            omega = shared[i, : k * along].reshape(k, along)
            extra = shared[i, k * along :].reshape(classes, k + 1)
            r = current.T @ x + bulk[i] + omega @ u
            features = torch.cat([activation(r + head.hidden_bias), torch.ones(1).double()])
            arguments = (r, head, label, activation, extra @ features)
            p = torch.softmax(scores_of(r, head, activation) + extra @ features, 0)
            e = p - torch.eye(classes).double()[label]
            g = torch.func.grad(sample_loss)(*arguments)
            through = torch.func.jacrev(scores_of)(r, head, activation).contiguous()
            jacobian = torch.cat(
                [
                    torch.kron(through, u[None]),
                    torch.kron(torch.eye(classes).double(), features[None]),
                ],
                1,
            )
            curvature += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / n
            push.append(
                torch.cat([torch.outer(g, u).flatten(), torch.outer(e, features).flatten()])
            )
            gradients.append(g)
            hessians.append(torch.func.hessian(sample_loss)(*arguments))
            losses.append(float(sample_loss(*arguments)))
            head_gradients.append(Head(g, torch.outer(e, features[:k]), e))
        step = Step(
            weight=current,
            shadow=bulk,
            head=head,
            gradients=torch.stack(gradients),
            curvature=torch.stack(hessians).mean(0),
            loss=sum(losses) / n,
        )
        past.append(step)
        pushes.append(torch.stack(push) / n)
        curvatures.append(curvature)
        result.append((step, shared))
        if t < len(rates):
            head = descended(head, head_gradients, rates[t])
    return result


class Rule(NamedTuple):
    """A linear optimizer, as ``torch.optim.SGD`` documents it, and decoupled weight decay."""

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    decoupled_weight_decay: bool = False

    def moved(self, x: Tensor, gradient: Tensor, pace: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the next value and momentum of x; the first momentum is the gradient itself."""
        g = -gradient if self.maximize else gradient
        if self.decoupled_weight_decay:
            x = x - self.lr * self.weight_decay * x
        else:
            g = g + self.weight_decay * x
        if self.momentum == 0.0:
            return x - self.lr * g, torch.zeros_like(x)
        pace = g if pace is None else self.momentum * pace + (1 - self.dampening) * g
        return x - self.lr * (g + self.momentum * pace if self.nesterov else pace), pace


def mini_batch_descent(
    inputs: Tensor,
    labels: Tensor,
    weight: Tensor,
    head: Head,
    activation: Activation,
    batches: Sequence[Sequence[int]],
    rules: Sequence[Rule],
    eigenvalues: Sequence[float],
    multiplicities: Sequence[int],
    relative_mass: Tensor | None = None,
) -> list[tuple[Tensor, Tensor, float]]:
    """Decoupled descent on mini-batches, equation (2), the shadow of every sample moved in each.

        ∇Q_{b,i} = λ_b Q_{b,i} H̄ − (ν_b λ_b r_i / m) g_i 1[i ∈ batch].

    A sample that a batch holds twice pushes twice.

    Args:
        inputs: X, shape (n, d), float64.
        labels: class of each sample, shape (n,).
        weight: W^0, shape (d, k), float64.
        head: θ^0.
        activation: applied to each hidden unit; twice differentiable.
        batches: samples of each step.
        rules: the optimizer's settings at each step.
        eigenvalues: λ of each bin.
        multiplicities: ν of each bin.
        relative_mass: r, shape (n,); equal masses by default.

    Returns:
        W (d, k) and Q (B, n, k) after each step, and the batch's loss before it.
    """
    n, k = len(inputs), weight.shape[1]
    mass = torch.ones(n).double() if relative_mass is None else relative_mass
    shadow = torch.zeros(len(eigenvalues), n, k).double()
    tensors: list[Tensor] = [weight, *head, shadow]
    paces: list[Tensor | None] = [None] * len(tensors)
    result = []
    for batch, rule in zip(batches, rules, strict=True):
        weight, shadow, head = tensors[0], tensors[-1], Head(*tensors[1:-1])
        m, loss = len(batch), 0.0
        gradients = [torch.zeros_like(x) for x in tensors]
        hessian = torch.zeros(k, k).double()
        for i in batch:
            arguments = (weight.T @ inputs[i] + shadow[:, i].sum(0), head, int(labels[i]))
            g, head_gradient = torch.func.grad(sample_loss, argnums=(0, 1))(*arguments, activation)
            hessian += mass[i] * torch.func.hessian(sample_loss)(*arguments, activation) / m
            loss += float(sample_loss(*arguments, activation)) / m
            gradients[0] += torch.outer(inputs[i], g) / m
            for total, part in zip(gradients[1:-1], head_gradient, strict=True):
                total += part / m
            for b, (value, count) in enumerate(zip(eigenvalues, multiplicities, strict=True)):
                gradients[-1][b, i] -= count * value * mass[i] / m * g
        for b, value in enumerate(eigenvalues):
            for i in range(n):
                gradients[-1][b, i] += value * shadow[b, i] @ hessian
        moved = [rule.moved(*each) for each in zip(tensors, gradients, paces, strict=True)]
        tensors, paces = [x for x, _ in moved], [pace for _, pace in moved]
        if rule.momentum == 0.0:
            paces = [None] * len(tensors)
        result.append((tensors[0], tensors[-1], loss))
    return result


class LineState(NamedTuple):
    """A state of training, or a direction that it may move in.

    Attributes:
        weight: W, shape (d, k).
        shadow: Q of every bin, shape (B, n, k).
        head: θ.
        shared: displacements ψ_i of the shared parameters (Ω, A), Ω with the layer's bias as its
            last column, shape (n, p); p = 0 where the head is left alone.
    """

    weight: Tensor
    shadow: Tensor
    head: Head
    shared: Tensor


class LinePoint(NamedTuple):
    """Coordinates of the linear family, in the order of its derivatives."""

    a: float
    s: float
    r: float
    q: float
    t: float


def line_maps(curvature: Tensor, point: LinePoint) -> tuple[Tensor, Tensor]:
    """A = aI + rP and B = sI + qP⁺ of a curvature H, each (k, k).

    P is H over its norm. P⁺ is the inverse of |H| over its own, where singular values below 3 % of
    the largest count as that much.
    """
    _, sizes, units = torch.linalg.svd(curvature)
    inverse = torch.zeros_like(curvature)
    for size, unit in zip(sizes, units, strict=True):
        inverse += torch.outer(unit, unit) / max(float(size), 0.03 * float(sizes[0]))
    drift = curvature / curvature.square().sum().sqrt()
    newton = inverse / inverse.square().sum().sqrt()
    identity = torch.eye(len(curvature)).double()
    return point.a * identity + point.r * drift, point.s * identity + point.q * newton


def line_moved(
    state: LineState, descent: LineState, curvature: Tensor, point: LinePoint, along: int
) -> LineState:
    """Where a point of the linear family leads, equation (5).

    Args:
        state: the present state.
        descent: what a gradient step of rate 1 moves along.
        curvature: H, shape (k, k).
        point: W, Q and the displacements of W go by its maps; θ and those of θ by its t.
        along: number of directions of the component means, m.
    """
    kept, moved = line_maps(curvature, point)
    shared = state.shared + point.t * descent.shared
    k = state.weight.shape[1]
    for i in range(len(shared) if shared.shape[1] else 0):
        omega = state.shared[i, : k * (along + 1)].reshape(k, along + 1)
        change = descent.shared[i, : k * (along + 1)].reshape(k, along + 1)
        here = shared[i, : k * (along + 1)].reshape(k, along + 1).clone()
        here[:, :along] = kept.T @ omega[:, :along] + moved.T @ change[:, :along]
        shared[i, : k * (along + 1)] = here.flatten()
    head = (part + point.t * step for part, step in zip(state.head, descent.head, strict=True))
    return LineState(
        state.weight @ kept + descent.weight @ moved,
        torch.stack([q @ kept for q in state.shadow])
        + torch.stack([q @ moved for q in descent.shadow]),
        Head(*head),
        shared,
    )


def line_rows(inputs: Tensor, state: LineState, means: Tensor) -> Tensor:
    """What W and its displacements make of the inputs, shape (n, k): R without its bias."""
    k, along = state.weight.shape[1], means.shape[1]
    rows = inputs @ state.weight
    for shadow in state.shadow:
        rows = rows + shadow
    if state.shared.shape[1]:
        for i, x in enumerate(inputs):
            omega = state.shared[i, : k * (along + 1)].reshape(k, along + 1)
            rows[i] += omega[:, :along] @ (means.T @ x)
    return rows


def line_sample(
    x: Tensor, i: int, state: LineState, activation: Activation, means: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """R_i, the features of the head, what is added to the scores, and the coordinates u_i."""
    r = state.weight.T @ x
    for shadow in state.shadow:
        r = r + shadow[i]
    k, classes = len(r), len(state.head.bias)
    u = torch.cat([means.T @ x, torch.ones(1).double()])
    shift = torch.zeros(classes).double()
    if state.shared.shape[1]:
        omega = state.shared[i, : k * len(u)].reshape(k, len(u))
        r = r + omega @ u
    features = torch.cat([activation(r + state.head.hidden_bias), torch.ones(1).double()])
    if state.shared.shape[1]:
        shift = state.shared[i, k * len(u) :].reshape(classes, k + 1) @ features
    return r, features, shift, u


def line_loss(
    inputs: Tensor, labels: Tensor, state: LineState, activation: Activation, means: Tensor
) -> float:
    """Mean loss at a state, from full products.

    Args:
        inputs: X, shape (n, d), float64.
        labels: class of each sample, shape (n,).
        state: anywhere.
        activation: applied to each hidden unit.
        means: orthonormal basis of the span of the component means, shape (d, m).
    """
    total = 0.0
    for i, (x, label) in enumerate(zip(inputs, labels.tolist(), strict=True)):
        r, _, shift, _ = line_sample(x, i, state, activation, means)
        total += float(sample_loss(r, state.head, label, activation, shift))
    return total / len(inputs)


def line_descent(
    inputs: Tensor,
    labels: Tensor,
    state: LineState,
    activation: Activation,
    eigenvalues: Sequence[float],
    multiplicities: Sequence[int],
    means: Tensor,
    curvature: Tensor | None = None,
) -> tuple[LineState, Tensor]:
    """What a gradient step of rate 1 moves along, equations (3) and (4), and H, shape (k, k).

    Args:
        inputs: X, shape (n, d), float64.
        labels: class of each sample, shape (n,).
        state: the present state.
        activation: applied to each hidden unit; twice differentiable.
        eigenvalues: λ of each bin.
        multiplicities: ν of each bin.
        means: orthonormal basis of the span of the component means, shape (d, m).
        curvature: H, shape (k, k); the exact one by default.
    """
    n, (d, k), classes = len(inputs), state.weight.shape, len(state.head.bias)
    weight, shadow = torch.zeros(d, k).double(), torch.zeros_like(state.shadow)
    head = [torch.zeros_like(part) for part in state.head]
    hessian, pushes = torch.zeros(k, k).double(), torch.zeros_like(state.shared)
    of_shared = torch.zeros(pushes.shape[1], pushes.shape[1]).double()
    for i, (x, label) in enumerate(zip(inputs, labels.tolist(), strict=True)):
        r, features, shift, u = line_sample(x, i, state, activation, means)
        arguments = (r, state.head, label, activation, shift)
        g, head_strain_message = torch.func.grad(sample_loss, argnums=(0, 1))(*arguments)
        hessian += torch.func.hessian(sample_loss)(*arguments) / n
        weight -= torch.outer(x, g) / n
        for total, part in zip(head, head_strain_message, strict=True):
            total -= part / n
        for b, (value, count) in enumerate(zip(eigenvalues, multiplicities, strict=True)):
            shadow[b, i] += count * value / n * g
        if pushes.shape[1]:
            p = torch.softmax(scores_of(r, state.head, activation) + shift, 0)
            e = p - torch.eye(classes).double()[label]
            through = torch.func.jacrev(scores_of)(r, state.head, activation).contiguous()
            identity = torch.eye(classes).double()
            jacobian = [torch.kron(through, u[None]), torch.kron(identity, features[None])]
            jacobian = torch.cat(jacobian, 1)
            of_shared += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / n
            push = [torch.outer(g, u).flatten(), torch.outer(e, features).flatten()]
            pushes[i] = torch.cat(push) / n
    hessian = hessian if curvature is None else curvature
    for b, value in enumerate(eigenvalues):
        for i in range(n):
            shadow[b, i] -= value * state.shadow[b, i] @ hessian
    for i in range(n):
        pushes[i] -= of_shared @ state.shared[i]
    return LineState(weight, shadow, Head(*head), pushes), hessian


def stein_of(preactivations: Tensor, gradients: Tensor, labels: Tensor, ridge: float) -> Tensor:
    """Stein's curvature by loops over components and samples; the ridge is relative to tr K / k.

    The H of (K + ε) H + H (K + ε) = C + Cᵀ, all k² equations at once: vec(AHB) = (A ⊗ Bᵀ) vec H
    where vec puts rows one after the other.
    """
    n, k = preactivations.shape
    covariance, cross = torch.zeros(k, k).double(), torch.zeros(k, k).double()
    for component in labels.unique().tolist():
        members = [i for i in range(n) if int(labels[i]) == component]
        mean = sum(preactivations[i] for i in members) / len(members)
        for i in members:
            centred = preactivations[i] - mean
            covariance += torch.outer(centred, centred) / n
            cross += torch.outer(centred, gradients[i])
    identity = torch.eye(k).double()
    ridged = covariance + ridge * covariance.trace() / k * identity
    equations = torch.kron(ridged, identity) + torch.kron(identity, ridged)
    return torch.linalg.solve(equations, (cross + cross.T).flatten()).reshape(k, k)


def kinks_of(
    preactivations: Tensor,
    gradients: Tensor,
    masses: Tensor | None = None,
    *,
    leaky: bool = False,
) -> Tensor:
    """What kinks at 0 add to the curvature, by loops: density times jump next to them, shape (k,).

    The density at the edge of one side of a sample is estimated by the linear boundary kernel
    4 − 6u on 0 < u < 1, u the distance in bandwidths of n^(-1/5) standard deviations.
    """
    n, k = preactivations.shape
    found = torch.zeros(k).double()
    for j in range(k):
        r, g = preactivations[:, j].tolist(), gradients[:, j].tolist()
        mean = sum(r) / n
        bandwidth = (sum((x - mean) ** 2 for x in r) / n) ** 0.5 / n**0.2
        flat_below = [y == 0 for x, y in zip(r, g, strict=True) if x < 0]
        if not leaky and not (flat_below and all(flat_below)):
            continue
        for i in range(n):
            u = abs(r[i]) / bandwidth
            side = 1 if r[i] > 0 else -1
            mass = 1.0 if masses is None else float(masses[i])
            if u < 1:
                found[j] += side * (4 - 6 * u) / bandwidth * mass * g[i]
    return found


def mismatch_of(
    preactivations: Tensor,
    gradients: Tensor,
    labels: Tensor,
    probe: Tensor,
    product: Tensor,
    kinks: Tensor,
    ridge: float,
    units: Tensor | None = None,
) -> tuple[float, float]:
    """How far Stein's curvature is from a probe's, beyond chance, by loops over samples.

    Each estimate is a sum of one matrix a sample, in the eigenbasis of K, and the variance of an
    entry of their difference is the sum of that entry's squares. Terms of kinks count by
    themselves, each hidden unit's too. Rows of one of ``units`` make one matrix together.

    Returns:
        ‖D‖ beyond its expectation over ‖P‖, and the standardised Σ D²/s² over pairs j ≤ l.
    """
    n, k = preactivations.shape
    centred, around = preactivations.clone(), gradients.clone()
    for component in labels.unique():
        members = labels == component
        centred[members] -= centred[members].mean(0)
        around[members] -= around[members].mean(0)
    sizes, axes = torch.linalg.eigh(sum(torch.outer(r, r) for r in centred) / n)
    sizes = sizes + ridge * sizes.mean()
    stein = axes.T @ stein_of(preactivations, gradients, labels, ridge) @ axes
    gram = sum(torch.outer(v, v) for v in probe) / n
    cross = sum(torch.outer(v, u) for v, u in zip(probe, product, strict=True))
    regressed = torch.linalg.solve(gram, cross)
    smooth = (regressed + regressed.T) / 2
    probed = axes.T @ (smooth + torch.diag(kinks.sum(0))) @ axes
    terms: dict[int, Tensor] = {}
    at_kinks: dict[int, Tensor] = {}
    for i in range(n):
        unit = i if units is None else int(units[i])
        r, v = axes.T @ centred[i], axes.T @ probe[i]
        left = axes.T @ around[i] - stein @ r / n
        right = axes.T @ (product[i] - regressed.T @ probe[i] / n)
        term = torch.zeros(k, k).double()
        for j in range(k):
            for m in range(k):
                of_stein = (r[j] * left[m] + r[m] * left[j]) / (sizes[j] + sizes[m])
                of_probe = (v[j] * right[m] + v[m] * right[j]) / 2
                term[j, m] = of_stein - of_probe
        terms[unit] = terms.get(unit, 0) + term
        at_kinks[unit] = at_kinks.get(unit, 0) + kinks[i]
    variance = torch.zeros(k, k).double()
    for unit, term in terms.items():
        for j in range(k):
            for m in range(k):
                variance[j, m] += term[j, m] ** 2
                for a in range(k):
                    variance[j, m] += (axes[a, j] * axes[a, m] * at_kinks[unit][a]) ** 2
    difference = stein - probed
    beyond = max(0.0, float((difference**2 - variance).sum())) ** 0.5
    ratios = [float(difference[j, m] ** 2 / variance[j, m]) for j in range(k) for m in range(j, k)]
    count = len(ratios)
    return beyond / float(probed.norm()), (sum(ratios) - count) / (2 * count) ** 0.5


class LinearCase(NamedTuple):
    """Square loss ‖V r − y_a‖²/2 of a linear head V, trained or not, on a Gaussian mixture.

    Attributes:
        weights: p, shape (A,).
        means: μ restricted to each bin, one (A, ν_b) tensor a bin.
        variances: λ of each bin.
        sizes: ν_b of each bin.
        targets: y, shape (A, C).
        alpha: n/d.
        rate: η.
        damping: ρ.
        decay: weight decay of W and V.
        trained: whether V is.
    """

    weights: Tensor
    means: Sequence[Tensor]
    variances: Sequence[float]
    sizes: Sequence[int]
    targets: Tensor
    alpha: float
    rate: float
    damping: float
    decay: float
    trained: bool


class LinearLimit(NamedTuple):
    """What the limit predicts before one step: loss, M (A, k) and K (k, k)."""

    loss: float
    overlaps: Tensor
    covariance: Tensor


def linear_state_evolution(
    case: LinearCase, start: Sequence[Tensor], head: Tensor, steps: int
) -> list[LinearLimit]:
    """State evolution where every expectation is known, as the recursion over pairs of steps.

    W of bin b moves by W ← W A − η Σ_a p_a μ_a E_a[g]ᵀ − η ζ with (ζ^s)ᵀζ^t = (ν_b/d) λ_b Γ^{st}/α.
    Kept are all products (W^s)ᵀW^t and (ζ^t)ᵀW^s; the second are zero at s = 0 and go on by
    (ζ^t)ᵀW^{s+1} = (ζ^t)ᵀW^s A_s − η (ζ^t)ᵀζ^s.

    Args:
        case: the problem.
        start: W⁰ restricted to each bin, (ν_b, k) each.
        head: V, shape (C, k).
        steps: number of updates.
    """
    bins, dimension = range(len(case.sizes)), sum(case.sizes)
    eta, p, y = case.rate, case.weights, case.targets
    gram = [{(0, 0): w.T @ w} for w in start]
    noise: list[dict[tuple[int, int], Tensor]] = [{} for _ in bins]
    means = [[case.means[b] @ start[b]] for b in bins]
    heads, maps, limits = [head], [], []
    for t in range(steps + 1):
        k_of = [sum(case.variances[b] * gram[b][(s, t)] for b in bins) for s in range(t + 1)]
        m_of = [sum(means[b][s] for b in bins) for s in range(t + 1)]
        v = heads[t]
        rest = [m @ w.T - y for m, w in zip(m_of, heads, strict=True)]
        second = [
            heads[s] @ k_of[s] @ v.T + rest[s].T @ (p[:, None] * rest[t]) for s in range(t + 1)
        ]
        limits.append(LinearLimit(float(second[t].trace()) / 2, m_of[t], k_of[t]))
        if t == steps:
            return limits
        curvature = v.T @ v
        signal = p[:, None] * (rest[t] @ v)
        identity = torch.eye(len(curvature), dtype=torch.float64)
        maps.append(
            [
                (1 - eta * case.decay) * identity
                - eta * case.damping * case.variances[b] * curvature
                for b in bins
            ]
        )
        for b in bins:
            scale = case.sizes[b] / dimension * case.variances[b] / case.alpha
            gamma = [scale * heads[s].T @ second[s] @ v for s in range(t + 1)]
            noise[b][(t, 0)] = torch.zeros_like(curvature)
            for s in range(t + 1):
                noise[b][(t, s + 1)] = noise[b][(t, s)] @ maps[s][b] - eta * gamma[s].T
            products = case.means[b] @ case.means[b].T
            means[b].append(means[b][t] @ maps[t][b] - eta * products @ signal)
            for s in range(t + 2):
                known = gram[b][(s, t)] if s <= t else gram[b][(t, t + 1)].T
                gram[b][(s, t + 1)] = (
                    known @ maps[t][b] - eta * means[b][s].T @ signal - eta * noise[b][(t, s)].T
                )
                gram[b][(t + 1, s)] = gram[b][(s, t + 1)].T
        heads.append(_descended_head(case, v, k_of[t], m_of[t], rest[t]))
    return limits


def _descended_head(
    case: LinearCase, v: Tensor, covariance: Tensor, overlaps: Tensor, rest: Tensor
) -> Tensor:
    if not case.trained:
        return v
    gradient = v @ covariance + rest.T @ (case.weights[:, None] * overlaps)
    return v - case.rate * (gradient + case.decay * v)


Pool = Callable[[Tensor], Tensor]


def unit_loss(r: Tensor, head: Head, label: int, activation: Activation, pool: Pool) -> Tensor:
    """Cross-entropy of a sample of several rows, pooled behind the activation.

    Args:
        r: pre-activations of its rows without the hidden bias, shape (P, k).
        head: θ.
        label: class of the sample.
        activation: applied to each hidden unit of each row.
        pool: makes one row (k,) of (P, k).
    """
    outputs = head.weight @ pool(activation(r + head.hidden_bias)) + head.bias
    return torch.log(torch.exp(outputs).sum()) - outputs[label]


def unit_gram(inputs: Tensor, components: Tensor) -> Tensor:
    """z_aᵀz_b of each sample's rows over the mean of ‖z‖², by loops, shape (n, P, P).

    Means are of each component in each position, and take 1/n_a of a row's noise with them.
    """
    n, rows, _ = inputs.shape
    centred, kept = torch.zeros_like(inputs), torch.zeros(n).double()
    total, degrees = 0.0, 0
    for component in components.unique().tolist():
        members = [i for i in range(n) if int(components[i]) == component]
        for a in range(rows):
            mean = sum(inputs[i, a] for i in members) / len(members)
            degrees += len(members) - 1
            for i in members:
                centred[i, a] = inputs[i, a] - mean
                total += float(centred[i, a] @ centred[i, a])
                kept[i] = 1 - 1 / len(members)
    found = torch.zeros(n, rows, rows).double()
    for i in range(n):
        for a in range(rows):
            for b in range(rows):
                found[i, a, b] = centred[i, a] @ centred[i, b] / kept[i] / (total / degrees)
    return found


def unit_stein(
    preactivations: Tensor, gradients: Tensor, components: Tensor, ridge: float
) -> Tensor:
    """Stein's curvature of samples of several rows: K a mean over rows, M a sum over rows.

    Args:
        preactivations: R, shape (n, P, k).
        gradients: ∂L/∂R with L a mean over samples, shape (n, P, k).
        components: of the samples.
        ridge: relative to tr K / k.
    """
    n, rows, k = preactivations.shape
    labels = [int(components[i]) * rows + a for i in range(n) for a in range(rows)]
    return stein_of(
        preactivations.reshape(n * rows, k),
        gradients.reshape(n * rows, k),
        torch.tensor(labels),
        ridge,
    )


def unit_probe(
    mean_loss: Callable[[Tensor], Tensor], preactivations: Tensor, probe: Tensor, gram: Tensor
) -> Tensor:
    """H = Σ_i Σ_ab T_ab v_a (HV)_bᵀ over VᵀV a row, from the second derivative in all rows.

    Args:
        mean_loss: of R, shape (n, P, k).
        preactivations: R.
        probe: V, likewise.
        gram: T, shape (n, P, P).
    """
    n, rows, k = preactivations.shape
    hessian = torch.func.hessian(mean_loss)(preactivations).reshape(n * rows * k, n * rows * k)
    product = (hessian @ probe.flatten()).view(n, rows, k)
    cross, square = torch.zeros(k, k).double(), torch.zeros(k, k).double()
    for i in range(n):
        for a in range(rows):
            square += torch.outer(probe[i, a], probe[i, a]) / (n * rows)
            for b in range(rows):
                cross += gram[i, a, b] * torch.outer(probe[i, a], product[i, b])
    found = torch.linalg.solve(square, cross)
    return (found + found.T) / 2


class UnitCase(NamedTuple):
    """What :func:`unit_descent` trains on.

    Attributes:
        inputs: all rows, shape (N, d), float64.
        units: unit of each row, shape (N,).
        gram: T of any two rows over the mean row's, shape (N, N); looked at within units alone.
        gradient: of the mean loss of some rows in R of all rows, and in θ.
    """

    inputs: Tensor
    units: Tensor
    gram: Tensor
    gradient: Callable[[Tensor, Head, list[int]], tuple[Tensor, Head]]


def unit_descent(
    case: UnitCase,
    start: tuple[Tensor, Head],
    batches: Sequence[list[int]],
    rule: Rule,
    spectrum: tuple[Sequence[float], Sequence[float]],
    curvature: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The rule of ``docs/several-rows.md``, eagerly: every row moves, pushed by its whole unit.

    Args:
        case: the data.
        start: W⁰ (d, k) and θ⁰.
        batches: rows of each step.
        rule: learning rate and momentum of all parameters.
        spectrum: λ and ν of each bin.
        curvature: H of the batch's R and of ∂L/∂R in all rows.

    Returns:
        W (d, k) and Q (B, N, k) in the end.
    """
    weight, head = start
    count, k, bins = len(case.inputs), weight.shape[1], list(zip(*spectrum, strict=True))
    shadow = torch.zeros(len(bins), count, k).double()
    speeds = [torch.zeros_like(weight), torch.zeros_like(shadow)]
    of_head = [torch.zeros_like(part) for part in head]
    for batch in batches:
        r = torch.stack([weight.T @ x + q for x, q in zip(case.inputs, shadow.sum(0), strict=True)])
        g, g_head = case.gradient(r, head, batch)
        h = curvature(r, g)
        along = torch.zeros_like(weight)
        moved = torch.zeros_like(shadow)
        for row in batch:
            along += torch.outer(case.inputs[row], g[row])
        for b, (value, number) in enumerate(bins):
            for row in range(count):
                moved[b, row] = value * shadow[b, row] @ h
                for other in batch:
                    if case.units[other] == case.units[row]:
                        moved[b, row] -= value * number * case.gram[row, other] * g[other]
        speeds = [rule.momentum * s + m for s, m in zip(speeds, (along, moved), strict=True)]
        of_head = [rule.momentum * s + m for s, m in zip(of_head, g_head, strict=True)]
        weight, shadow = weight - rule.lr * speeds[0], shadow - rule.lr * speeds[1]
        head = Head(*(p - rule.lr * s for p, s in zip(head, of_head, strict=True)))
    return weight, shadow
