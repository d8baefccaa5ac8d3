"""Recognition of the training batch, so that every sample meets its own shadow."""

import weakref
from typing import Any

import torch
from torch import Tensor

from dd.functional import at_least_single

__all__ = ["SampleOrder"]

# A random projection tells two samples apart by about its standard deviation over samples, while
# summing in another order moves it by a few float32 roundings of its size.
_SPREAD_TOLERANCE = 1e-3
_ROUNDING_TOLERANCE = 1e-5


class SampleOrder:
    """Remembers one random projection of every sample and compares later batches with it.

    A batch that is the very tensor seen last, unmodified, is recognised without any work; any other
    costs one product of the inputs with a vector.

    Attributes:
        direction: the random direction u, shape (d,), or None before the first batch.
        projection: Xu of the reference batch, shape (n,), or None before it.
    """

    def __init__(self) -> None:
        self.direction: Tensor | None = None
        self.projection: Tensor | None = None
        self._last: tuple[Any, ...] | None = None

    def forget(self) -> None:
        """Take the next batch as the reference."""
        self.projection = None
        self._last = None

    def resume(self, projection: Tensor | None) -> None:
        """Take the projection of an earlier run as the reference where there is none yet."""
        if self.projection is None:
            self.projection = projection

    def check(self, inputs: Tensor) -> None:
        """Compare a batch with the reference, or make it the reference.

        Args:
            inputs: the batch, shape (n, d), with n as in the reference.

        Raises:
            RuntimeError: if the samples are others, or came in another order.
        """
        identity = _identity(inputs)
        if identity is not None and self._last is not None and _same(identity, self._last):
            return
        projection = self._project(inputs)
        if self.projection is None:
            self.projection = projection
        else:
            _compare(projection, self.projection)
        self._last = identity

    def _project(self, inputs: Tensor) -> Tensor:
        values = at_least_single(inputs.detach())
        if self.direction is None:
            generator = torch.Generator().manual_seed(0)
            self.direction = torch.randn(values.shape[1], generator=generator)
        self.direction = self.direction.to(values)
        return values @ self.direction


def _compare(projection: Tensor, reference: Tensor) -> None:
    reference = reference.to(projection)
    rounding = _ROUNDING_TOLERANCE * reference.square().mean().sqrt()
    tolerance = _SPREAD_TOLERANCE * reference.std(correction=0) + rounding
    differ = int(((projection - reference).abs() > tolerance).sum())
    if differ == 0:
        return
    reordered = (projection.sort().values - reference.sort().values).abs() <= tolerance
    if bool(reordered.all()):
        raise RuntimeError(
            f"DecoupledDescent: the training batch holds the same {len(reference)} samples in "
            f"another order ({differ} moved), so they would meet each other's shadows. Feed them "
            "in one fixed order: shuffle=False in the DataLoader, no permutation in the loop."
        )
    raise RuntimeError(
        f"DecoupledDescent: {differ} of {len(reference)} samples in the training batch are not the "
        "ones seen before. Feed the whole training set, unaugmented, in one fixed order at every "
        "step; call model.eval() before evaluating on other data."
    )


def _identity(inputs: Tensor) -> tuple[Any, ...] | None:
    if inputs.is_inference():
        return None
    owner = inputs if inputs._base is None else inputs._base
    layout = (inputs._version, inputs.data_ptr(), inputs.shape, inputs.stride())
    return (weakref.ref(owner), *layout)


def _same(identity: tuple[Any, ...], last: tuple[Any, ...]) -> bool:
    owner = identity[0]()
    return owner is not None and owner is last[0]() and identity[1:] == last[1:]
