"""Learning rate, weight decay and number of steps chosen among candidates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

import torch
from torch import nn

from dd.baselines.candidate_run import CandidateRun, ValidationPoint
from dd.baselines.selection import Candidate, Part, Selection, everything
from dd.data.split import Split
from dd.runs.fit import Fit
from dd.training.batches import Batches
from dd.training.doubts import doubts_of
from dd.training.loop import Schedule, TrainingStopped, train

__all__ = ["HyperparameterSearch", "SearchResult", "Trained"]

_Rank = tuple[bool, tuple[float, float]]


@dataclass(frozen=True, eq=False)
class Trained:
    """One training run.

    Attributes:
        run: what was seen of it.
        optimizer: that made it.
    """

    run: CandidateRun
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What the choice came to.

    Attributes:
        fit: what it took, and the error that it reports.
        trained: the training run that the weights are from, its model with these weights.
        curves: judgements of every candidate that did not diverge, means over folds.
        diverged: the others.
        doubted: that were passed over, because their error is not to be believed.
    """

    fit: Fit
    trained: Trained
    curves: dict[Candidate, list[ValidationPoint]]
    diverged: list[Candidate]
    doubted: list[Candidate]


@dataclass(eq=False)
class HyperparameterSearch:
    """Tries every candidate on every part of the training samples.

    Attributes:
        selection: what to try, and how to judge it.
        candidates: the settings.
        split: all samples, on the device of training.
        schedule: of every training run.
        seed: of folds and batches.
        batch_size: samples of an update; None is all.
        build: returns a new model and its optimizer for a candidate and the samples it trains on.
        shown: is called at every record with the updates made in all runs and its figures.

    Raises:
        ValueError: if there are fewer samples than folds.
    """

    selection: Selection
    candidates: list[Candidate]
    split: Split
    schedule: Schedule
    seed: int
    batch_size: int | None
    build: Callable[[Candidate, Split], tuple[nn.Module, torch.optim.Optimizer]]
    shown: Callable[[int, dict[str, float]], None] | None = None

    def __post_init__(self) -> None:
        self.parts = self.selection.parts(self.split.train_targets, self.seed)
        self._spent = _Spent()

    @property
    def most_steps(self) -> int:
        """Updates of all training runs, the last fit included."""
        runs = len(self.candidates) * len(self.parts) + (self.selection.by == "kfold")
        return runs * self.schedule.steps

    def choose(self, setup: float = 0.0) -> SearchResult:
        """Train all of them, and return the best.

        Args:
            setup: seconds of what came before.

        Raises:
            TrainingStopped: if all candidates diverge.
        """
        curves: dict[Candidate, list[ValidationPoint]] = {}
        best: tuple[_Rank, ValidationPoint, Candidate, Trained] | None = None
        doubted: list[Candidate] = []
        for candidate in self.candidates:
            found = self._try(candidate)
            if found is None:
                continue
            curves[candidate] = mean_curve([each.run.judgements for each in found])
            judged = min(curves[candidate][1:], key=lambda j: j.rank)
            if any(doubts_of(each.optimizer) for each in found):
                doubted.append(candidate)
            # What is not to be believed comes after all that is.
            rank = candidate in doubted, judged.rank
            if best is None or rank < best[0]:
                best = rank, judged, candidate, found[0]
        diverged = [each for each in self.candidates if each not in curves]
        if best is None:
            raise TrainingStopped(
                f"all {len(diverged)} candidates diverged. The likely cause is learning rates that "
                f"are too large ({rates(diverged)}): lower lr, or selection.lr_factors."
            )
        _, judged, candidate, trained = best
        if self.selection.by == "kfold":
            schedule = replace(self.schedule, steps=judged.step)
            trained = self._train(candidate, everything(self.split.train_targets), schedule)
        else:
            assert trained.run.best is not None
            trained.run.model.load_state_dict(trained.run.best[1])
        fit = self._fit(trained.run, candidate, judged, setup)
        passed_over = [] if candidate in doubted else doubted
        return SearchResult(fit, trained, curves, diverged, passed_over)

    def _try(self, candidate: Candidate) -> list[Trained] | None:
        """Its training runs, one a part; None if one of them diverged."""
        found = []
        for part in self.parts:
            try:
                found.append(self._train(candidate, part, self.schedule))
            except TrainingStopped:
                return None
        return found

    def _train(self, candidate: Candidate, part: Part, schedule: Schedule) -> Trained:
        split = self.split
        device = split.train_targets.device
        rows, held_out = part.fit.to(device), part.validation.to(device)
        own = split if len(held_out) == 0 else split.fitted_on(rows)
        model, optimizer = self.build(candidate, own)
        run = CandidateRun(
            model, split.train_inputs[held_out], split.train_targets[held_out], self._show
        )
        size = None if self.batch_size is None else min(self.batch_size, len(rows))
        try:
            train(model, optimizer, own, schedule, run, Batches(len(rows), size, self.seed))
        finally:
            self._spent.add(run, schedule.steps)
        return Trained(run, optimizer)

    def _show(self, step: int, figures: dict[str, float]) -> None:
        if self.shown is not None:
            self.shown(self._spent.steps + step, figures)

    def _fit(
        self, run: CandidateRun, candidate: Candidate, judged: ValidationPoint, setup: float
    ) -> Fit:
        samples = len(self.split.train_targets)
        return Fit(
            seconds=self._spent.seconds,
            steps_per_second=1 / median(run.seconds),
            fit_seconds=setup + self._spent.seconds + self._spent.judging,
            passes=self._spent.gradients / samples,
            samples=samples - len(run.targets),
            step=judged.step,
            error=judged.error,
            lr=candidate.lr,
            weight_decay=candidate.weight_decay,
        )


@dataclass
class _Spent:
    """What all training runs took, those that diverged included."""

    steps: int = 0
    seconds: float = 0.0
    judging: float = 0.0
    gradients: int = 0

    def add(self, run: CandidateRun, steps: int) -> None:
        self.steps += steps
        self.seconds += sum(run.seconds)
        self.judging += run.judging
        self.gradients += run.gradients


def mean_curve(curves: Sequence[Sequence[ValidationPoint]]) -> list[ValidationPoint]:
    """Average judgements over folds, at steps that all of them have.

    Args:
        curves: of the folds.
    """
    means = []
    for judgements in zip(*curves, strict=False):
        loss, error = (fmean(getattr(j, name) for j in judgements) for name in ("loss", "error"))
        means.append(ValidationPoint(judgements[0].step, loss, error))
    return means


def rates(candidates: Sequence[Candidate]) -> str:
    """Say learning rates."""
    return "lr=" + ", ".join(f"{rate:g}" for rate in sorted({each.lr for each in candidates}))
