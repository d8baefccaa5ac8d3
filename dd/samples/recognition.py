"""Which training samples a batch holds, so that every one meets its own shadow."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dd.noise.model import NoiseModel
from dd.samples.fitted import (
    _by_whom,
    _fitted_on,
    fitted_samples,
    refuse_others,
    require_announced,
    require_spread,
)
from dd.samples.placement import Placement
from dd.samples.repeated import RepeatedBatch, identity
from dd.support.fingerprint import Fingerprints, directions, fingerprint
from dd.support.user_warning import warn_user

__all__ = ["AugmentationWarning", "Samples"]


_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


class AugmentationWarning(UserWarning):
    """A training sample came with another input than before.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", dd.AugmentationWarning)  # end such a run at once
        >>> optimizer = dd.DecoupledDescent(model, lr=0.5, noise=dd.NoiseModel.fit(X, y))
        >>> for inputs in (X, X + 0.1):
        ...     optimizer.batch(range(500))
        ...     optimizer.zero_grad()
        ...     criterion(model(inputs), y).backward()
        ...     optimizer.step()
        Traceback (most recent call last):
            ...
        dd.samples.recognition.AugmentationWarning: DecoupledDescent: 500 of 500 samples ...
    """


class Samples:
    """The training samples of one attachment: told by their index, or known by their inputs.

    A batch that is the very tensor seen last, unmodified, is recognised without any work.

    Args:
        blame: says what may change the inputs before they come, in a sentence or not at all.

    Attributes:
        known: fingerprints of the samples, or None before the first batch.
        directions: of the fingerprints, shape (3, d), or None before the first batch.
        are_fitted: whether they are among those that the noise model was fitted on.
    """

    def __init__(self, blame: Callable[[], str] = str) -> None:
        self._blame = blame
        self.known: Fingerprints | None = None
        self.directions: Tensor | None = None
        self.are_fitted = False
        self._last: RepeatedBatch | None = None
        # Where the next batch begins if samples come in their order, None once they did not.
        self._end: int | None = 0
        self._waiting: list[Tensor] = []
        self._used: Tensor | None = None
        self._looked_at: Tensor | None = None
        self._total: int | None = None
        # Which samples were held against the noise model.
        self._compared = (0, False)
        self._is_announced = self._has_warned = False

    @property
    def count(self) -> int | None:
        """Number of training samples, or None before it is known."""
        return self._total if self.known is None else len(self.known)

    def total(self, noise: NoiseModel | None) -> float:
        """Number of training samples, infinite while more may come."""
        if self._is_announced and self._total is None and _fitted_on(noise) is None:
            return math.inf
        return math.inf if self.count is None else self.count

    def announce(self, index: Tensor, total: int | None = None) -> None:
        """Tell which samples a coming training forward holds.

        Args:
            index: integers from 0, shape (m,).
            total: number of training samples, where known.

        Raises:
            ValueError: if the indices are not integers in range.
        """
        index = index.detach().cpu()
        if index.dim() != 1 or index.dtype not in _INTEGERS or len(index) == 0:
            raise ValueError(
                "DecoupledDescent: a batch is told by the integer indices of its samples, shape "
                f"(m,); got shape {tuple(index.shape)} of {index.dtype}"
            )
        if total is not None:
            self.expect(total)
        limit = self._total
        if int(index.min()) < 0 or (limit is not None and int(index.max()) >= limit):
            raise ValueError(
                f"DecoupledDescent: the indices of a batch count the {limit or 'training'} samples "
                f"from 0; got {int(index.min())} to {int(index.max())}"
            )
        self._is_announced = True
        self._used = None
        # A batch that was only looked at, without gradients, gets no step any more.
        self._waiting = [other for other in self._waiting if other is not self._looked_at]
        self._waiting.append(index.long())

    def withdraw(self) -> None:
        """Take back announcements whose batches will not come."""
        self._waiting.clear()
        self._used = self._looked_at = None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Keep announcements of this time from those before and after."""
        kept = self._waiting, self._used, self._looked_at
        self._waiting, self._used, self._looked_at = [], None, None
        try:
            yield
        finally:
            self._waiting, self._used, self._looked_at = kept

    def expect(self, total: int) -> None:
        """Take down the number of training samples.

        Raises:
            ValueError: if it was another.
        """
        if self.count not in {None, total}:
            raise ValueError(
                f"DecoupledDescent: {total} training samples are announced, but the optimizer has "
                f"{self.count}; load a matching state, or detach() and attach() for other data"
            )
        self._total, self._is_announced = total, True

    def release(self) -> None:
        """Let the batch of a forward that got no step be used once more."""
        if self._used is not None:
            self._waiting.insert(0, self._used)
            # The next announcement takes its place.
            self._looked_at, self._used = self._used, None

    def finish(self) -> None:
        """Let no further forward use the batch of a step that was made."""
        self._used = None

    def forget(self) -> None:
        """Take the next batch as new."""
        self.known, self._last, self._end = None, None, 0
        self._compared, self.are_fitted = (0, False), False

    def resume(self, values: Tensor | None) -> None:
        """Take the fingerprints of an earlier run where there are none yet."""
        if self.known is None and values is not None:
            self.known = Fingerprints(values)

    def place(self, inputs: Tensor, noise: NoiseModel | None, *, binds: bool) -> Placement:
        """Find the samples of a training batch.

        Args:
            inputs: shape (m, d).
            noise: may know the training samples.
            binds: whether the forward leads to a step: it takes down samples not seen before, and
                uses an announcement up.

        Returns:
            The placement.

        Raises:
            RuntimeError: if they cannot be found, or there are none.
            ValueError: if they are not those that the noise model was fitted on.

        Warns:
            AugmentationWarning: once, if an announced sample has changed.
        """
        if len(inputs) == 0:
            raise RuntimeError(
                "DecoupledDescent: a training batch without samples; leave it out, or run it under "
                "model.eval()"
            )
        last = self._last
        if last is not None and not inputs.is_inference() and last.is_of(inputs):
            return last.placement
        found = self.fingerprints(inputs)
        known = self.known
        if known is None:
            fitted = fitted_samples(found, noise, inputs.dtype)
            if fitted is not None:
                known, self.are_fitted = Fingerprints(fitted), True
                self._compared = (len(known), True)
        else:
            self._compare(known, noise)
        if known is None and not self._is_announced:
            refuse_others(found, noise, self._blame)
            known = Fingerprints(found)
        if known is not None and not known.complete and not binds:
            index, same = known.find(found)
            if bool(same.all()):
                return Placement.of(found, index, len(known))
        if known is None or not known.complete:
            return self._told(found, noise, inputs.dtype, binds=binds)
        placement = self._recognised(found, known, noise, inputs.dtype, binds=binds)
        if binds:
            self.known = known
        if self.known is not None and not inputs.is_inference():
            assert self.directions is not None
            self._last = RepeatedBatch(identity(inputs), placement, self.directions)
        return placement

    def _recognised(
        self,
        found: Tensor,
        known: Fingerprints,
        noise: NoiseModel | None,
        dtype: torch.dtype,
        *,
        binds: bool,
    ) -> Placement:
        """Place a batch by its inputs; where that fails, by what was announced.

        Raises:
            RuntimeError: if some samples are not known.
        """
        if len(found) == len(known) and bool(known.equal(found).all()):
            return Placement(found)
        index, same = self._following(found, known) or known.find(found)
        unknown = int((~same).sum())
        if unknown == 0:
            told = self._announced(found, known)
            if told is not None and binds:
                self._use(told)
            return Placement.of(found, index if told is None else told, len(known))
        if self._is_announced:
            return self._told(found, noise, dtype, binds=binds)
        raise RuntimeError(
            f"DecoupledDescent: {unknown} of {len(found)} samples in the training batch are not "
            f"among the {len(known)} seen before{_by_whom(known, noise)}.{self._blame()} Feed the "
            "training samples as they are, unaugmented. For mini-batches construct with "
            "noise=dd.NoiseModel.fit(inputs), the inputs of all training samples as the decoupled "
            "layer receives them, or use optimizer.track(loader). Call model.eval() before "
            "evaluating on other data."
        )

    def _following(self, found: Tensor, known: Fingerprints) -> tuple[Tensor, Tensor] | None:
        """Place a batch of consecutive samples, as of a pass in their order, without a search."""
        # Copies are one sample to whoever looks them up, in whatever order they come.
        starts = () if self._end is None else dict.fromkeys((self._end, 0))
        for start in () if known.has_copies else starts:
            if known.are_at(start, found):
                self._end = (start + len(found)) % len(known)
                index = torch.arange(start, start + len(found), device=found.device)
                return index, torch.ones_like(index, dtype=torch.bool)
        self._end = None
        return None

    def _announced(self, found: Tensor, known: Fingerprints) -> Tensor | None:
        """The announcement of a batch that is known by its inputs; it tells copies apart."""
        for index in self._waiting:
            if len(index) == len(found) and int(index.max()) < len(known):
                index = index.to(found.device)
                if not bool(known.differ(index, found)[1].any()):
                    return index
        return None

    def _use(self, index: Tensor) -> None:
        """Use an announcement up."""
        self._used = index.cpu()
        self._waiting = [other for other in self._waiting if not torch.equal(other, self._used)]

    def _told(
        self, found: Tensor, noise: NoiseModel | None, dtype: torch.dtype, *, binds: bool
    ) -> Placement:
        index = self._next(found, binds=binds).to(found.device)
        if self.known is None:
            require_announced(index, found, noise, dtype, self._blame)
            self.known = Fingerprints(self._blank(found, index, noise))
        self._make_room(index, noise)
        new, differ = self.known.differ(index, found)
        if bool(differ.any()):
            self._explain(index, found, differ)
        has_new = bool(new.any())
        if binds and has_new:
            self.known.put(index[new], found[new])
        self._compare(self.known, noise, passed=not has_new)
        return Placement.of(found, index, len(self.known))

    def _compare(
        self, known: Fingerprints, noise: NoiseModel | None, *, passed: bool = False
    ) -> None:
        """Hold the samples against those of the noise model: whenever they have doubled, and all.

        Args:
            known: the samples.
            noise: the model.
            passed: whether a batch brought no new ones.

        Raises:
            ValueError: if they vary otherwise.
        """
        if noise is None or noise.fingerprints is None:
            return
        whole = passed or known.complete
        now = (known.count if whole else known.count.bit_length(), whole)
        if now != self._compared:
            require_spread(known.seen, noise, whole=whole)
            self._compared = now

    def _next(self, found: Tensor, *, binds: bool) -> Tensor:
        """The announcement that a batch belongs to.

        Raises:
            RuntimeError: if there is none, or no telling which.
        """
        waiting = self._waiting if self._used is None else [self._used, *self._waiting]
        fitting = [index for index in waiting if len(index) == len(found)]
        if not fitting or (binds and not self._waiting):
            raise RuntimeError(
                f"DecoupledDescent: a training batch of {len(found)} rows was not announced"
                + (f" (announced: {[len(i) for i in waiting]} samples)" if waiting else "")
                + ". Iterate over the loader that optimizer.track(loader) returns, or call "
                "optimizer.batch(indices) before every training forward; the decoupled layer must "
                "receive one row a sample. Run other forwards under model.eval()."
            )
        if not binds:
            self._looked_at = fitting[-1]
            return fitting[-1]
        if len(fitting) > 1:
            fitting = [index for index in fitting if self._holds(index, found)]
        if not fitting:
            raise RuntimeError(
                f"DecoupledDescent: {len(waiting)} batches were announced before a training "
                "forward (something fetches ahead), and new samples cannot be told apart. "
                "Construct with noise=dd.NoiseModel.fit(inputs) so that samples are known by "
                "their inputs, or call optimizer.batch(indices) right before every forward."
            )
        index = fitting[0]
        self._use(index)
        return index

    def _holds(self, index: Tensor, found: Tensor) -> bool:
        if self.known is None or int(index.max()) >= len(self.known):
            return False
        new, differ = self.known.differ(index.to(found.device), found)
        return not bool((new | differ).any())

    def _blank(self, found: Tensor, index: Tensor, noise: NoiseModel | None) -> Tensor:
        count = self._total or _fitted_on(noise) or int(index.max()) + 1
        return found.new_full((count, found.shape[1]), torch.nan)

    def _make_room(self, index: Tensor, noise: NoiseModel | None) -> None:
        assert self.known is not None
        needed, have = int(index.max()) + 1, len(self.known)
        if needed <= have:
            return
        if noise is not None and noise.num_samples is not None:
            raise ValueError(
                f"DecoupledDescent: sample {needed - 1} in a batch, but the noise model knows "
                f"{noise.num_samples} training samples, counted from 0"
            )
        self.known.grow(needed)

    def _explain(self, index: Tensor, found: Tensor, differ: Tensor) -> None:
        """Say once that inputs change.

        Raises:
            RuntimeError: if they are other samples' inputs.
        """
        assert self.known is not None
        elsewhere, same = self.known.find(found[differ])
        if bool(same.any()):
            told = int(index[differ][same][0])
            raise RuntimeError(
                f"DecoupledDescent: a batch announces sample {told}, but holds the input of sample "
                f"{int(elsewhere[same][0])}: {int(same.sum())} of {len(index)} are misplaced. "
                "Announce every batch right before its training forward (a wrapper that fetches "
                "ahead must lie inside of optimizer.track, not around it)."
            )
        if not self._has_warned:
            self._has_warned = True
            warn_user(
                f"DecoupledDescent: {int(differ.sum())} of {len(index)} samples in a training "
                f"batch came with other inputs than before.{self._blame()} Augmentation and other "
                "changes of the inputs are outside the theory: the training error will not track "
                "the test error. Give every sample one fixed input.",
                AugmentationWarning,
            )

    def fingerprints(self, inputs: Tensor) -> Tensor:
        """What rows of shape (m, d) are known again by, shape (m, 3)."""
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        if self.directions is None or self.directions.shape[1] != inputs.shape[1]:
            self.directions = directions(inputs.shape[1])
        self.directions = self.directions.to(inputs.device, dtype)
        return fingerprint(inputs, self.directions)
