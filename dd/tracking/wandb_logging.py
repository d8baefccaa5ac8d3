"""One run of Weights & Biases."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
    wandb is not imported. Neither a server that stops answering nor the end of wandb's own process
    ends anything: the run is on the disk, and where rows were lost it is logged anew.

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
        resumes: whether it goes on with the run of this id, of which all rows are logged once more:
            online those that are there stay; offline a second folder is written with all of them,
            since ``wandb sync`` replaces what an earlier folder of the run has sent.
        is_first: of the runs of an experiment; nothing is lost yet if it cannot be started.
        give_up: is called with the reason, and the mode that is left, when the server or wandb
            itself is given up.
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
        is_first: bool = True,
        give_up: Callable[[str, str], None] | None = None,
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
        self._is_first = is_first
        self._give_up = give_up or (lambda reason, mode: None)
        self._run: Any = None
        self._rows: list[dict[str, float]] = []
        self._summary: dict[str, Any] = {}
        self._began_again = False

    def __enter__(self) -> "WandbRun":
        """Start the run, offline where the server does not answer.

        Raises:
            RuntimeError: if wandb is not installed, or refuses to start the first run.
        """
        if self.mode == "disabled":
            return self
        try:
            self._run = self._started()
        except Exception as error:
            if self._is_first:
                raise
            self._begin_again(error)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the run, as failed if the block raised."""
        self._finish(0 if kind is None else 1)
        self._run = None

    def _finish(self, exit_code: int) -> None:
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            self._give_up("the Weights & Biases server stopped answering", "offline")
        except Exception as error:
            # What its process had not yet written is gone with it.
            self._begin_again(error)
            self._finish(exit_code)

    def log(self, record: Record) -> None:
        """Log the step and every metric of a record; the rows of a run count from 0."""
        row = {name: getattr(record, name) for name in METRICS}
        self._rows.append({"step": record.step, **row})
        if self._run is not None:
            self._do(lambda run: run.log(self._rows[-1], step=len(self._rows) - 1))

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Set the run's summary."""
        self._summary |= summary
        if self._run is not None:
            self._do(lambda run: run.summary.update(dict(summary)))

    def _do(self, what: Callable[[Any], object]) -> None:
        try:
            what(self._run)
        except Exception as error:
            self._begin_again(error)

    def _begin_again(self, error: Exception) -> None:
        """Log all of the run anew, offline, where wandb's own process is gone; once, then never."""
        self._run = None
        reason = " ".join(str(error).split()) or type(error).__name__
        if self._began_again:
            self._give_up(f"Weights & Biases failed again ({reason})", "disabled")
            return
        self._began_again = True
        wandb = _import_wandb()
        # Without it wandb would go on asking the process that is gone, which this may say.
        with suppress(Exception):
            wandb.teardown()
        self._give_up(f"Weights & Biases failed ({reason})", "offline")
        try:
            run = self._init(wandb, "offline")
            for number, row in enumerate(self._rows):
                run.log(row, step=number)
            run.summary.update(self._summary)
        except Exception as another:
            self._begin_again(another)
        else:
            self._run = run

    def show(self, what: Callable[[Any], Mapping[str, Any]]) -> None:
        """Log pictures, tables or charts.

        Args:
            what: is given the package wandb, and returns what to log.
        """
        if self._run is None:
            return
        try:
            self._run.log(dict(what(_import_wandb())))
        except ConnectionError as error:
            self._begin_again(error)
            self.show(what)
        except Exception as error:
            # Tables ask the server at once, and its answers are taken to pieces unchecked.
            reason = " ".join(str(error).split())
            self._give_up(
                f"the Weights & Biases server did not take the comparison ({reason})", "offline"
            )

    def _started(self) -> Any:
        wandb = _import_wandb()
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            run = self._init(wandb, self.mode)
        except wandb.errors.CommError as error:
            if self.mode != "online" or _is_refusal(error):
                raise _not_started(self.mode, error) from error
            self._give_up("the Weights & Biases server does not answer", "offline")
            # wandb does not let go of the id that it has tried.
            self._about["id"] += "-offline"
            run = self._init(wandb, "offline")
        except (OSError, ValueError, wandb.Error) as error:  # ValueError: a bad WANDB_ variable
            raise _not_started(self.mode, error) from error
        return run

    def _init(self, wandb: Any, mode: str) -> Any:
        settings = {
            key: value
            for key, value in PRIVATE_SETTINGS.items()
            # What the user's environment says is the user's word.
            if not any(name in os.environ for name in _variables(key))
        }
        run = wandb.init(
            **self._about,
            mode=mode,
            dir=str(self.directory),
            config=self.config,
            reinit="create_new",
            settings=wandb.Settings(**_known(settings, wandb.Settings)),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run


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


def _variables(setting: str) -> list[str]:
    """The environment variables by which wandb takes a setting."""
    private = [f"WANDB__{setting[2:].upper()}"] if setting.startswith("x_") else []
    return [f"WANDB_{setting.upper()}", *private]


def _known(settings: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Drop the settings that this version of wandb does not have: it would refuse to start."""
    return {key: value for key, value in settings.items() if key in kind.model_fields}
