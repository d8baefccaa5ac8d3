"""L-BFGS with weight decay."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dd.support.checks import check_number

__all__ = ["LBFGS"]


class LBFGS(torch.optim.LBFGS):
    """``torch.optim.LBFGS`` on the loss plus ½ λ‖θ‖², as ``torch.optim.SGD`` takes weight decay.

    Args:
        params: parameters to optimize.
        weight_decay: λ; 0 leaves the loss as it is.
        settings: those of ``torch.optim.LBFGS``.

    Raises:
        ValueError: if the weight decay is negative, or a setting out of range.
    """

    def __init__(
        self, params: Iterable[Tensor], *, weight_decay: float = 0.0, **settings: Any
    ) -> None:
        check_number("weight_decay", weight_decay)
        super().__init__(params, **settings)
        self.param_groups[0]["weight_decay"] = weight_decay

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Make a step; the closure clears gradients, computes the loss and differentiates it.

        Returns:
            The penalised loss before the step.
        """
        (group,) = self.param_groups

        @torch.enable_grad()
        def penalised() -> Any:
            loss = closure()
            with torch.no_grad():
                for parameter in group["params"]:
                    if group["weight_decay"] == 0 or parameter.grad is None:
                        continue
                    parameter.grad.add_(parameter, alpha=group["weight_decay"])
                    loss = loss + 0.5 * group["weight_decay"] * parameter.square().sum()
            return loss

        return super().step(penalised)
