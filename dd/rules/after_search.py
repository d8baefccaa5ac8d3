"""Steps that are searched for, once training has stopped or ends before that."""

from collections.abc import Callable
from typing import Any

import torch

from dd.correction.attachment import Attachment
from dd.correction.optimizer_state import OptimizerState
from dd.rules.line_search.best_state import BestState

__all__ = ["restore_best", "step_after_stop"]


def step_after_stop(drop: Callable[[], None], closure: Callable[[], Any]) -> Any:
    """Call a closure after training has stopped, and change nothing.

    Args:
        drop: forgets its forward.
        closure: of the step.
    """
    with torch.enable_grad():
        loss = closure()
    drop()
    return loss


def restore_best(attachment: Attachment, store: OptimizerState) -> None:
    """Go back to the best state that was kept.

    Args:
        attachment: of the decoupled layer.
        store: the optimizer's state.

    Raises:
        RuntimeError: if none was.
    """
    best = BestState(store, attachment.module, attachment.weight)
    if not best.restore():
        raise RuntimeError(
            "DecoupledDescent: restore_best() found no best weights; they are kept by "
            'lr="auto", stop="auto", once the weights know of the signal'
        )
    attachment.remember_weight(store.of(attachment.weight))
