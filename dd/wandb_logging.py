"""One Weights & Biases run for each optimizer and trial."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dd.tracking import METRICS, Record

__all__ = ["MODES", "WandbRun", "check_mode"]

MODES = ("online", "offline", "disabled")

# Only what the run itself logs is kept: no source code, git state, console, machine or packages.
# A server that does not answer is given up after half a minute.
PRIVATE_SETTINGS: dict[str, Any] = {
    "console": "off",
    "disable_code": True,
    "init_timeout": 30.0,
    "disable_git": True,
    "host": "",
    "save_code": False,
    "silent": True,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


class WandbRun:
    """Log one optimizer and trial; use as a context manager.

    The run is closed as failed when the block raises. With mode "disabled" nothing happens and
    wandb is not imported.

    Args:
        mode: "online", "offline" or "disabled".
        directory: folder of the whole run; files land in its subfolder ``wandb``. Its name is the
            group that holds all optimizers and trials together.
        project: project on the server.
        optimizer: name of the run and its job type.
        config: everything that was configured.
        trial: which repetition, from 0.
        trials: how many there are; with more than one the trial is part of the run's name.
        run_id: of the run that this one goes on with, if any. Online it is continued; offline a
            second folder of the same run is written, for ``wandb sync``.

    Attributes:
        id: of the run on the server, or None before it has one.

    Raises:
        ValueError: if the mode is none of the three.
    """

    def __init__(
        self,
        *,
        mode: str,
        directory: str | os.PathLike[str],
        project: str,
        optimizer: str,
        config: Mapping[str, Any],
        trial: int = 0,
        trials: int = 1,
        run_id: str | None = None,
    ) -> None:
        """Check the mode; the run itself starts with the block.

        Raises:
            ValueError: if the mode is none of the three.
        """
        check_mode(mode)
        self.mode = mode
        self.directory = Path(directory)
        self.project = project
        self.optimizer = optimizer
        self.name = optimizer if trials == 1 else f"{optimizer}-{trial}"
        self.config = dict(config)
        self.id = run_id
        self._run: Any = None

    def __enter__(self) -> "WandbRun":
        """Start the run.

        Raises:
            RuntimeError: if wandb is not installed, or refuses to start the run.
        """
        if self.mode != "disabled":
            self._run = self._start()
            self.id = str(self._run.id)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the run, as failed if the block raised."""
        if self._run is not None:
            self._run.finish(exit_code=0 if kind is None else 1)
            self._run = None

    def log(self, record: Record) -> None:
        """Log the step and every metric of a record."""
        if self._run is not None:
            row = {name: getattr(record, name) for name in METRICS}
            self._run.log({"step": record.step, **row})

    def summarise(self, summary: Mapping[str, float]) -> None:
        """Set the run's summary."""
        if self._run is not None:
            self._run.summary.update(dict(summary))

    def _start(self) -> Any:
        wandb = _import_wandb()
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            run = wandb.init(
                project=self.project,
                dir=str(self.directory),
                mode=self.mode,
                group=self.directory.resolve().name,
                name=self.name,
                job_type=self.optimizer,
                config=self.config,
                id=self.id,
                resume=None if self.id is None else "allow",
                reinit="create_new",
                settings=wandb.Settings(**_known(PRIVATE_SETTINGS, wandb.Settings)),
            )
        except (ValueError, wandb.Error) as error:  # ValueError: a bad WANDB_ variable
            raise RuntimeError(
                f"wandb could not start a run with tracking.wandb.mode={self.mode} "
                f"({' '.join(str(error).split())}). Check the connection and the WANDB_ variables "
                "of the environment, log in with `wandb login` or WANDB_API_KEY, or use "
                "tracking.wandb.mode=offline and `wandb sync` later."
            ) from error
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run


def check_mode(mode: str) -> None:
    """Reject an unknown mode.

    Raises:
        ValueError: if ``mode`` is not one of :data:`MODES`.
    """
    if mode not in MODES:
        raise ValueError(f"tracking.wandb.mode must be one of {', '.join(MODES)}, got {mode!r}")


def _import_wandb() -> Any:
    # wandb would send the tracebacks of its own errors to its makers unless told otherwise.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError as error:
        raise RuntimeError(
            "tracking.wandb needs the package wandb, which is not installed: "
            "pip install 'decoupled-descent[experiments]', or use tracking.wandb.mode=disabled"
        ) from error
    return wandb


def _known(settings: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Drop the settings that this version of wandb does not have: it would refuse to start."""
    return {key: value for key, value in settings.items() if key in kind.model_fields}
