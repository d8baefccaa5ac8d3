"""One job of a multirun: what it was asked for, what became of it, and what a sweeper minimises."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import DictConfig

from dd.runs.optimizer_list import is_tracked, known_optimizers, requested_optimizers
from dd.support.files import write_json
from dd.support.folder_lock import FolderLocked
from dd.tracking.history import History
from dd.tracking.mark import mark

__all__ = ["FILE", "SweepJob", "objective_of", "read_job", "tracked_loss"]

FILE = "job.json"


@dataclass(frozen=True)
class SweepJob:
    """One job, as its folder's ``job.json`` tells of it.

    Attributes:
        number: in the order of the multirun, from 0.
        overrides: of the command line and the sweeper, such as ``{"lr": "0.1"}``.
        failed: why it could not be done, in a sentence; None where it could, or is going on.
        sweep: letters that all jobs of the multirun share, and no other's.
    """

    number: int
    overrides: Mapping[str, str]
    failed: str | None = None
    sweep: str = ""

    @classmethod
    def of_overrides(cls, number: int, overrides: Sequence[str], sweep: str = "") -> "SweepJob":
        """Return a job that begins; overrides as typed, ``["lr=0.1"]``."""
        pairs = (override.lstrip("+~").partition("=") for override in overrides)
        return cls(number, {key: value for key, _, value in pairs}, sweep=sweep)

    def is_begun_in(self, folder: Path) -> bool:
        """Whether a folder holds this very job, as when a cluster runs it once more.

        Raises:
            FolderLocked: if it holds another one.
            ValueError: if its ``job.json`` is damaged.
        """
        if not (folder / FILE).is_file():
            return False
        held = read_job(folder)
        if (held.number, held.overrides, held.sweep) == (self.number, self.overrides, self.sweep):
            return True
        raise FolderLocked(
            f"the folder {folder} of job {self.number} holds job {held.number} of "
            f"{'this' if held.sweep == self.sweep else 'another'} multirun; the jobs need folders "
            "of their own: hydra.sweep.subdir=... must differ between them"
        )

    def write(self, folder: Path) -> None:
        """Write it to its folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, asdict(self))


def read_job(folder: Path) -> SweepJob:
    """Read the job of a folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is damaged.
    """
    try:
        return SweepJob(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / FILE} is damaged ({error})") from error


def objective_of(config: DictConfig) -> str:
    """Return the name of the optimizer whose tracked loss a sweeper minimises.

    Args:
        config: valid; its ``objective`` is a name, or null for the first decoupled optimizer.

    Raises:
        ValueError: if it is not trained, or its training loss does not track the test loss.
    """
    known, names = known_optimizers(config), requested_optimizers(config)
    decoupled = [name for name in names if name in known and is_tracked(known[name])]
    asked = config.objective
    if asked is not None and asked not in names:
        raise ValueError(
            f"objective={asked} is not trained; it must be one of optimizers={names}, or null"
        )
    if not decoupled or asked not in (None, *decoupled):
        plain = asked or ", ".join(map(str, names))
        raise ValueError(
            f"there is no tracked loss to minimise: {plain} is plain, and its training loss falls "
            "with over-fitting. Train a decoupled optimizer, such as optimizers=[dd], and name it "
            "with objective= where there are several"
        )
    return str(asked or decoupled[0])


def tracked_loss(history: History, name: str, completed: Sequence[int]) -> float:
    """Return the lowest tracked loss after the start, the mean over trials.

    Args:
        history: what was recorded.
        name: of a decoupled optimizer.
        completed: its trials that were trained to their end, and whose loss is to be believed.

    Returns:
        Infinity where there is another trial.
    """
    trials = history.trials(name) if name in history.optimizers else []
    if not trials or set(trials) - set(completed):
        return math.inf
    return fmean(
        min(record.train_loss for record in history.select(name, trial) if record.step > 0)
        for trial in trials
    )


def described(figures: Mapping[str, Any]) -> str:
    """Say in a few words what an optimizer reports, given its figures of ``summary.json``."""
    reported, true = figures.get("reported_error"), figures.get("reported_test_error")
    if reported is None or not math.isfinite(reported):
        return "did not end"
    known = true is not None and math.isfinite(true)
    said = [f"reports {reported:.4f}", f"test error {true:.4f}" if known else "", mark(figures)]
    return ", ".join(filter(None, said))
