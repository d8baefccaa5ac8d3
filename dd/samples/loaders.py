"""Loaders that tell which samples their batches hold."""

import copy
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from dd.samples.recognition import Samples

__all__ = ["tracked"]


class _Indexed(Dataset[Any]):
    """A data set that returns the index beside each sample."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> tuple[Any, Any]:
        return index, self._dataset[index]

    def __getitems__(self, indices: Sequence[Any]) -> list[tuple[Any, Any]]:
        fetch = getattr(self._dataset, "__getitems__", None)
        samples = [self._dataset[i] for i in indices] if fetch is None else fetch(indices)
        return list(zip(indices, samples, strict=True))


class _Collate:
    """Collates samples as before, and puts their indices beside them."""

    def __init__(self, collate: Callable[[Any], Any], *, batched: bool) -> None:
        self._collate, self._batched = collate, batched

    def __call__(self, samples: Any) -> tuple[Tensor, Any]:
        if not self._batched:
            index, sample = samples
            return torch.as_tensor(index).reshape(-1), self._collate(sample)
        indices = torch.tensor([int(index) for index, _ in samples])
        return indices, self._collate([sample for _, sample in samples])


class _Tracked:
    """Announces each batch as it is handed out."""

    def __init__(self, loader: Any, samples: Samples) -> None:
        self._loader, self._samples = loader, samples

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        self._samples.withdraw()
        yield from self._batches()

    def _batches(self) -> Iterator[Any]:
        raise NotImplementedError


class TrackedLoader(_Tracked):
    """A ``DataLoader`` whose batches are announced; other attributes are the loader's own.

    Args:
        loader: yields pairs of indices and batch.
        samples: to be told.
        dataset: whose samples the indices count.
    """

    def __init__(self, loader: DataLoader[Any], samples: Samples, dataset: Any) -> None:
        super().__init__(loader, samples)
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        """Read what is not our own off the loader."""
        return getattr(self.__dict__["_loader"], name)

    def _batches(self) -> Iterator[Any]:
        for indices, batch in self._loader:
            self._samples.announce(indices, len(self.dataset))
            yield batch


class TrackedIndices(_Tracked):
    """Lists of sample indices that are announced."""

    def _batches(self) -> Iterator[Any]:
        for indices in self._loader:
            self._samples.announce(torch.as_tensor(indices))
            yield indices


def tracked(loader: Any, samples: Samples) -> Any:
    """Wrap a loader so that its batches are announced.

    Args:
        loader: a ``DataLoader`` over a map-style dataset, or a sized iterable of batches of
            indices.
        samples: to be told.

    Returns:
        The wrapped loader.

    Raises:
        ValueError: if its samples have no fixed index.
        TypeError: if it is neither.
    """
    if isinstance(loader, _Tracked):
        raise ValueError("DecoupledDescent: this loader is tracked already")
    if not isinstance(loader, DataLoader):
        return _tracked_indices(loader, samples)
    _check(loader)
    samples.expect(len(loader.dataset))  # type: ignore[arg-type]
    return TrackedLoader(_indexed(loader), samples, loader.dataset)


def _indexed(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A copy that yields pairs of indices and batch; a DataLoader forbids to change itself."""
    twin = copy.copy(loader)
    inner = getattr(loader, "base_dataloader", None)
    if inner is not None:
        # A loader of the accelerate library, which hands on what another one yields.
        vars(twin)["base_dataloader"] = _indexed(inner)
        return twin
    batched = loader.batch_size is not None or loader.batch_sampler is not None
    vars(twin).update(
        dataset=_Indexed(loader.dataset),
        collate_fn=_Collate(loader.collate_fn, batched=batched),
        _iterator=None,
    )
    return twin


def _check(loader: DataLoader[Any]) -> None:
    if isinstance(loader.dataset, IterableDataset) or not isinstance(loader.dataset, Sized):
        raise ValueError(
            "DecoupledDescent: track() needs a map-style dataset, whose samples have an index; "
            f"{type(loader.dataset).__name__} streams them. Use noise=dd.NoiseModel.fit(inputs) so "
            "that samples are known by their inputs, or optimizer.batch(indices)."
        )
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            _check_shards(sampler)


def _check_shards(sampler: DistributedSampler[Any]) -> None:
    if sampler.shuffle:
        raise ValueError(
            "DecoupledDescent: DistributedSampler(shuffle=True) hands a sample to another process "
            "in every epoch, away from its shadow. Construct with noise=dd.NoiseModel.fit(inputs) "
            "of all samples, which then need no tracking; or give each process its own samples, "
            "torch.utils.data.Subset(dataset, range(rank, n, world_size))."
        )
    if len(sampler.dataset) % sampler.num_replicas and not sampler.drop_last:  # type: ignore[arg-type]
        raise ValueError(
            "DecoupledDescent: DistributedSampler gives some samples to two processes to make "
            "their numbers equal; use drop_last=True"
        )


def _tracked_indices(loader: Any, samples: Samples) -> TrackedIndices:
    if not (hasattr(loader, "__iter__") and isinstance(loader, Sized)):
        raise TypeError(
            "DecoupledDescent: track() takes a DataLoader, or a sized iterable of batches of "
            f"sample indices; got {type(loader).__name__}"
        )
    return TrackedIndices(loader, samples)
