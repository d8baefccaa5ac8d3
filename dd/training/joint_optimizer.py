"""Several optimizers of one model as one, with what tracks their error."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dd.correction.tracker import Tracker
from dd.decouple import ErrorTracker
from dd.optimizer import DecoupledDescent

__all__ = ["JointOptimizer", "tracker_of"]


class JointOptimizer(torch.optim.Optimizer):
    """Steps optimizers one after the other, and saves them with the tracker beside them.

    Args:
        optimizers: that train a model together, of disjoint parameters.
        tracker: that :func:`dd.decouple` returned for them, or None.

    Attributes:
        optimizers: as given.
        tracker: as given.
    """

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], tracker: ErrorTracker | None = None
    ) -> None:
        self.optimizers, self.tracker = tuple(optimizers), tracker
        super().__init__([p for group in self._groups() for p in group["params"]], {})
        self.param_groups = self._groups()

    @property
    def needs_graph(self) -> bool:
        """Whether a step needs ``loss.backward(create_graph=True)``."""
        return self.tracker is not None and self.tracker.needs_graph

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Make a step of each; the closure clears gradients, computes the loss and differentiates.

        Returns:
            The loss before the steps.
        """
        with torch.enable_grad():
            loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all of them, and the tracker's."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "tracker": None if self.tracker is None else self.tracker.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned; the model's state is loaded before.

        Raises:
            KeyError: if the state is of another optimizer.
            ValueError: likewise.
        """
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if self.tracker is not None:
            self.tracker.load_state_dict(state_dict["tracker"])
        self.param_groups = self._groups()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]


def tracker_of(optimizer: torch.optim.Optimizer) -> Tracker | None:
    """What the corrected error of an optimizer's model is asked of; None where it has none."""
    if isinstance(optimizer, JointOptimizer):
        return optimizer.tracker
    if isinstance(optimizer, DecoupledDescent) and optimizer.layer is not None:
        return optimizer
    return None
