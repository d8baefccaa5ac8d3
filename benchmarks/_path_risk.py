"""The error of plain gradient descent on new data, at every step of its path, for square loss.

After Bellec and Tan, *Uncertainty quantification for iterative algorithms in linear models with
application to early stopping* (arXiv 2404.17856), and Tan and Bellec, *Estimating generalization
performance along the trajectory of proximal SGD in robust regression* (arXiv 2410.02629), whose
estimator takes this form for gradient descent of one rate.

Let b⁰ = 0 be the first iterate, S = XᵀX/n, r^t = y − Xb^t the residuals and M = (1 − ηω)I − ηS, so
that b^{t+1} = (1 − ηω)b^t + (η/n)Xᵀr^t. Let sample i weigh nothing (the 1/n kept): its own pushes
(η/n) x_i r_i^s go, and so does what they did to those that followed. For δ^t, the iterate with the
sample less the one without it,

    δ^{t+1} = (1 − ηω)δ^t − (η/n) Σ_{j≠i} x_j x_jᵀ δ^t + (η/n) x_i r_i^t
            = Mδ^t + (η/n) x_i (r_i^t + x_iᵀδ^t).

r̂_i^t = r_i^t + x_iᵀδ^t is the residual of the iterate that never saw the sample. It obeys, exactly,

    r̂_i^t = r_i^t + Σ_{s<t} a_i^{t−1−s} r̂_i^s,       a_i^k = (η/n) x_iᵀ M^k x_i.

With Gaussian inputs and n and d of one order, a_i^k concentrates on its mean over the samples,

    a^k = (η/n) tr(S M^k),

which is an entry of the papers' memory matrix: Â_{t,s} = n a^{t−1−s} below the diagonal. So
r̂ = (I − Â/n)^{-1} r, the same triangular matrix for every sample, and ‖r̂^t‖²/n estimates the mean
squared error of b^t on new data. Neither the covariance of the inputs nor the noise is needed; all
T residuals of every sample are.
"""

import torch
from torch import Tensor


def traces(inputs: Tensor, lr: float, steps: int, weight_decay: float = 0.0) -> Tensor:
    """Return a^0 … a^{T−1} from all eigenvalues of S, in time n d min(n, d), memory min(n, d)².

    Args:
        inputs: X, shape (n, d).
        lr: learning rate η.
        steps: number T of updates.
        weight_decay: ω.

    Returns:
        Shape (T,), float64.
    """
    n, d = inputs.shape
    gram = inputs.T @ inputs if d < n else inputs @ inputs.T
    eigenvalues = torch.linalg.eigvalsh(gram).double() / n
    decay = 1 - lr * weight_decay - lr * eigenvalues
    powers = torch.arange(steps, dtype=torch.float64, device=inputs.device)
    return lr / n * (eigenvalues * decay.pow(powers[:, None])).sum(1)


def probed_traces(
    inputs: Tensor,
    lr: float,
    steps: int,
    weight_decay: float = 0.0,
    *,
    probes: int,
    generator: torch.Generator,
) -> Tensor:
    """Return a^0 … a^{T−1} by Hutchinson's estimator, in T products of X with every probe.

    With u^k = M^k Xᵀz, z of random signs, n tr(S M^{j+k}) is the mean of (u^j)ᵀu^k: half as many
    powers as traces are enough.

    Args:
        inputs: X, shape (n, d).
        lr: learning rate η.
        steps: number T of updates.
        weight_decay: ω.
        probes: number of vectors z.
        generator: draws them, on the CPU.

    Returns:
        Shape (T,), float64.
    """
    n = len(inputs)
    found = torch.zeros(2 * ((steps + 1) // 2), dtype=torch.float64)
    # One by one: two columns at once would take many times as long as two products with one.
    for _ in range(probes):
        signs = 2 * torch.randint(2, (n,), generator=generator) - 1
        moved = inputs.T @ signs.to(inputs)
        for k in range(0, steps, 2):
            following = (1 - lr * weight_decay) * moved - lr / n * (inputs.T @ (inputs @ moved))
            found[k] += float(moved @ moved)
            found[k + 1] += float(moved @ following)
            moved = following
    return lr / n**2 * found[:steps] / probes


def path_risk(residuals: Tensor, traces: Tensor) -> Tensor:
    """Estimate the mean squared error on new data of every iterate.

    Args:
        residuals: r^0 … r^T, shape (T + 1, n).
        traces: a^0 … a^{T−1}, shape (T,).

    Returns:
        Shape (T + 1,), in squared units of the residuals.
    """
    count, n = residuals.shape
    age = torch.arange(count)[:, None] - torch.arange(count) - 1
    memory = torch.where(age >= 0, traces[age.clamp(min=0)], 0.0)
    identity = torch.eye(count, dtype=memory.dtype)
    weights = torch.linalg.solve_triangular(identity - memory, identity, upper=False).to(residuals)
    # In parts, so that the corrected residuals do not take the memory of the residuals once more.
    parts = [(weights @ part).square().sum(1) for part in residuals.split(256, dim=1)]
    return torch.stack(parts).sum(0) / n
