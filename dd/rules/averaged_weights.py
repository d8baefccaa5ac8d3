"""A running average of the weights beside the model, and its own tracked error.

The average of weights has the same average of their shadows as its shadow. Which average it is, is
found from what it became. Section 11 of ``docs/theory.md``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dd.correction.attachment import Attachment
from dd.correction.gradient_check import same_weight
from dd.correction.hook import Forward
from dd.correction.optimizer_state import OptimizerState
from dd.correction.shadows import KEY, KeptShadows
from dd.correction.tracker import Tracker
from dd.correction.training_forward import TrainingForward, full_precision
from dd.functional.response import combined
from dd.rules.combination import combination
from dd.support.growth import grown
from dd.watch.step_watches import Unwatched

__all__ = ["AveragedWeights"]

_AVERAGE, _WEIGHT = "average", "weight"


class AveragedWeights(Tracker):
    """Gives the tracked error of an average of a model's weights.

    Args:
        attachment: of the model that is trained.
        store: what is kept of its weight.
        module: holds the average, as ``torch.optim.swa_utils.AveragedModel`` does.

    Raises:
        ValueError: if the module has no such layer, or holds no average of weights that are known.
    """

    def __init__(self, attachment: Attachment, store: OptimizerState, module: nn.Module) -> None:
        self._trained, self._trained_store = attachment, store
        layer = _layer_of(module, attachment)
        own = Attachment(
            module,
            layer,
            attachment.noise_of_all,
            "probe",
            process_group=False,
            shadows=KeptShadows(),
        )
        own.samples = attachment.samples
        own.oversight = attachment.oversight
        self._state: dict[Tensor, dict[str, Any]] = {own.weight: {}}
        self._attachment: Attachment | None = own
        self._left = own.weight.detach().clone()
        self._mark = attachment.along(self._left)
        now = attachment.along(attachment.weight)
        if not bool(same_weight(self._left, attachment.direction, now)):
            raise ValueError(
                "dd.decouple: average() takes a copy of the model as it is now, such as "
                "torch.optim.swa_utils.AveragedModel(model) right before; this one has other "
                f"weights at layer {attachment.name!r}"
            )
        shadow = store.read(attachment.weight, KEY)
        if shadow is not None:
            attachment.shadows.flush(store.of(attachment.weight))
            self._state[own.weight][KEY] = shadow.clone()
        own.register(self._correct, self._correct_scores)

    @torch.no_grad()
    def follow(self) -> None:
        """Take in what the average has become, before the weights that it is made of move.

        Raises:
            RuntimeError: if it is no combination of what it was and of the weights now.
        """
        with full_precision(self._trained.weight):
            self._follow()

    def _follow(self) -> None:
        attachment, trained = self._attachment, self._trained
        shadow = self._trained_store.read(trained.weight, KEY)
        if attachment is None or shadow is None:
            return
        weight, state = attachment.weight.detach(), self._state[attachment.weight]
        if bool(same_weight(weight, trained.direction, self._mark)):
            return
        tensors = {_AVERAGE: self._left, _WEIGHT: trained.weight.detach()}
        coefficients = combination(weight, tensors)
        if coefficients is None:
            raise RuntimeError(
                "dd.decouple: the average is no combination of what it was and of the model's "
                "weights now, so that its error is not known; update it once after every step or "
                "every few, and call average() anew after other changes"
            )
        trained.shadows.flush(self._trained_store.of(trained.weight))
        before = state.get(KEY)
        before = torch.zeros_like(shadow) if before is None else grown(before, shadow.shape[1], 1)
        state[KEY] = combined([before, shadow], coefficients[:, None])
        self._left, self._mark = weight.clone(), trained.along(weight)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is needed to go on."""
        assert self._attachment is not None
        self.follow()
        shadow = self._state[self._attachment.weight].get(KEY)
        return {_AVERAGE: self._left.clone()} | ({} if shadow is None else {KEY: shadow.clone()})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        assert self._attachment is not None
        device = self._attachment.weight.device
        self._left = state[_AVERAGE].to(device, copy=True)
        self._mark = self._trained.along(self._left)
        found = {KEY: state[KEY].to(device, copy=True)} if KEY in state else {}
        self._state[self._attachment.weight] = found

    def detach(self) -> None:
        """Remove every trace from the averaged model."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    def _settle(self) -> None:
        self.follow()
        if self._attachment is not None:
            self._attachment.noise = self._trained.noise

    def _correct(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> Tensor | None:
        # A forward with gradients would lead to a step on what nobody trains.
        return None if torch.is_grad_enabled() else super()._correct(layer, inputs, output)

    def _forward(self) -> Forward | None:
        attachment = self._attachment
        if attachment is None:
            return None
        return TrainingForward(attachment, self._store(), Unwatched(), 0, defers=False)

    def _store(self) -> OptimizerState:
        return OptimizerState(self._state, [])


def _layer_of(module: nn.Module, attachment: Attachment) -> nn.Module:
    """The layer of an averaged model that stands where the decoupled one does.

    Raises:
        ValueError: if there is none.
    """
    found = dict(module.named_modules())
    for name in (attachment.name, f"module.{attachment.name}"):
        layer = found.get(name)
        if isinstance(layer, nn.Linear) and layer.weight.shape == attachment.weight.shape:
            return layer
    raise ValueError(
        f"dd.decouple: average() takes a copy of the model, and this {type(module).__name__} has "
        f"no linear layer {attachment.name!r} of the decoupled one's shape"
    )
