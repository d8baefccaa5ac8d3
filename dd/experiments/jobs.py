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
from dd.experiments.collected_warnings import collected_warnings_of
from dd.noise.model import NoiseModel
from dd.runs.optimizer_list import is_tracked
from dd.training.batches import Batches
from dd.training.joint_optimizer import tracker_of
from dd.training.loop import Schedule

__all__ = ["Job", "build_job", "followed", "make_search"]

# Of fewer inputs a response cannot be told: dd.decouple refuses most of them in the first steps.
FEWEST_INPUTS = 8


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
        told: what the optimizer warned of as it was built.
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
    told: list[str]


def followed(config: DictConfig, names: list[str], split: Split) -> tuple[list[str], list[str]]:
    """Leave out optimizers that cannot be followed on inputs this few.

    Args:
        config: of the trial.
        names: of the optimizers.
        split: that they train on.

    Returns:
        The others, and a sentence on each that was left out.

    Raises:
        ValueError: if none of the configuration's is left.
    """
    inputs = split.dimension
    narrow = [
        name
        for name in names
        if inputs < FEWEST_INPUTS and optimizer_settings(config, name).get("decouple") is not None
    ]
    reason = (
        f"dd.decouple follows an optimizer on {FEWEST_INPUTS} inputs or more, and these data have "
        f"{inputs}; dd knows its own rule on any"
    )
    if set(narrow) == set(config.optimizers):
        raise ValueError(f"optimizers={narrow} cannot be trained: {reason}")
    kept = [name for name in names if name not in narrow]
    return kept, [f"{name} was left out: {reason}" for name in narrow]


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
    with collected_warnings_of() as told:
        optimizer = make_optimizer(config, name, model, split, noise)
    if kept is not None:
        _load(kept, model, optimizer)
    return Job(
        *(name, trial, config, initial, model, optimizer, split, batches, checkpoint, kept, setup),
        told=told,
    )


def _noise(config: DictConfig, name: str, split: Split) -> tuple[NoiseModel | None, float]:
    """The noise model of a tracked optimizer, and the seconds that it took."""
    settings = optimizer_settings(config, name)
    if not is_tracked(settings):
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
    tracker = tracker_of(job.optimizer)
    noise = None if tracker is None else tracker.noise

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
