"""One run of an experiment: from its configuration to its folder of results."""

import copy
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

import dd
from dd.assembly import (
    make_batches,
    make_model,
    make_optimizer,
    make_split,
    optimizer_settings,
    validate,
    with_seed,
)
from dd.batches import Batches
from dd.checkpoint import Checkpoint
from dd.console import ProgressDisplay
from dd.data import Split
from dd.device import choose_device
from dd.notices import noted
from dd.optimizer import DecoupledDescent
from dd.stability import EdgeWatch
from dd.tracking import History, Record, aggregate, replacing, summarise, write_json
from dd.training import Schedule, TrainingStopped, train
from dd.wandb_logging import WandbRun, check_mode

__all__ = ["Experiment"]


@dataclass
class _Recorder:
    """Sends the records and states of one optimizer and trial where they belong."""

    name: str
    trial: int
    history: History
    tracker: WandbRun
    display: ProgressDisplay | None
    task: Any
    checkpoint: Checkpoint
    edge: EdgeWatch

    def record(self, step: int, figures: dict[str, float]) -> None:
        self.edge.look(step)
        entry = Record(self.name, self.trial, step, **figures)
        self.history.append(entry)
        self.tracker.log(entry)
        if self.display is not None:
            self.display.update(self.task, entry)

    def keep(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.checkpoint.keep(self.name, step, model, optimizer)
        self.history.write_csv(self.checkpoint.path.with_name("history.csv"))


@dataclass
class Experiment:
    """Optimizers side by side: same data, same initial weights, trial after trial.

    Attributes:
        config: a composed configuration of ``configs/``.
        folder: the run folder; it must not hold another run.
        history: every record.
        failures: one sentence for each optimizer and trial that turned non-finite.
        notes: what else the user should know of an optimizer and trial.
        noise: a line on the noise model of each decoupled optimizer, of the first trial.

    Raises:
        ValueError: if the configuration asks for what cannot be.
    """

    config: DictConfig
    folder: Path
    history: History = field(default_factory=History)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    noise: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        validate(self.config)
        tracking = self.config.tracking
        self.schedule = Schedule(
            self.config.steps, tracking.record_every, tracking.checkpoint_every
        )
        check_mode(tracking.wandb.mode)
        self.device = choose_device(self.config.device)
        self._update_seconds: dict[tuple[str, int], list[float]] = {}

    @property
    def summary(self) -> dict[str, dict[str, Any]]:
        """The figures of each optimizer, as in ``summary.json``."""
        return {name: self._summarise(name) for name in self.history.optimizers}

    @property
    def figure(self) -> Path:
        """Path of the picture."""
        return self.folder / "train_vs_test.png"

    def run(self) -> None:
        """Train, and write the run folder; what was recorded is written even after an error.

        Raises:
            FileExistsError: if the folder holds another run.
            FileNotFoundError: if the data set is missing.
            RuntimeError: if the data set is damaged, or the tracking cannot start.
            ValueError: if a part of the configuration is out of range.
        """
        self._claim_folder()
        display = ProgressDisplay() if self.config.tracking.progress else None
        try:
            with display or nullcontext():
                for trial in range(self.config.trials):
                    self._run_trial(trial, display)
        finally:
            self._write_results()

    def _run_trial(self, trial: int, display: ProgressDisplay | None) -> None:
        config = with_seed(self.config, self.config.seed + trial)
        split = make_split(config).to(self.device)
        batches = make_batches(config, split)
        initial = make_model(config, split)
        checkpoint = Checkpoint(self.folder / "checkpoint.pt", trial)
        pairs: dict[str, tuple[nn.Sequential, torch.optim.Optimizer]] = {}
        # All are built before one is trained, so that a wrong setting costs no training.
        for name in config.optimizers:
            model = copy.deepcopy(initial).to(self.device)
            pairs[name] = model, make_optimizer(config, name, model, split)
        for name, (model, optimizer) in pairs.items():
            label = name if config.trials == 1 else f"{name} {trial + 1}/{config.trials}"
            edge = EdgeWatch(model, optimizer, split.train_inputs, split.train_targets)
            recorder = _Recorder(
                name=name,
                trial=trial,
                history=self.history,
                tracker=self._tracker(config, name, trial),
                display=display,
                task=display.start(name, label, self.schedule.steps) if display else None,
                checkpoint=checkpoint,
                edge=edge,
            )
            try:
                with noted() as sentences:
                    self._train(model, optimizer, split, recorder, batches)
            except TrainingStopped as error:
                self.failures.append(f"{label}: {error}")
            self._note(name, optimizer, sentences)
            if edge.crossing is not None:
                self.notes.append(f"{label}: {edge.crossing}")

    def _note(self, name: str, optimizer: torch.optim.Optimizer, sentences: Sequence[str]) -> None:
        # What is said of the sizes is the same in every trial.
        notes = [f"{name}: {sentence}" for sentence in sentences]
        self.notes.extend(note for note in notes if note not in self.notes)
        if isinstance(optimizer, DecoupledDescent):
            self.noise.setdefault(name, str(optimizer.noise))

    def _train(
        self,
        model: nn.Sequential,
        optimizer: torch.optim.Optimizer,
        split: Split,
        recorder: _Recorder,
        batches: Batches,
    ) -> None:
        with recorder.tracker:
            seconds = train(model, optimizer, split, self.schedule, recorder, batches)
            self._update_seconds[recorder.name, recorder.trial] = seconds
            recorder.tracker.summarise(self._figures(recorder.name, recorder.trial))

    def _figures(self, name: str, trial: int) -> dict[str, float]:
        seconds = self._update_seconds.get((name, trial))
        rate = math.nan if seconds is None else 1 / median(seconds)
        total = math.nan if seconds is None else sum(seconds)
        figures = summarise(self.history.select(name, trial))
        return figures | {"seconds": total, "steps_per_second": rate}

    def _summarise(self, name: str) -> dict[str, Any]:
        trials = self.history.trials(name)
        completed = sum((name, trial) in self._update_seconds for trial in trials)
        figures = aggregate([self._figures(name, trial) for trial in trials])
        return figures | {"completed_trials": completed}

    def _tracker(self, config: DictConfig, name: str, trial: int) -> WandbRun:
        settings: Any = OmegaConf.to_container(config, resolve=True)
        settings["optimizer"] = optimizer_settings(config, name)
        del settings["available"]
        return WandbRun(
            mode=config.tracking.wandb.mode,
            directory=self.folder,
            project=config.tracking.wandb.project,
            optimizer=name,
            config=settings,
            trial=trial,
            trials=config.trials,
        )

    def _claim_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / "config.yaml"
        try:
            target.touch(exist_ok=False)
        except FileExistsError:
            raise FileExistsError(
                f"{self.folder} holds another run; choose another folder with hydra.run.dir=..."
            ) from None
        with replacing(target) as scratch:
            scratch.write_text(OmegaConf.to_yaml(self.config, resolve=True), encoding="utf-8")

    def _write_results(self) -> None:
        if not self.history.records:
            # Nothing began, so the folder is free for the mended command.
            (self.folder / "config.yaml").unlink()
            return
        # Imported here, because matplotlib would double the time to an error message.
        from dd.figures import train_vs_test

        self.history.write_csv(self.folder / "history.csv")
        write_json(self.folder / "summary.json", {**self.summary, **self._provenance()})
        train_vs_test(self.history, self.figure, self.config.name)

    def _provenance(self) -> dict[str, Any]:
        return {
            "experiment": self.config.name,
            "seed": self.config.seed,
            "trials": self.config.trials,
            "device": _describe(self.device),
            "torch": torch.__version__,
            "dd_version": dd.__version__,
            "failures": self.failures,
            "noise": self.noise,
            "notes": self.notes,
        }


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads, {os.cpu_count()} cores)"
