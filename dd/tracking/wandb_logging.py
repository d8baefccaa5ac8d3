"""One run of Weights & Biases."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dd.tracking.history import METRICS, Record

__all__ = ["MODES", "WandbRun", "server_address", "synced_by"]

MODES = ("online", "offline", "disabled")

# Only what the run itself logs is kept: no source code, git state, console, machine or packages.
# A server that does not answer holds a run up for seconds, not for ever.
PRIVATE_SETTINGS: dict[str, Any] = {
    "console": "off",
    "disable_code": True,
    "finish_timeout": 15.0,
    "finish_timeout_raises": True,
    "init_timeout": 10.0,
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
    """Log one run; use as a context manager.

    The run is closed as failed when the block raises. With mode "disabled" nothing happens and
    wandb is not imported. A server that stops answering ends nothing: the run is on the disk.

    Args:
        mode: "online", "offline" or "disabled".
        directory: folder of the whole run; files land in its subfolder ``wandb``.
        project: project on the server.
        name: of the run.
        job_type: what runs of several trials have in common.
        group: holds all runs of an experiment together.
        config: everything that was configured.
        run_id: of the run on the server.
        entity: user or team of the project; None is the user's default.
        tags: by which runs are found.
        resumes: whether it goes on with the run of this id. Online it is continued; offline a
            second folder of the same run is written, for ``wandb sync``.
        give_up: is called with the reason when the server is given up.
    """

    def __init__(
        self,
        *,
        mode: str,
        directory: str | os.PathLike[str],
        project: str,
        name: str,
        job_type: str,
        group: str,
        config: Mapping[str, Any],
        run_id: str,
        entity: str | None = None,
        tags: Sequence[str] = (),
        resumes: bool = False,
        give_up: Callable[[str], None] | None = None,
    ) -> None:
        """Take everything down; the run itself starts with the block."""
        self.mode = mode
        self.directory = Path(directory)
        self.config = dict(config)
        self._about: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "name": name,
            "job_type": job_type,
            "group": group,
            "tags": list(tags),
            "id": run_id,
            "resume": "allow" if resumes else None,
        }
        self._give_up = give_up or (lambda reason: None)
        self._run: Any = None

    def __enter__(self) -> "WandbRun":
        """Start the run, offline where the server does not answer.

        Raises:
            RuntimeError: if wandb is not installed, or refuses to start the run.
        """
        if self.mode != "disabled":
            self._run = self._started()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the run, as failed if the block raised."""
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            run.finish(exit_code=0 if kind is None else 1)
        except TimeoutError:
            self._give_up("the Weights & Biases server stopped answering")

    def log(self, record: Record) -> None:
        """Log the step and every metric of a record."""
        if self._run is not None:
            row = {name: getattr(record, name) for name in METRICS}
            self._run.log({"step": record.step, **row})

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Set the run's summary."""
        if self._run is not None:
            self._run.summary.update(dict(summary))

    def show(self, what: Callable[[Any], Mapping[str, Any]]) -> None:
        """Log pictures, tables or charts.

        Args:
            what: is given the package wandb, and returns what to log.
        """
        if self._run is None:
            return
        try:
            self._run.log(dict(what(_import_wandb())))
        except Exception as error:
            # Tables ask the server at once, and its answers are taken to pieces unchecked.
            reason = " ".join(str(error).split())
            self._give_up(f"the Weights & Biases server did not take the comparison ({reason})")

    def _started(self) -> Any:
        wandb = _import_wandb()
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            run = self._init(wandb, self.mode)
        except wandb.errors.CommError as error:
            if self.mode != "online" or _is_refusal(error):
                raise _not_started(self.mode, error) from error
            self._give_up("the Weights & Biases server does not answer")
            # wandb does not let go of the id that it has tried.
            self._about["id"] += "-offline"
            run = self._init(wandb, "offline")
        except (ValueError, wandb.Error) as error:  # ValueError: a bad WANDB_ variable
            raise _not_started(self.mode, error) from error
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _init(self, wandb: Any, mode: str) -> Any:
        return wandb.init(
            **self._about,
            mode=mode,
            dir=str(self.directory),
            config=self.config,
            reinit="create_new",
            settings=wandb.Settings(**_known(PRIVATE_SETTINGS, wandb.Settings)),
        )


def server_address() -> str:
    """Return the address that runs would be sent to.

    Raises:
        RuntimeError: if wandb is not installed.
    """
    return str(_import_wandb().setup().settings.base_url)


def synced_by(folder: str | os.PathLike[str]) -> str:
    """Return the command that sends the runs of a run folder to the server."""
    return f"`cd {folder} && wandb sync --include-online`"


def _is_refusal(error: Exception) -> bool:
    """Whether the server answered, and said no."""
    return any(
        word in str(error).lower() for word in ("permission", "401", "403", "404", "api key")
    )


def _not_started(mode: str, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"wandb could not start a run with tracking.wandb.mode={mode} "
        f"({' '.join(str(error).split())}). Check the connection and the WANDB_ variables "
        "of the environment, log in with `wandb login` or WANDB_API_KEY, or use "
        "tracking.wandb.mode=offline and `wandb sync` later."
    )


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
