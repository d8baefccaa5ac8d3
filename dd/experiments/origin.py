"""What a run was begun with, so that it goes on with nothing else."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import dd
from dd.data import Split
from dd.experiments.assembly import settled
from dd.report.settings import differences, flat_config
from dd.support.fingerprint import Fingerprints, fingerprint

__all__ = ["changed_settings", "changed_versions", "origin_of", "require_same_data"]


def origin_of(config: DictConfig, split: Split) -> dict[str, Any]:
    """Return settings, data, working directory and versions, as a checkpoint keeps them.

    Args:
        config: of the run.
        split: of the trial, on the CPU.
    """
    return {
        "config": OmegaConf.to_yaml(settled(config)),
        "directory": os.getcwd(),
        "versions": _versions(),
        "data": {
            "digest": _digest(split),
            "train": fingerprint(split.train_inputs),
            "test": fingerprint(split.test_inputs),
            "train_targets": split.train_targets,
            "test_targets": split.test_targets,
            "components": split.train_components,
        },
    }


def changed_settings(origin: Mapping[str, Any], config: DictConfig) -> list[str]:
    """Return a phrase on each setting of ``config.yaml`` that is not what the run began with."""
    began = OmegaConf.create(origin["config"])
    return differences(flat_config(began), flat_config(config))


def changed_versions(origin: Mapping[str, Any]) -> list[str]:
    """Return a sentence on each package that now has another version."""
    return [
        f"the run began with {name} {then} and went on with {now}"
        for name, now in _versions().items()
        if (then := origin["versions"].get(name)) != now
    ]


def require_same_data(origin: Mapping[str, Any], split: Split, source: str) -> None:
    """Check that a trial goes on with the data that it began with.

    Data that were computed anew, on another machine say, may differ in rounding.

    Args:
        origin: of the run.
        split: of the same trial, on the CPU.
        source: names where it comes from.

    Raises:
        ValueError: if a sample, a label or the order is another.
    """
    began = origin["data"]
    digest = _digest(split)
    if digest == began["digest"]:
        return
    others = [
        *_other_inputs("training", began["train"], fingerprint(split.train_inputs)),
        *_other_inputs("test", began["test"], fingerprint(split.test_inputs)),
        *_other_ids("training labels", began["train_targets"], split.train_targets),
        *_other_ids("test labels", began["test_targets"], split.test_targets),
        *_other_ids("components", began["components"], split.train_components),
    ]
    if others:
        raise ValueError(
            f"the data are not those that the run began with: {', '.join(others)}. It began "
            f"with {len(began['train'])} training and {len(began['test'])} test samples (digest "
            f"{began['digest']}), and {source} now gives {len(split.train_targets)} and "
            f"{len(split.test_targets)} (digest {digest}). Put the data back or name where they "
            "are (data.path=, data.test_path= or data.root= can go with resume=), or start a new "
            "run with the settings of its config.yaml"
        )


def _versions() -> dict[str, str]:
    return {"dd": dd.__version__, "torch": str(torch.__version__)}


def _digest(split: Split) -> str:
    found = hashlib.sha256()
    parts = (
        split.train_inputs,
        split.train_targets,
        split.train_components,
        split.test_inputs,
        split.test_targets,
    )
    for part in parts:
        found.update(repr(None if part is None else tuple(part.shape)).encode())
        if part is not None:
            found.update(part.contiguous().numpy().data)
    return found.hexdigest()[:12]


def _other_inputs(kind: str, began: Tensor, now: Tensor) -> list[str]:
    if len(began) != len(now):
        return [f"{len(now)} {kind} samples for {len(began)}"]
    known = Fingerprints(began)
    if len(began) == 0 or known.are_at(0, now):
        return []
    index, same = known.find(now)
    if bool(same.all()) and len(index.unique()) == len(index):
        return [f"the {kind} samples stand in another order"]
    return [f"{int((~same).sum())} of {len(now)} {kind} samples are others"]


def _other_ids(kind: str, began: Tensor | None, now: Tensor | None) -> list[str]:
    if began is None or now is None:
        return [] if began is now else [f"{kind} that were not there before, or are no more"]
    if len(began) != len(now) or torch.equal(began, now):
        return []
    return [f"{int((began != now).sum())} of {len(now)} {kind} are others"]
