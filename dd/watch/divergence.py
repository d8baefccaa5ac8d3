"""Whether the correction feeds back on itself: with fewer samples than inputs it can."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dd.functional import at_least_single
from dd.support.user_warning import warn_user

__all__ = ["DivergenceWarning", "DivergenceWatch", "SharpnessWatch", "feedback_growth"]

FEEDBACK, RISE, SHARE = 0.25, 1.2, 1 / 3
# Steps in a row past the stability edge; a single one is found on sound paths too.
PATIENCE = 5


class DivergenceWarning(UserWarning):
    """The recursion of decoupled descent grows without bound on this loss and these samples.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", dd.DivergenceWarning)  # end such a run at once
        >>> warnings.simplefilter("ignore", dd.StrainWarning)  # 25 samples of 50 inputs
        >>> warnings.simplefilter("ignore", dd.ShadowWarning)
        >>> linear = torch.nn.Linear(50, 1)
        >>> optimizer = dd.DecoupledDescent(linear, lr=0.05)
        >>> for step in range(100):
        ...     optimizer.zero_grad()
        ...     (linear(X[:25]).squeeze(1) - y[:25]).square().mean().backward()
        ...     optimizer.step()
        Traceback (most recent call last):
            ...
        dd.watch.divergence.DivergenceWarning: DecoupledDescent: with 25 samples of 50 inputs ...
    """


def feedback_growth(eigenvalues: Tensor, multiplicities: Tensor, num_samples: int) -> float:
    """Growth rate x* of the correction's feedback on itself, for unit curvature and unit rate.

    Linearised at curvature h, the pre-activations along an eigenvector of XXᵀ/n with eigenvalue s,
    Z = XW and shadows Q_b, follow Z' = −s h (Z + ΣQ_c), Q_b' = (τ_b/n) h (Z + ΣQ_c) − λ_b h Q_b. A
    growth rate h x of this solves s = −x + Σ_b (τ_b/n) x/(x + λ_b). The largest s that this allows
    a positive x is the smallest eigenvalue that XXᵀ/n has (Marchenko-Pastur), so that x* solves

        Σ_b ν_b (λ_b / (λ_b + x))² = n,

    which for Σ = λI is λ(√(d/n) − 1), and has no positive solution for n ≥ d.

    Args:
        eigenvalues: λ, shape (B,).
        multiplicities: ν, shape (B,).
        num_samples: n.

    Returns:
        x* in squared input units, 0 where there is no feedback.
    """
    values, counts = eigenvalues.double().cpu(), multiplicities.double().cpu()
    if float(counts[values > 0].sum()) <= num_samples:
        return 0.0
    low, high = 0.0, float((counts * values.square()).sum() / num_samples) ** 0.5
    for _ in range(60):
        middle = (low + high) / 2
        freedom = float((counts * (values / (values + middle)).square()).sum())
        low, high = (middle, high) if freedom > num_samples else (low, middle)
    return high


class _Watch:
    """Something that may have a warning to issue once a step is complete."""

    _due: str | None = None

    @property
    def is_due(self) -> bool:
        """Whether there is a warning to issue."""
        return self._due is not None

    def tell(self) -> None:
        """Issue the warning that is due; called by ``step`` when everything is updated."""
        due, self._due = self._due, None
        if due is not None:
            warn_user(due, DivergenceWarning)


class DivergenceWatch(_Watch):
    """Warns once, when the feedback of the correction drives the gradient up.

    Three things must come together: the predicted growth Γ = Σ_t η_t (x* λ_max(H_t) − weight
    decay), not counted below 0, has passed a quarter; ‖G‖ is 1.2 times the least so far, ‖G₀‖; and
    more than a third of its rise is what the motion of R makes of it at the present curvature,
    ⟨G, (R − R₀)H⟩/n over ⟨G, G − G₀⟩. For square loss on R itself that share is 1. Where the
    layers behind R grow, or the gradient saturates, it is small, and the feedback ends by itself.

    Costs nothing where x* is 0; else a copy of R and G, and time n k² a step.

    Args:
        eigenvalues: λ of the noise, shape (B,).
        multiplicities: ν, shape (B,).
        num_samples: n.
    """

    def __init__(self, eigenvalues: Tensor, multiplicities: Tensor, num_samples: int) -> None:
        self._growth = feedback_growth(eigenvalues, multiplicities, num_samples)
        self._samples, self._dimension = num_samples, round(float(multiplicities.sum()))
        self._done = self._growth == 0.0
        self._feedback = 0.0
        self._least = float("inf")
        self._now: Tensor | None = None
        self._then: tuple[Tensor, Tensor] | None = None

    @property
    def looks(self) -> bool:
        """Whether there is anything left to warn of."""
        return not self._done

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen so far, between two steps."""
        state = {"done": self._done, "feedback": self._feedback, "least": self._least}
        return {**state, "then": self._then, "samples": self._samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._done, self._feedback = state["done"], state["feedback"]
        self._least, self._then = state["least"], state["then"]

    def observe(self, preactivation: Tensor) -> None:
        """Keep R, shape (n, k), of a training forward."""
        if not self._done:
            self._now = at_least_single(preactivation.detach()).clone()

    def look(self, gradient: Tensor, curvature: Tensor, settings: Mapping[str, Any]) -> None:
        """Take one step into account.

        Args:
            gradient: G at the R last observed, shape (n, k).
            curvature: H, shape (k, k), symmetric.
            settings: of the optimizer's group that holds the decoupled layer.
        """
        if self._done or self._now is None or settings["maximize"]:
            return
        gradient = at_least_single(gradient)
        sharpest = float(torch.linalg.eigvalsh(curvature)[-1])
        decay = float(settings["weight_decay"])
        growth = _effective_rate(settings) * (self._growth * max(sharpest, 0.0) - decay)
        self._feedback = max(0.0, self._feedback + growth)
        norm = float(gradient.norm())
        if norm <= self._least or self._then is None:
            self._least, self._then = norm, (self._now, gradient.clone())
            return
        suspect = growth > 0 and self._feedback > FEEDBACK and norm > RISE * self._least
        if suspect and self._share(gradient, curvature) > SHARE:
            self._due = self._message(growth, sharpest)
            self._done, self._now, self._then = True, None, None

    def _share(self, gradient: Tensor, curvature: Tensor) -> float:
        assert self._now is not None
        assert self._then is not None
        preactivation, before = self._then
        moved = (self._now - preactivation).to(curvature) @ curvature / self._samples
        explained, rise = (float((gradient * by).sum()) for by in (moved, gradient - before))
        # ‖G‖ > ‖G₀‖ makes the rise positive.
        return explained / rise

    def _message(self, growth: float, sharpest: float) -> str:
        return (
            f"DecoupledDescent: with {self._samples} samples of {self._dimension} inputs the "
            f"correction feeds back on itself: pre-activations, training and test loss grow by "
            f"{growth:.2g} of themselves a step, and the gradient at the decoupled layer is "
            f"{RISE:g} times its least. Stop here and keep the weights of the lowest training "
            f"loss; or train with weight_decay={2 * self._growth * sharpest:.2g} (above half of "
            "that the growth ends, at that it is small from the start); or give as many samples "
            "as inputs, or a loss of bounded gradient, such as cross-entropy."
        )


class SharpnessWatch(_Watch):
    """Warns once, when the displacements that ``head=True`` follows leave their stability edge.

    They obey a linear recursion with curvature H_ψ, which grows where η λ_max(H_ψ) exceeds
    2 (1 + momentum) (heavy ball). The weights themselves return from such an edge by a change of
    curvature, their displacements do not. λ_max is followed by two power iterations a step, time
    p².
    """

    def __init__(self) -> None:
        self._direction: Tensor | None = None
        self._past = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen so far."""
        return {"direction": self._direction, "past": self._past}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._direction, self._past = state["direction"], state["past"]

    def look(self, curvature: Tensor, groups: list[dict[str, Any]]) -> None:
        """Take one step into account.

        Args:
            curvature: H_ψ, shape (p, p), symmetric, not negative.
            groups: the optimizer's parameter groups.
        """
        if self._past >= PATIENCE:
            return
        if self._direction is None:
            generator = torch.Generator().manual_seed(0)
            self._direction = torch.randn(
                len(curvature), generator=generator, dtype=torch.float32
            ).to(curvature)
        for _ in range(2):
            image = curvature @ self._direction
            sharpness = image.norm()
            self._direction = image / sharpness.clamp_min(torch.finfo(image.dtype).tiny)
        rate = max(float(group["lr"]) for group in groups)
        edge = 2 * (1 + max(float(group["momentum"]) for group in groups))
        excess = rate * float(sharpness)
        self._past = self._past + 1 if excess > edge else 0
        if self._past >= PATIENCE:
            self._due = (
                f"DecoupledDescent: for {PATIENCE} steps lr={rate:g} times the largest curvature "
                f"of what head=True follows has been above {edge:g} (now {excess:.3g}): the "
                "correction grows by itself, and the training error is no estimate any more. Lower "
                "lr, or use head=False."
            )


def _effective_rate(settings: Mapping[str, Any]) -> float:
    rate, momentum = float(settings["lr"]), float(settings["momentum"])
    # Momentum makes of one push a geometric series of them.
    return rate if momentum == 0 else rate * (1 - settings["dampening"]) / (1 - momentum)
