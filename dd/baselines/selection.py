"""Which settings an optimizer is tried with, and on which samples each of them is judged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dd.data.seeding import generator
from dd.support.checks import check_count, check_number

__all__ = ["KINDS", "Candidate", "Part", "Selection", "everything", "stratified_folds"]

KINDS = ("holdout", "kfold", "tracked")


@dataclass(frozen=True)
class Candidate:
    """Settings to try.

    Attributes:
        lr: learning rate.
        weight_decay: as the optimizer takes it.
    """

    lr: float
    weight_decay: float


@dataclass(frozen=True, eq=False)
class Part:
    """Training samples divided in two.

    Attributes:
        fit: rows that weights are fitted on, shape (m,).
        validation: rows that judge them, shape (n − m,).
    """

    fit: Tensor
    validation: Tensor


@dataclass(frozen=True)
class Selection:
    """How learning rate, weight decay and number of steps are chosen.

    Attributes:
        by: ``"holdout"``, validation on one of the folds, which the weights never see;
            ``"kfold"``, on each in turn, and then once more on all samples; ``"tracked"``, the
            tracked error of a decoupled optimizer on all samples.
        folds: that the training samples are cut into.
        lr_factors: learning rates to try, as multiples of the optimizer's own.
        weight_decays: to try, each with every learning rate.

    Raises:
        ValueError: if one of them cannot be.
    """

    by: str
    folds: int
    lr_factors: tuple[float, ...]
    weight_decays: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.by not in KINDS:
            raise ValueError(f"selection.by must be one of {', '.join(KINDS)}, got {self.by!r}")
        check_count("selection.folds", self.folds, least=2)
        for name in ("lr_factors", "weight_decays"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"selection.{name} must list one number or more, got none")
            for value in values:
                check_number(f"each of selection.{name}", value)

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> "Selection":
        """Return what the ``selection`` of an optimizer's settings describes.

        Raises:
            ValueError: if a setting is missing, unknown or out of range.
        """
        wanted = {"by", "folds", "lr_factors", "weight_decays"}
        if set(settings) != wanted:
            raise ValueError(
                f"selection must have the settings {', '.join(sorted(wanted))}, got "
                f"{', '.join(sorted(settings)) or 'none'}"
            )
        lists = ("lr_factors", "weight_decays")
        for name in lists:
            if not isinstance(settings[name], list):
                raise ValueError(f"selection.{name} must be a list, got {settings[name]!r}")
        return cls(**{**settings, **{name: tuple(settings[name]) for name in lists}})

    def candidates(self, lr: float) -> list[Candidate]:
        """Return the settings to try, given the optimizer's own learning rate."""
        return [
            Candidate(factor * lr, decay)
            for factor in self.lr_factors
            for decay in self.weight_decays
        ]

    def parts(self, targets: Tensor, seed: int) -> list[Part]:
        """Divide the training samples; each class in the same proportions, as far as they go.

        Args:
            targets: class of each training sample, shape (n,).
            seed: of the shuffling.

        Returns:
            One part for each training run that a candidate takes.

        Raises:
            ValueError: if there are fewer samples than folds.
        """
        if self.by == "tracked":
            return [everything(targets)]
        if len(targets) < self.folds:
            raise ValueError(
                f"{len(targets)} training samples cannot be cut into selection.folds={self.folds}; "
                "lower it, or train optimizers that hold nothing out"
            )
        fold = stratified_folds(targets.cpu(), self.folds, seed)
        held_out = range(self.folds) if self.by == "kfold" else range(1)
        return [Part(*(torch.nonzero(m)[:, 0] for m in (fold != f, fold == f))) for f in held_out]


def everything(targets: Tensor) -> Part:
    """Return the part that holds nothing out."""
    rows = torch.arange(len(targets))
    return Part(rows, rows[:0])


def stratified_folds(targets: Tensor, folds: int, seed: int) -> Tensor:
    """Return the fold of each sample, shape (n,): classes spread evenly, sizes equal to within one.

    Samples are shuffled, sorted by class, and dealt to the folds in turn.

    Args:
        targets: class of each sample, shape (n,), on the CPU.
        folds: how many.
        seed: of the shuffling.
    """
    order = torch.randperm(len(targets), generator=generator(seed, "selection/folds"))
    order = order[torch.sort(targets[order], stable=True).indices]
    fold = torch.empty(len(targets), dtype=torch.int64)
    fold[order] = torch.arange(len(targets)) % folds
    return fold
