"""Copies and pickles of an optimizer that is attached to a module."""

from typing import Any

import torch
from torch import nn

from dd.correction.attachment import Attachment
from dd.correction.saved_state import attachment_settings
from dd.watch.step_watches import StepWatches

__all__ = ["Copied"]

_SETTINGS = ("_curvature", "_damping", "_head", "_is_plain", "_policy", "_seed", "_stops")


class Copied(torch.optim.Optimizer):
    """An optimizer whose copies are attached to the copy of its module."""

    _attachment: Attachment | None
    _process_group: Any
    _policy: Any
    _stops: bool
    _is_plain: bool
    _watches: StepWatches

    def attach(self, module: nn.Module, *, layer: Any = None, noise: Any = None) -> None:
        """Attach the optimizer to a module."""
        raise NotImplementedError

    def _settle(self) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep: the settings, and the module that this is attached to."""
        self._settle()
        bond = None if self._attachment is None else attachment_settings(self._attachment)
        settings = {name: getattr(self, name) for name in _SETTINGS}
        if self._attachment is not None and self._attachment.has_left_head:
            settings["_head"] = False
        # A process group belongs to its process; to train alone is a choice.
        settings["_process_group"] = False if self._process_group is False else None
        return {**super().__getstate__(), "_bond": bond, "_own_settings": settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, and attach it to the copy of the module.

        Args:
            state: as :meth:`__getstate__` returns it.
        """
        state = dict(state)
        bond, settings = state.pop("_bond", None), state.pop("_own_settings", None)
        if settings is not None:
            self._attachment, self._watches = None, StepWatches()
            self._policy, self._stops, self._is_plain = None, False, True
            vars(self).update(settings)
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("decoupled_weight_decay", False)
        if bond is not None:
            module, layer, noise, *said = bond
            self.attach(module, layer=layer, noise=noise)
            if said and self._attachment is not None:
                self._attachment.oversight.load_state_dict(said[0])
