"""The settings by which runs differ."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dd.runs.folder import RunFolder
from dd.sweep.job import FILE, SweepJob, read_job
from dd.sweep.table import swept

__all__ = ["differences", "differing_settings", "flat", "flat_config"]

# Settings that change nothing that is computed.
IDLE = ("tracking", "resume", "objective")


def differing_settings(runs: Sequence[RunFolder]) -> tuple[list[str], list[Mapping[str, str]]]:
    """Return the settings that differ between runs.

    Args:
        runs: one or more. Jobs of one multirun differ by what its command line varied.

    Returns:
        Their keys, and the settings of each run, which may lack some of them.

    Raises:
        ValueError: if the file of a job is damaged.
    """
    folders = {run.path.resolve().parent for run in runs}
    if len(folders) == 1 and all((run.path / FILE).is_file() for run in runs):
        jobs = [read_job(run.path) for run in runs]
        return swept(jobs), [job.overrides for job in jobs]
    shared = set.intersection(*(set(run.optimizers) for run in runs))
    jobs = [SweepJob(number, flat(_own(run, shared))) for number, run in enumerate(runs)]
    return _leading(swept(jobs), jobs), [job.overrides for job in jobs]


def _own(run: RunFolder, shared: Set[str]) -> dict[str, Any]:
    """The configuration of a run, with the settings of optimizers that all runs train."""
    content: Any = OmegaConf.to_container(run.config, resolve=False)
    current = content.get("optimizer", {}).get("name")
    if current not in shared:
        content.pop("optimizer", None)
    content["available"] = {
        name: settings
        for name, settings in content.get("available", {}).items()
        if name in shared and name != current
    }
    return {key: value for key, value in content.items() if key not in IDLE}


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return every value by its dotted key, written as on a command line."""
    found: dict[str, str] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = _written(value)
    return found


def flat_config(config: DictConfig) -> dict[str, str]:
    """The same of a configuration, what refers to other settings as it is written."""
    return flat(OmegaConf.to_container(config, resolve=False))  # type: ignore[arg-type]


def differences(began: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return a phrase on each setting that is not what it was.

    Args:
        began: settings by their dotted keys, as :func:`flat` returns them.
        now: the later ones.
    """
    changed = [key for key in dict.fromkeys([*began, *now]) if began.get(key) != now.get(key)]
    # Others may follow those of few dots.
    return [
        f"{key} was {began.get(key, 'not set')} and is {now.get(key, 'not set')}"
        for key in sorted(changed, key=lambda key: key.count("."))
    ]


def _written(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _leading(keys: Sequence[str], jobs: Sequence[SweepJob]) -> list[str]:
    """Leave out keys that only follow a shorter one of the same last name, as optimizer.lr does."""
    leading: dict[tuple[str, tuple[str | None, ...]], str] = {}
    for key in sorted(keys, key=lambda key: key.count(".")):
        values = tuple(job.overrides.get(key) for job in jobs)
        leading.setdefault((key.rpartition(".")[2], values), key)
    return [key for key in keys if key in leading.values()]
