"""The best weights so far, and everything that belongs to them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dd.correction.optimizer_state import OptimizerState
from dd.rules.line_search.moving_tensors import Part
from dd.rules.line_search.product_cache import PRODUCT

__all__ = ["BestState"]

_PREFIX, _PARAMETER, _BUFFER = "shadow_best_of_", "parameter", "buffer_"


class BestState:
    """Copies of parameters, shadows and buffers, in the optimizer's state.

    Args:
        store: the optimizer's state.
        module: whose buffers are kept, too.
        weight: the decoupled weight.
    """

    def __init__(self, store: OptimizerState, module: nn.Module, weight: Tensor) -> None:
        self._store, self._module, self._weight = store, module, weight

    @torch.no_grad()
    def keep(self, parts: Sequence[Part]) -> None:
        """Keep the present state.

        Args:
            parts: everything that a step moves.
        """
        for part in parts:
            # XW follows from W.
            if part.key == PRODUCT:
                continue
            self._keep(part.owner, part.key or _PARAMETER, part.tensor)
        for number, buffer in enumerate(self._module.buffers()):
            self._keep(self._weight, f"{_BUFFER}{number}", buffer)

    def _keep(self, owner: Tensor, key: str, tensor: Tensor) -> None:
        kept = self._store.read(owner, _PREFIX + key)
        if kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype:
            kept.copy_(tensor)
        else:
            self._store.write(owner, _PREFIX + key, tensor.detach().clone())

    @torch.no_grad()
    def restore(self) -> bool:
        """Go back to the state that was kept; return whether there is one."""
        found = list(self._found())
        for target, kept in found:
            target.copy_(kept)
        if found:
            # It would be taken for that of the weights that were left.
            self._store.of(self._weight).pop(PRODUCT, None)
        return bool(found)

    def _found(self) -> Iterator[tuple[Tensor, Tensor]]:
        buffers = list(self._module.buffers())
        for owner, state in self._store.state.items():
            for name in [name for name in state if name.startswith(_PREFIX)]:
                key = name.removeprefix(_PREFIX)
                if key == _PARAMETER:
                    yield owner, state[name]
                elif key.startswith(_BUFFER):
                    yield buffers[int(key.removeprefix(_BUFFER))], state[name]
                else:
                    yield state[key], state[name]
