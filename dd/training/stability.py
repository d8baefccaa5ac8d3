"""Whether gradient descent's step is within the stability edge of the layers after the first."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd.rules.line_search.settings import chooses_rate

__all__ = ["EdgeWatch", "HeadSharpness"]


class HeadSharpness:
    """Largest curvature of the loss in the head's parameters, followed along a training run.

    Power iteration on curvature-vector products; each call starts from the last direction found,
    so that a few iterations a call suffice.

    Args:
        head: the layers after the decoupled one.
        iterations: products a call.

    Attributes:
        direction: the last direction found, a tensor for each parameter.
    """

    def __init__(self, head: nn.Module, iterations: int = 8) -> None:
        self._head = head
        self._parameters = [p for p in head.parameters() if p.requires_grad]
        self._iterations = iterations
        # Not all ones: softmax does not see a number added to every score.
        generator = torch.Generator().manual_seed(0)
        self.direction = [torch.randn(p.shape, generator=generator).to(p) for p in self._parameters]

    def __call__(self, preactivation: Tensor, targets: Tensor) -> float:
        """Return the largest curvature of the mean cross-entropy.

        Args:
            preactivation: R, shape (n, k).
            targets: classes, shape (n,).
        """
        with torch.enable_grad():
            loss = F.cross_entropy(self._head(preactivation.detach()), targets)
            gradient = torch.autograd.grad(loss, self._parameters, create_graph=True)
        curvature = 0.0
        for _ in range(self._iterations):
            length = torch.sqrt(sum((v.square().sum() for v in self.direction), torch.zeros(())))
            unit = [v / length for v in self.direction]
            self.direction = list(
                torch.autograd.grad(gradient, self._parameters, unit, retain_graph=True)
            )
            curvature = float(sum((u * v).sum() for u, v in zip(unit, self.direction, strict=True)))
        return curvature


class EdgeWatch:
    """Notices when a learning rate passes the head's stability edge.

    Past it the head overshoots and the losses can spike, on training and test data alike. Of an
    optimizer that chooses or scales its own steps it says nothing.

    Args:
        model: a sequence whose first module is the decoupled layer.
        optimizer: of its parameters; all at one learning rate and momentum.
        inputs: training inputs, shape (n, d).
        targets: classes, shape (n,).

    Attributes:
        crossing: a sentence on the first step found past the edge, or None.
    """

    def __init__(
        self,
        model: nn.Sequential,
        optimizer: torch.optim.Optimizer,
        inputs: Tensor,
        targets: Tensor,
    ) -> None:
        self.crossing: str | None = None
        self._layer, self._sharpness = model[0], HeadSharpness(model[1:])
        self._group = optimizer.param_groups[0]
        # A rate that nobody gave, nobody can lower; its loss was looked at before the step.
        self._silent = chooses_rate(optimizer) or not isinstance(optimizer, torch.optim.SGD)
        self._inputs, self._targets = inputs, targets

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen so far."""
        return {"crossing": self.crossing, "direction": self._sharpness.direction}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.crossing = state["crossing"]
        old = self._sharpness.direction
        self._sharpness.direction = [
            new.to(like) for new, like in zip(state["direction"], old, strict=True)
        ]

    def look(self, step: int) -> None:
        """Compare the learning rate with the edge, 2(1 + momentum) / curvature (heavy ball)."""
        if self.crossing is not None or self._silent:
            return
        with torch.no_grad():
            preactivation = self._layer(self._inputs)
        curvature = self._sharpness(preactivation, self._targets)
        rate, momentum = float(self._group["lr"]), float(self._group.get("momentum", 0.0))
        if rate * curvature > 2 * (1 + momentum):
            self.crossing = (
                f"from step {step} on, lr={rate:g} is past the head's stability edge "
                f"({2 * (1 + momentum) / curvature:.3g}): losses may spike. Stop where the "
                "training curve is lowest, or lower lr."
            )
