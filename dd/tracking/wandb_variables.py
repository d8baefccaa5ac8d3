"""The environment variables by which users steer Weights & Biases."""

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Variables", "run_id"]

# As wandb takes them, older names included.
MODES = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}


@dataclass(frozen=True)
class Variables:
    """What the environment says of the runs; None where it says nothing.

    An experiment has several runs, so that what wandb takes as the name or id of one is what those
    of all begin with.

    Attributes:
        mode: of WANDB_MODE; "disabled" by WANDB_DISABLED.
        project: of WANDB_PROJECT.
        entity: of WANDB_ENTITY.
        name: of WANDB_NAME.
        group: of WANDB_RUN_GROUP.
        job_type: of WANDB_JOB_TYPE.
        tags: of WANDB_TAGS, divided by commas.
        directory: of WANDB_DIR.
    """

    mode: str | None = None
    project: str | None = None
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: tuple[str, ...] = ()
    directory: Path | None = None

    @classmethod
    def of_environment(cls) -> "Variables":
        """Read them.

        Raises:
            ValueError: if WANDB_MODE is no mode.
        """
        tags = (_value("WANDB_TAGS") or "").split(",")
        directory = _value("WANDB_DIR")
        return cls(
            _mode(),
            _value("WANDB_PROJECT"),
            _value("WANDB_ENTITY"),
            _value("WANDB_NAME"),
            _value("WANDB_RUN_GROUP"),
            _value("WANDB_JOB_TYPE"),
            tuple(tag.strip() for tag in tags if tag.strip()),
            None if directory is None else Path(directory).expanduser().absolute(),
        )

    def overruled(self, *, mode: str | None, project: str | None, entity: str | None) -> list[str]:
        """Return a sentence on each variable that a setting of ``tracking.wandb`` overrules.

        Args:
            mode: the setting; None is left to the environment, here and below.
            project: the setting.
            entity: the setting.
        """
        pairs = {"mode": (mode, self.mode)}
        if mode != "disabled":
            pairs |= {"project": (project, self.project), "entity": (entity, self.entity)}
        return [
            f"tracking.wandb.{key}={value} was taken, and not {found}, which the environment "
            f"variable {_name(key)} says"
            for key, (value, found) in pairs.items()
            if value is not None and found not in {None, value}
        ]


def run_id() -> str | None:
    """Return what the ids of all runs begin with by WANDB_RUN_ID, or None."""
    return _value("WANDB_RUN_ID")


def _is_disabled() -> bool:
    return (_value("WANDB_DISABLED") or "").lower() in {"1", "true", "yes", "on"}


def _name(key: str) -> str:
    return "WANDB_DISABLED" if key == "mode" and _is_disabled() else f"WANDB_{key.upper()}"


def _mode() -> str | None:
    if _is_disabled():
        return "disabled"
    mode = _value("WANDB_MODE")
    if mode is not None and mode not in MODES:
        raise ValueError(f"WANDB_MODE must be one of {', '.join(MODES)}, got {mode!r}")
    return None if mode is None else MODES[mode]


def _value(name: str) -> str | None:
    """A variable; an empty one says nothing."""
    return os.environ.get(name) or None
