"""What an experiment writes: its run folder, its logs, and their comparison."""

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

import dd
from dd.experiments.assembly import (
    optimizer_settings,
    settled,
)
from dd.experiments.prediction import curves
from dd.runs.optimizer_list import is_tracked
from dd.runs.results import Results
from dd.runs.theory_file import write_theory
from dd.support.files import replacing, write_json, write_rows
from dd.support.folder_lock import FolderLocked
from dd.sweep.job import FILE, read_job
from dd.theory.state_evolution import StateEvolution
from dd.tracking.history import History
from dd.tracking.wandb_comparison import compared, comparison_figures
from dd.tracking.wandb_logging import WandbRun
from dd.tracking.wandb_session import WandbSession
from dd.tracking.wandb_variables import run_id
from dd.training.launch import Processes

__all__ = ["Output", "first_token"]


@dataclass
class Output:
    """What an experiment has found so far, and where it goes.

    Attributes:
        config: a composed configuration of ``configs/``.
        folder: the run folder; it must not hold another run.
        kept: content of the checkpoint from which the run of this folder goes on, or None for a run
            that begins.
        results: what was found so far.
        theory: predicted curves of each decoupled optimizer, where they are asked for.
        wandb: starts the Weights & Biases runs.
        report: path of the report; None where none was written.
        processes: of the run.
        device: where it computes.
    """

    config: DictConfig
    folder: Path
    kept: Mapping[str, Any] | None = None
    results: Results = field(init=False)
    theory: dict[str, StateEvolution] = field(init=False, default_factory=dict)
    wandb: WandbSession = field(init=False)
    report: Path | None = field(init=False, default=None)
    processes: Processes = field(init=False)
    device: torch.device = field(init=False)

    @property
    def history(self) -> History:
        """Every record."""
        return self.results.history

    @property
    def failures(self) -> list[str]:
        """One sentence for each optimizer and trial that turned non-finite."""
        return self.results.failures

    @property
    def notes(self) -> list[str]:
        """What else the user should know of an optimizer and trial."""
        return self.results.notes

    @property
    def noise(self) -> dict[str, str]:
        """A line on the noise model of each decoupled optimizer, of the first trial."""
        return self.results.noise

    @property
    def summary(self) -> dict[str, dict[str, Any]]:
        """The figures of each optimizer, as in ``summary.json``."""
        return self.results.summary()

    @property
    def figure(self) -> Path:
        """Path of the picture, which may be missing."""
        return self.folder / "train_vs_test.png"

    def _tracker(self, config: DictConfig, name: str, trial: int, *, resumes: bool) -> WandbRun:
        settings: Any = OmegaConf.to_container(config, resolve=True)
        settings["optimizer"] = own = optimizer_settings(config, name)
        del settings["available"]
        kind = "decoupled" if is_tracked(own) else "plain"
        return self.wandb.run(
            name if config.trials == 1 else f"{name}-{trial}",
            job_type=name,
            config=settings,
            tags=[name, kind, f"dd-{dd.__version__}"],
            resumes=resumes,
        )

    def _compare(self) -> None:
        """Log what all optimizers have shown, side by side; there is nothing more to lose."""
        settings: Any = OmegaConf.to_container(self.config, resolve=True)
        self.wandb.settle()
        with self.wandb.run(
            "comparison",
            job_type="comparison",
            config=settings,
            tags=[f"dd-{dd.__version__}"],
            resumes=self.kept is not None,
        ) as run:
            figure = self.figure if self.figure.is_file() else None
            run.show(lambda wandb: compared(wandb, self.history, self.summary, figure))
            run.summarise(comparison_figures(self.summary))
        if set(self.wandb.notes) - set(self.notes):
            self._write_summary(finished=True)

    def _claim_folder(self) -> None:
        target = self.folder / "config.yaml"
        try:
            target.touch(exist_ok=False)
        except FileExistsError:
            raise FolderLocked(
                f"{self.folder} holds another run; choose another folder with hydra.run.dir=..."
            ) from None
        with replacing(target) as scratch:
            scratch.write_text(OmegaConf.to_yaml(settled(self.config)), encoding="utf-8")

    def _write_results(self, *, finished: bool = False) -> None:
        """Write what was found so far, the tables before the summary that speaks of them."""
        if not self.history.records:
            # Nothing began, so the folder is free for the mended command.
            (self.folder / "config.yaml").unlink(missing_ok=True)
            return
        self.history.write_csv(self.folder / "history.csv")
        if self.results.selection:
            write_rows(self.folder / "selection.csv", self.results.selection)
        if self.theory:
            write_theory(self.theory, self.folder / "state_evolution.csv")
        self._write_summary(finished=finished)

    def _draw(self, *, finished: bool = False) -> None:
        """Write the picture; without it the run has lost nothing, but for a picture."""
        if not self.history.records:
            return
        theory = {name: curves(found) for name, found in self.theory.items()}
        validation = self.results.validation()
        try:
            # Imported here, because matplotlib would double the time to an error message.
            from dd.tracking.figures import train_vs_test

            train_vs_test(self.history, self.figure, self.config.name, theory, validation)
        except Exception as error:
            # One of an earlier state would be taken for this one's.
            self.figure.unlink(missing_ok=True)
            self.results.note([f"{self.figure.name} could not be drawn: {error}"])
            self._write_summary(finished=finished)

    def _write_report(self, *, finished: bool = False) -> None:
        """Write the report from what is in the folder; without it the run has lost nothing."""
        wanted = self.config.tracking.report and self.processes.leads
        if not wanted or not self.history.records:
            return
        try:
            # Imported here, because it would double the time to an error message.
            from dd.report.page import write_report

            self.report = write_report(self.folder)
        except Exception as error:
            with suppress(OSError):
                (self.folder / "report.html").unlink(missing_ok=True)
            self.results.note([f"report.html could not be written: {error}"])
            self._write_summary(finished=finished)

    def _write_summary(self, *, finished: bool) -> None:
        self.results.note(self.wandb.notes)
        provenance = {"finished": finished, **self._provenance()}
        write_json(self.folder / "summary.json", {**self.summary, **provenance})

    def _provenance(self) -> dict[str, Any]:
        return {
            "experiment": self.config.name,
            "seed": self.config.seed,
            "trials": self.config.trials,
            "device": _describe(self.device),
            "processes": self.processes.size,
            "torch": torch.__version__,
            "dd_version": dd.__version__,
            "failures": self.failures,
            "noise": self.noise,
            "notes": self.notes,
            **({"data": self.results.data} if self.results.data else {}),
        }


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads, {os.cpu_count()} cores)"


def first_token(folder: Path) -> str:
    """Return what the ids of a new experiment's runs begin with: WANDB_RUN_ID, or what none has.

    Args:
        folder: the run folder; jobs of one multirun differ by their number.
    """
    given = run_id()
    if given is None:
        return secrets.token_hex(8)
    return f"{given}-{read_job(folder).number}" if (folder / FILE).is_file() else given
