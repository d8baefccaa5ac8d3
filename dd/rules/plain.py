"""Steps of an optimizer that was never attached, which are plain SGD's."""

import torch

from dd.correction.optimizer_state import OptimizerState
from dd.support.user_warning import warn_user

__all__ = ["UnattachedWarning", "has_told_plain"]


class UnattachedWarning(UserWarning):
    """Nothing is corrected: the training error is that of plain SGD.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", dd.UnattachedWarning)  # end such a run at once
        >>> optimizer = dd.DecoupledDescent(model.parameters(), lr=0.5)
        >>> criterion(model(X), y).backward()
        >>> optimizer.step()
        Traceback (most recent call last):
            ...
        dd.rules.plain.UnattachedWarning: DecoupledDescent: this optimizer is attached to no ...
    """


def has_told_plain(store: OptimizerState) -> bool:
    """Say that a step corrects nothing, where it is one; returns whether it was said.

    Args:
        store: the optimizer's state.

    Warns:
        UnattachedWarning: if any gradient is not zero.
    """
    # To look at a number is no part of a CUDA graph.
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return False
    # Distributed checkpointing creates state by a step on zero gradients, before any attaching.
    if not store.has_gradients():
        return False
    warn_user(
        "DecoupledDescent: this optimizer is attached to no module, so that its steps are plain "
        "SGD's and the training error is not corrected. Construct it with the module, "
        "DecoupledDescent(model, ...) in place of DecoupledDescent(model.parameters(), ...), or "
        "call attach(model) before the first step; to use it as plain SGD, call detach() first.",
        UnattachedWarning,
    )
    return True
