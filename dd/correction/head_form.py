"""When the head is corrected no more, and in which form it is followed."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dd.correction.attachment import Attachment
from dd.correction.head import SharedParameters
from dd.correction.optimizer_state import HEAD_LEFT
from dd.support.user_warning import warn_user
from dd.watch.strain import StrainWarning

__all__ = ["follow_state", "leave_head"]


def leave_head(attachment: Attachment, reason: Exception | str, *, begun: bool) -> None:
    """Correct the head no more, which nobody asked for.

    Before the first step all is as if it had not been chosen, and what over-fits is said; later
    on displacements are given up, and the estimate is in doubt.

    Args:
        attachment: whose head it is.
        reason: why it cannot be followed.
        begun: whether there are displacements.

    Warns:
        StrainWarning: if there are, or the head is large for the samples.
    """
    attachment.release_head(begun=begun)
    if not begun:
        attachment.oversight.look_at_head(attachment.subject)
        return
    # First, as a warning may be an error.
    attachment.oversight.doubt("The head, which over-fits, is corrected no more.")
    warn_user(
        "DecoupledDescent: the correction of the head, which was chosen by the sizes of model "
        "and data, ends here: from now on the training error is too low by what the head "
        f"over-fits. Train with head=False from the start, or mend this: {reason}",
        StrainWarning,
    )


def _follow_directions(attachment: Attachment, count: int) -> None:
    """Follow as many directions of the decoupled layer as a state does.

    Args:
        attachment: whose head it is.
        count: of directions.

    Raises:
        RuntimeError: if the noise model has no form with as many.
    """
    assert attachment.shared is not None
    present = None if attachment.given_noise is None else attachment.given_noise.mean_directions
    if count == (0 if present is None else present.shape[1]):
        return
    whole, forms = attachment.noise_of_all, []
    if whole is not None and whole.is_in_both_forms:
        forms = [whole.with_means_apart(), whole.with_every_direction_apart()]
    for form in forms:
        directions = form.mean_directions
        if directions is not None and directions.shape[1] == count:
            attachment.given_noise = form
            attachment.shared = SharedParameters(
                attachment.module, attachment.layer, attachment.shared.head, directions
            )
            attachment.take_given_noise()
            return
    raise RuntimeError(
        f"DecoupledDescent: the state follows {count} directions of layer {attachment.name!r}, and "
        "this noise model has no such form. Load a state into an optimizer of the noise model "
        "that it was trained with."
    )


def follow_state(attachment: Attachment, states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Follow the head, and as much of the decoupled layer, as a state does.

    Args:
        attachment: whose head it is.
        states: of the optimizer, by parameter.

    Raises:
        RuntimeError: if the noise model has no such form.
    """
    state = states.get(attachment.weight, {})
    if attachment.shared is None or state.get("shadow") is None:
        return
    found = state.get("signal_shadow")
    if found is not None:
        _follow_directions(attachment, found.shape[2])
    elif attachment.head_is_optional:
        reason = "the state is of a run that gave it up."
        leave_head(attachment, reason, begun=HEAD_LEFT in state)
