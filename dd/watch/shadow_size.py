"""Whether the shadows are larger than the theory can explain."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dd.functional import at_least_single
from dd.noise.model import NoiseModel

__all__ = [
    "ShadowSizeWatch",
    "ShadowWarning",
    "largest_shadow_ratio",
    "shadow_size_message",
    "shares",
]

# Above what the theory allows, by sampling and by tails of the noise.
MARGIN = 1.5
# Whatever it allows: the network is then trained on its shadows more than on its inputs.
MOST = 0.9
# Rows that a look takes in at most, and at least.
ROWS, FEWEST = 2048, 256


class ShadowWarning(UserWarning):
    """Shadows larger than the theory can explain: the training error is not to be believed.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", dd.ShadowWarning)  # end such a run at once
        >>> noise = dd.NoiseModel(torch.tensor([30.0]), torch.tensor([50.0]))  # 30 times too much
        >>> optimizer = dd.DecoupledDescent(model, lr=1.0, noise=noise)
        >>> for step in range(10):
        ...     optimizer.zero_grad()
        ...     criterion(model(X), y).backward()
        ...     optimizer.step()
        Traceback (most recent call last):
            ...
        dd.watch.shadow_size.ShadowWarning: DecoupledDescent: at training forward ...
    """


def largest_shadow_ratio(noise: NoiseModel, num_samples: int) -> float:
    """Largest |Q|/|R| that the theory can explain.

    A sample's shadow is made of the pushes that the weights are made of: in the limit
    E‖q‖² ≤ (d/n) tr Cov(r), with equality where the weights hold noise alone and W⁰ is forgotten.
    Unequal masses multiply it by their root mean square. Section 5 of ``docs/theory.md``.

    Args:
        noise: of the inputs.
        num_samples: n.
    """
    mass = noise.relative_mass
    tails = 1.0 if mass is None else float(mass.double().square().mean().sqrt())
    if noise.is_followed_exactly and noise.norm_variation is not None:
        # Every sample's own mass is in its coordinates.
        tails = math.hypot(1.0, noise.norm_variation)
    if noise.units is not None:
        num_samples = round(noise.units.effective_rows)
    return min(MOST, MARGIN * math.sqrt(noise.dimension / num_samples) * tails)


def shadow_size_message(share: float) -> str:
    """Say what too large a share, |Q|/|R|, means."""
    return (
        f"The shadows grew to {share:.2g} of the pre-activations, more than the theory can explain."
    )


def shares(shadow: Tensor, preactivation: Tensor) -> Tensor:
    """|Q|/|R| of many trials, shape (S,), float64; NaN of a layer at zero, and of one sample.

    Args:
        shadow: Q of all bins together, shape (S, m, k).
        preactivation: R, shape (S, m, k).
    """
    some = slice(None, None, -(-preactivation.shape[1] // ROWS))
    shadow, preactivation = shadow[:, some].double(), preactivation[:, some].double()
    if preactivation.shape[1] < 2:
        return torch.full_like(shadow[:, 0, 0], torch.nan)
    spread = preactivation.var(1).sum(-1)
    return (shadow.square().mean(1).sum(-1) / spread).sqrt()


class ShadowSizeWatch:
    """Compares shadows and pre-activations, a few thousand rows at a time.

    Attributes:
        found: the first |Q|/|R| above the limit, or None.
        latest: |Q|/|R| of the latest look.
    """

    def __init__(self) -> None:
        self._squares = [0.0, 0.0]
        self._rows = 0
        self.found: float | None = None
        self.latest = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what was found."""
        return {"found": self.found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.found = state["found"]

    @torch.no_grad()
    def look(self, shadow: Tensor, preactivation: Tensor, limit: float, num_samples: int) -> bool:
        """Take some rows into account; returns whether they show, for the first time, too much.

        Args:
            shadow: what corrects the rows, shape (m, k).
            preactivation: R, shape (m, k).
            limit: :func:`largest_shadow_ratio`.
            num_samples: n.
        """
        if self.found is not None or len(preactivation) < 2:
            return False
        some = slice(None, None, -(-len(preactivation) // ROWS))
        rows = at_least_single(preactivation.detach()[some])
        self._squares[0] += float(at_least_single(shadow[some]).square().sum())
        self._squares[1] += float((rows - rows.mean(0)).square().sum()) * _unbiased(len(rows))
        self._rows += len(rows)
        if self._rows < min(FEWEST, num_samples):
            return False
        (size, spread), self._squares, self._rows = self._squares, [0.0, 0.0], 0
        # A layer at zero has neither; one that is not finite says nothing of the shadows.
        share = math.inf if spread == 0 and size > 0 else 0.0
        if spread > 0:
            share = math.sqrt(size / spread)
        self.latest = share
        if not share > limit:
            return False
        self.found = share
        return True


def _unbiased(count: int) -> float:
    return count / (count - 1)
