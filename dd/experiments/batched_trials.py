"""The trials of an experiment that can be computed at once."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig

from dd.experiments.assembly import (
    make_model,
    make_noise,
    make_split,
    optimizer_maker,
    optimizer_settings,
    with_seed,
)
from dd.optimizer import DecoupledDescent
from dd.runs.optimizer_list import AUTO
from dd.tracking.history import Record
from dd.trials import trial_chunks
from dd.trials.results import METRICS, Trials
from dd.watch.shadow_size import shadow_size_message

__all__ = ["BatchedTrials", "batchable_groups", "doubts_in", "failure_of", "records_of"]


@dataclass(frozen=True, eq=False)
class BatchedTrials:
    """Optimizers of a configuration that run together in every trial but the first.

    The first is trained by the loop, with everything that watches it.

    Attributes:
        config: of the first trial.
        names: of the optimizers.
    """

    config: DictConfig
    names: tuple[str, ...]

    def chunks(
        self, trials: Sequence[int], device: torch.device
    ) -> Iterator[tuple[Sequence[int], Trials]]:
        """Train, and yield some trials at a time.

        Args:
            trials: their numbers, from 0.
            device: where to compute.
        """
        config = self.config
        decoupled = [n for n in self.names if optimizer_maker(config, n).func is DecoupledDescent]
        noise = None
        if decoupled:
            settings = optimizer_settings(config, decoupled[0])

            def noise(split: Any) -> Any:
                return make_noise(config, settings, split)

        def probe_seed(seed: int) -> int:
            return int(optimizer_settings(with_seed(config, seed), decoupled[0]).get("seed", 0))

        def model(seed: int, split: Any) -> Any:
            return make_model(with_seed(config, seed), split)

        first = trials[0]
        for found in trial_chunks(
            lambda seed: make_split(with_seed(config, seed)),
            model,
            {name: optimizer_maker(config, name) for name in self.names},
            seeds=[config.seed + trial for trial in trials],
            steps=config.steps,
            record_every=config.tracking.record_every,
            noise=noise,
            probe_seed=probe_seed if decoupled else None,
            device=device,
        ):
            yield range(first, first + len(found.seeds)), found
            first += len(found.seeds)


def batchable_groups(config: DictConfig, processes: int) -> list[BatchedTrials]:
    """Return the optimizers that can run together, those that share a noise model in one group.

    Args:
        config: its list of optimizers settled.
        processes: that share the samples of every update.
    """
    wanted = config.together and config.trials > 1 and processes == 1
    if not wanted or config.data.get("batch_size") is not None:
        return []
    groups: dict[Any, list[str]] = {}
    for name in config.optimizers:
        if _is_batchable(config, name):
            groups.setdefault(_kind(config, name), []).append(name)
    plain = groups.pop(None, [])
    if plain and groups:
        first = next(iter(groups))
        groups[first] = [n for n in config.optimizers if n in {*plain, *groups[first]}]
    elif plain:
        groups[None] = plain
    return [BatchedTrials(config, tuple(names)) for names in groups.values()]


def _is_batchable(config: DictConfig, name: str) -> bool:
    settings, kind = optimizer_settings(config, name), optimizer_maker(config, name).func
    if "selection" in settings or settings.get("batch_size") is not None:
        return False
    if settings.get("decouple") is not None:
        return False
    if kind is torch.optim.SGD:
        return True
    return (
        kind is DecoupledDescent
        and settings.get("lr") != AUTO
        and settings.get("head", False) is False
        and settings.get("curvature", AUTO) in (AUTO, "stein", "probe")
    )


def _kind(config: DictConfig, name: str) -> Any:
    """What optimizers of one group have in common; None fits any."""
    if optimizer_maker(config, name).func is torch.optim.SGD:
        return None
    settings = optimizer_settings(config, name)
    later = optimizer_settings(with_seed(config, config.seed + 1), name)
    finds_clusters = config.components == "none" and settings.get("curvature") == "stein"
    return finds_clusters, settings.get("seed"), later.get("seed")


def records_of(name: str, trial: int, found: Trials, row: int) -> list[Record]:
    """The records of one optimizer and trial, up to the one at which it failed.

    Args:
        name: of the optimizer.
        trial: its number.
        found: the trials of a chunk.
        row: of this one among them.
    """
    columns = [found.metrics[name][metric][row].tolist() for metric in METRICS]
    records: list[Record] = []
    for step, *figures in zip(found.steps.tolist(), *columns, strict=True):
        # The first stays, so that a trial that failed at once is seen among the others.
        if records and all(math.isnan(value) for value in figures):
            break
        records.append(Record(name, trial, step, *figures))
    return records


def doubts_in(name: str, seed: int, found: Trials) -> list[str]:
    """Why the training error of an optimizer's trial is not to be believed, a sentence each."""
    return [shadow_size_message(d.share) for d in found.doubts if (d.name, d.seed) == (name, seed)]


def failure_of(name: str, seed: int, found: Trials) -> str | None:
    """A sentence on why an optimizer's trial turned non-finite; None if it did not."""
    for failure in found.failures:
        if (failure.name, failure.seed) == (name, seed):
            return (
                f"the training loss is not finite at step {failure.step}. The likely cause is a "
                "learning rate that is too large: try half of it."
            )
    return None
