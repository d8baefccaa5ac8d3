"""Which training samples the updates of a run take."""

import math

import torch
from torch import Tensor

from dd.data import generator
from dd.support.checks import check_count

__all__ = ["Batches", "check_batch_size"]


class Batches:
    """The rows of every update: all, or mini-batches shuffled anew in every pass.

    The rows of an update depend on its number and the seed alone: optimizers see the same batches,
    and a resumed run goes on with those of the interrupted one.

    Args:
        num_samples: n.
        batch_size: rows of an update; the last of a pass has what is left. None: all, in order.
        seed: of the shuffling.

    Raises:
        ValueError: if the batch size is not a positive integer of at most n.
    """

    def __init__(self, num_samples: int, batch_size: int | None, seed: int) -> None:
        check_batch_size(batch_size)
        if batch_size is not None and batch_size > num_samples:
            raise ValueError(
                f"data.batch_size={batch_size} asks for more than the {num_samples} training "
                "samples; lower it, or use data.batch_size=null for all of them at once"
            )
        self._num_samples, self._batch_size, self._seed = num_samples, batch_size, seed
        self._shuffled: tuple[int, Tensor] | None = None

    def at(self, step: int) -> Tensor | None:
        """Rows of an update, shape (m,), on the CPU; None for all in their order.

        Args:
            step: updates made before it.
        """
        if self._batch_size is None:
            return None
        number, batch = divmod(step, math.ceil(self._num_samples / self._batch_size))
        start = batch * self._batch_size
        return self._pass(number)[start : start + self._batch_size]

    def _pass(self, number: int) -> Tensor:
        if self._shuffled is None or self._shuffled[0] != number:
            # A stream for each pass, so that nobody has to draw the passes before.
            stream = generator(self._seed, f"batches of pass {number}")
            self._shuffled = number, torch.randperm(self._num_samples, generator=stream)
        return self._shuffled[1]


def check_batch_size(batch_size: int | None) -> None:
    """Require a positive integer, or None for all samples.

    Raises:
        ValueError: if it is neither.
    """
    if batch_size is not None:
        check_count("data.batch_size", batch_size)
