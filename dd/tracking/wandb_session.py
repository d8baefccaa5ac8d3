"""What all Weights & Biases runs of one experiment share."""

import os
import secrets
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dd.tracking.wandb_logging import MODES, WandbRun, server_address, synced_by
from dd.tracking.wandb_server import answers
from dd.tracking.wandb_variables import Variables

__all__ = ["WandbSession", "check_settings", "group_of"]

PROJECT = "decoupled-descent"

# What the server takes.
LONGEST_GROUP, LONGEST_TAG = 128, 64


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check ``tracking.wandb``.

    Raises:
        ValueError: if mode, project, entity or a tag cannot be; null is left to the environment.
    """
    mode, project = settings["mode"], settings["project"]
    if mode is not None and mode not in MODES:
        raise ValueError(
            f"tracking.wandb.mode must be one of {', '.join(MODES)}, or null, got {mode!r}"
        )
    entity, tags = settings["entity"], settings["tags"]
    named = isinstance(project, str) and project and not set(project) & set("/\\#?%:")
    if project is not None and not named:
        raise ValueError(
            "tracking.wandb.project must be a name without the characters / \\ # ? % :, or null, "
            f"got {project!r}"
        )
    if entity is not None and (not isinstance(entity, str) or not entity):
        raise ValueError(f"tracking.wandb.entity must be a user or team, or null, got {entity!r}")
    texts = not isinstance(tags, str) and all(isinstance(tag, str) for tag in tags)
    if not texts or any(not 0 < len(tag) <= LONGEST_TAG for tag in tags):
        raise ValueError(
            f"tracking.wandb.tags must list texts of 1 to {LONGEST_TAG} characters, got {tags!r}"
        )


def group_of(experiment: str, folder: str | os.PathLike[str]) -> str:
    """Return the group of a run folder, which no other folder shares.

    Args:
        experiment: its name.
        folder: the run folder.

    Returns:
        What comes after the experiment's own folder, as in ``xor/2026-01-31_12-00-00_0``, or
        ``xor/2026-01-31_12-00-00_sweep/0_0`` in a multirun. Elsewhere the folder's name and a
        checksum of its path.
    """
    path = Path(folder).resolve()
    above = path.parent.parts
    if experiment in above:
        place = len(above) - 1 - above[::-1].index(experiment)
        group = "/".join((experiment, *above[place + 1 :], path.name))
    else:
        group = f"{experiment}/{path.name}-{zlib.crc32(os.fsencode(path)):08x}"
    # Folders differ in their ends.
    return group[-LONGEST_GROUP:]


@dataclass
class WandbSession:
    """Starts the runs of an experiment, and gives up a server that does not answer.

    Attributes:
        mode: "online", "offline" or "disabled"; what is left of it once something is given up.
        experiment: its name.
        folder: the run folder.
        project: on the server.
        entity: user or team of the project; None is the user's default.
        tags: of every run.
        token: from which the runs' ids are made.
        variables: what the environment says beside that.
        notes: sentences on what was given up, and on what the environment says in vain.
    """

    mode: str
    experiment: str
    folder: Path
    project: str
    entity: str | None = None
    tags: Sequence[str] = ()
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    variables: Variables = field(default_factory=Variables)
    notes: list[str] = field(default_factory=list)
    _has_started: bool = field(init=False, default=False)

    @classmethod
    def of_settings(
        cls, settings: Mapping[str, Any], experiment: str, folder: Path, token: str
    ) -> "WandbSession":
        """Return the session of valid settings ``tracking.wandb``, and of the environment.

        Raises:
            ValueError: if a variable of the environment cannot be.
        """
        variables = Variables.of_environment()
        mode, project, entity = settings["mode"], settings["project"], settings["entity"]
        tags = dict.fromkeys([*settings["tags"], *variables.tags])
        return cls(
            mode or variables.mode or "offline",
            experiment,
            folder,
            project or variables.project or PROJECT,
            entity or variables.entity,
            tuple(tags),
            token,
            variables,
            variables.overruled(mode=mode, project=project, entity=entity),
        )

    def settle(self) -> None:
        """Log offline if the server does not answer within three seconds.

        Raises:
            RuntimeError: if wandb is not installed.
        """
        if self.mode == "online" and not answers(address := server_address()):
            self.give_up(f"the Weights & Biases server {address} does not answer")

    @property
    def directory(self) -> Path:
        """The folder that holds the runs' folder ``wandb``."""
        return self.variables.directory or self.folder

    def give_up(self, reason: str, mode: str = "offline") -> None:
        """Go on in another mode, and say so."""
        self.mode = mode
        if mode == "disabled":
            self.notes.append(f"{reason}: not logged any more; the run folder has all of it")
            return
        self.notes.append(
            f"{reason}: logged offline; when it answers again, {synced_by(self.directory)} sends "
            "what is missing"
        )

    def run(
        self,
        name: str,
        *,
        job_type: str,
        config: Mapping[str, Any],
        tags: Sequence[str] = (),
        resumes: bool = False,
    ) -> WandbRun:
        """Return a run of this experiment, not yet started.

        Args:
            name: of the run, which no other of the experiment has.
            job_type: what runs of several trials have in common.
            config: everything that was configured.
            tags: beside those of the session.
            resumes: whether it goes on with a run of this name.
        """
        known, is_first = self.variables, not self._has_started
        self._has_started = True
        return WandbRun(
            mode=self.mode,
            directory=self.directory,
            project=self.project,
            entity=self.entity,
            group=known.group or group_of(self.experiment, self.folder),
            name=f"{known.name}-{name}" if known.name else name,
            job_type=known.job_type or job_type,
            tags=list(dict.fromkeys([self.experiment, *tags, *self.tags])),
            config=config,
            run_id=f"{self.token}-{name}",
            resumes=resumes,
            is_first=is_first,
            give_up=self.give_up,
        )
