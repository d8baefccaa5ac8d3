"""A batch that comes again as the very same tensor."""

import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dd.samples.placement import Placement
from dd.support.fingerprint import whole_fingerprint

__all__ = ["RepeatedBatch", "identity"]


# Rows of a batch that came as the same tensor again which are looked at.
_LOOKED_AT = 8


@dataclass(frozen=True, eq=False)
class RepeatedBatch:
    """A batch that may come again as the very same tensor, which is then not looked at in full.

    Attributes:
        identity: of the tensor.
        placement: of its samples.
        directions: of the inputs, that the samples' fingerprints are along, shape (j, d).
    """

    identity: tuple[Any, ...]
    placement: Placement
    directions: Tensor

    def is_of(self, inputs: Tensor) -> bool:
        """Whether this batch came again.

        Args:
            inputs: of a batch, shape (m, d) or (m, P, d).
        """
        now, then = identity(inputs), self.identity
        owner = now[0]()
        if owner is None or owner is not then[0]() or now[1:] != then[1:]:
            return False
        if not _changes_unseen(inputs):
            return True
        rows, directions, found, tolerance = self._some
        off = self._projected(inputs.detach()[rows].double() @ directions) - found
        return bool(torch.linalg.vector_norm(off, torch.inf) <= tolerance)

    def _projected(self, rows: Tensor) -> Tensor:
        return rows if rows.dim() == 2 else whole_fingerprint(rows)

    @cached_property
    def _some(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Some rows, and their fingerprints, in double precision that no setting lowers."""
        count = len(self.placement.fingerprints)
        rows = torch.linspace(0, count - 1, min(count, _LOOKED_AT)).long()
        found = self.placement.fingerprints[rows].double()
        return rows, self.directions.double().mT, found, 1e-5 * found.abs().amax()


def identity(inputs: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from any other, and from itself after a change that torch knows of."""
    owner = inputs if inputs._base is None else inputs._base
    layout = (inputs._version, inputs.data_ptr(), inputs.shape, inputs.stride())
    return (weakref.ref(owner), *layout)


def _changes_unseen(inputs: Tensor) -> bool:
    """Whether numpy may write to the memory of a tensor, which leaves its version as it is."""
    return inputs.device.type == "cpu"
