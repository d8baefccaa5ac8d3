"""One optimizer and trial of an experiment, built before it is trained."""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from dd.baselines.hyperparameter_search import HyperparameterSearch
from dd.baselines.selection import Candidate
from dd.data import Split
from dd.experiments.assembly import (
    batch_size,
    make_batches,
    make_noise,
    make_optimizer,
    make_selection,
    optimizer_settings,
    with_candidate,
)
from dd.experiments.checkpoint import Checkpoint
from dd.noise.model import NoiseModel
from dd.optimizer import DecoupledDescent
from dd.runs.optimizer_list import is_decoupled
from dd.training.batches import Batches
from dd.training.loop import Schedule

__all__ = ["Job", "build_job", "make_search"]


@dataclass(eq=False)
class Job:
    """One optimizer and trial, not yet trained.

    Attributes:
        name: of the optimizer.
        trial: which repetition.
        config: of the trial.
        initial: the model that all optimizers of the trial begin with.
        model: a copy of it, on the device.
        optimizer: of the model.
        split: on the device.
        batches: of every update.
        checkpoint: receives the states.
        kept: what the checkpoint says of it, where it is gone on with.
        setup: seconds that its noise model took.
    """

    name: str
    trial: int
    config: DictConfig
    initial: nn.Sequential
    model: nn.Sequential
    optimizer: torch.optim.Optimizer
    split: Split
    batches: Batches
    checkpoint: Checkpoint
    kept: Mapping[str, Any] | None
    setup: float


def build_job(
    name: str,
    trial: int,
    config: DictConfig,
    initial: nn.Sequential,
    split: Split,
    *,
    checkpoint: Checkpoint,
    kept: Mapping[str, Any] | None,
) -> Job:
    """Build an optimizer and trial; arguments as the attributes of :class:`Job`.

    Raises:
        ValueError: if a setting is out of range, or the checkpoint is of another configuration.
    """
    model = copy.deepcopy(initial).to(split.train_inputs.device)
    batches = make_batches(config, name, split)
    noise, setup = _noise(config, name, split)
    optimizer = make_optimizer(config, name, model, split, noise)
    if kept is not None:
        _load(kept, model, optimizer)
    return Job(
        name, trial, config, initial, model, optimizer, split, batches, checkpoint, kept, setup
    )


def _noise(config: DictConfig, name: str, split: Split) -> tuple[NoiseModel | None, float]:
    """The noise model of a decoupled optimizer, and the seconds that it took."""
    settings = optimizer_settings(config, name)
    if not is_decoupled(settings):
        return None, 0.0
    started = time.perf_counter()
    noise = make_noise(config, settings, split)
    return noise, time.perf_counter() - started


def _load(state: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what a checkpoint holds.

    Raises:
        ValueError: if it is of another configuration.
    """
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            "the checkpoint does not fit the config.yaml beside it, which must not be edited "
            f"({' '.join(str(error).split())})"
        ) from error


def make_search(job: Job, schedule: Schedule) -> HyperparameterSearch | None:
    """Return what chooses the settings of a job; None where they are given.

    Raises:
        ValueError: if there are fewer samples than folds.
    """
    selection = make_selection(job.config, job.name)
    if selection is None:
        return None
    noise = job.optimizer.noise if isinstance(job.optimizer, DecoupledDescent) else None

    def build(candidate: Candidate, split: Split) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = copy.deepcopy(job.initial).to(split.train_inputs.device)
        config = with_candidate(job.config, job.name, candidate)
        return model, make_optimizer(config, job.name, model, split, noise)

    return HyperparameterSearch(
        selection=selection,
        candidates=selection.candidates(float(job.optimizer.param_groups[0]["lr"])),
        split=job.split,
        schedule=schedule,
        seed=job.config.seed,
        batch_size=batch_size(job.config, job.name),
        build=build,
    )
