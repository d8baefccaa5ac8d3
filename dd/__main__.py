"""``python -m dd experiment=xor``: train optimizers side by side and write a run folder."""

import logging
import math
import os
import secrets
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

try:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig

    from dd.data.reading import DataWarning
    from dd.experiments.assembly import refuse_idle_overrides
    from dd.experiments.experiment import Experiment
    from dd.experiments.interruption import exit_code, interruptible
    from dd.experiments.resume import named_folder, resumed
    from dd.experiments.sweep_callback import conclude, failures
    from dd.support.folder_lock import FolderLocked
    from dd.sweep.job import SweepJob, described, objective_of, tracked_loss
    from dd.tracking.console import print_reading, print_report
    from dd.training.launch import Processes
except ModuleNotFoundError as error:
    sys.exit(
        f"python -m dd needs the package {error.name!r}: pip install "
        "'decoupled-descent[experiments]'"
    )

INSTALLED = Path(__file__).parent / "configs"
SOURCE = Path(__file__).parents[1] / "configs"

QUIET = ["tracking.progress=false", "tracking.wandb.mode=disabled"]

# Sentences on what was not done. A job that exits would end a whole multirun.
said: list[str] = []


@hydra.main(
    version_base="1.3",
    config_path=str(INSTALLED if INSTALLED.is_dir() else SOURCE),
    config_name="config",
)
def main(config: DictConfig) -> float | None:
    """Run one configuration; in a multirun, return the tracked loss."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    overrides = list(hydra_config.overrides.task)
    if hydra_config.mode == RunMode.MULTIRUN:
        return _run_job(config, folder, overrides)
    named = any("hydra.run.dir=" in override for override in hydra_config.overrides.hydra)
    _run(lambda: _experiment(config, folder, overrides, moves_aside=not named), folder)
    return None


def _experiment(
    config: DictConfig, folder: Path, overrides: Sequence[str], *, moves_aside: bool = False
) -> Experiment:
    found = Experiment(config, folder, moves_aside=moves_aside)
    refuse_idle_overrides(found.config, overrides)
    return found


def _run_job(config: DictConfig, folder: Path, overrides: Sequence[str]) -> float:
    """Run one job of a multirun; infinity where it has no tracked loss.

    Raises:
        KeyboardInterrupt: if it is interrupted, which ends the multirun.
    """
    hydra_config = HydraConfig.get()
    searches = not hydra_config.sweeper["_target_"].endswith(".BasicSweeper")
    parallel = not hydra_config.launcher["_target_"].endswith(".BasicLauncher")
    try:
        objective = objective_of(config) if searches else None
    except ValueError as error:
        # The same in all jobs, so that the search ends here.
        sys.exit(f"error: {error}")
    number = int(hydra_config.job.num)
    job = SweepJob.of_overrides(number, overrides, os.environ.get("DD_SWEEP", ""))
    try:
        again = job.is_begun_in(folder)
    except (OSError, ValueError) as error:
        beside = folder.with_name(f"{folder.name}_job{number}")
        replace(job, failed=f"error: {error}").write(beside)
        sys.stderr.write(f"error: {error}\n")
        return math.inf
    job.write(folder)
    if parallel:
        # Bars of several processes would be drawn over one another.
        config.tracking.progress = False
    if not any(override.startswith("tracking.report=") for override in overrides):
        # One report compares all jobs.
        config.tracking.report = False
    make = _begun_again if again and (folder / "checkpoint.pt").is_file() else _experiment
    try:
        experiment = _run(lambda: make(config, folder, overrides), folder, tells=not parallel)
    except KeyboardInterrupt:
        replace(job, failed="it was interrupted").write(folder)
        raise
    except Exception as error:
        # The other jobs may not have it.
        traceback.print_exc()
        _report(f"error: {type(error).__name__}: {error}")
        experiment = None
    if experiment is None:
        replace(job, failed=said[-1]).write(folder)
        return math.inf
    if parallel:
        words = [f"{name} {described(own)}" for name, own in experiment.summary.items()]
        sys.stdout.write(f"job {job.number}, {' '.join(overrides)}: {'; '.join(words)}\n")
    if objective is None:
        return math.inf
    results = experiment.results
    # A loss that is not to be believed is no loss to minimise.
    believed = [key for key in results.fits if key not in results.doubts]
    return tracked_loss(
        experiment.history, objective, [trial for name, trial in believed if name == objective]
    )


def _begun_again(config: DictConfig, folder: Path, overrides: Sequence[str]) -> Experiment:
    """The experiment of a job that a cluster ended and runs once more, from its checkpoint."""
    free = ("progress", "report")
    kept = [f"tracking.{key}={str(config.tracking[key]).lower()}" for key in free]
    return resumed(folder, [f"resume={folder}", *kept])


def _run(make: Callable[[], Experiment], folder: Path, *, tells: bool = True) -> Experiment | None:
    """Run an experiment, or say in one sentence why it cannot be done; then return None.

    Args:
        make: builds it.
        folder: of the run.
        tells: whether its report is printed.

    Raises:
        KeyboardInterrupt: if it is interrupted, which is said, after what was found is written.
    """
    # Each run's noise model stands in its report.
    logging.getLogger("dd").setLevel(logging.WARNING)
    # The loop clears the gradients before every step, which is what this warning asks for.
    warnings.filterwarnings("ignore", message=".*create_graph=True will create a reference cycle.*")
    # What it says is in the table of what was read, and in the notes.
    warnings.filterwarnings("ignore", category=DataWarning)
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    expected = () if full_error else (OSError, RuntimeError, ValueError)
    experiment = None
    try:
        with interruptible():
            experiment = make()
            if tells:
                experiment.on_read = print_reading
            experiment.run()
    except KeyboardInterrupt as error:
        _report(_sentence(error, experiment, folder))
        raise
    except expected as error:
        _report(_sentence(error, experiment, folder))
        return None
    if not Processes().leads:
        return experiment
    if tells:
        print_report(
            experiment.summary,
            str(experiment.figure) if experiment.figure.is_file() else None,
            experiment.notes,
            noise=experiment.noise,
            report=None if experiment.report is None else str(experiment.report),
        )
    for failure in experiment.failures:
        _report(f"stopped early: {failure}")
    return experiment


def _sentence(error: BaseException, experiment: Experiment | None, folder: Path) -> str:
    folder = folder if experiment is None else experiment.folder
    begun = experiment is not None and not isinstance(error, FolderLocked)
    kept = begun and (folder / "checkpoint.pt").exists()
    remedy = f"; python -m dd resume={folder} goes on from its checkpoint" if kept else ""
    if not isinstance(error, KeyboardInterrupt):
        where = "" if kept else " (HYDRA_FULL_ERROR=1 shows where)"
        return f"error: {error}{remedy}{where}"
    by = f" by {error}" if str(error) else ""
    if not (folder / "history.csv").exists():
        return f"interrupted{by} before anything was recorded"
    return f"interrupted{by}; what was recorded is in {folder}{remedy}"


def _go_on(folder: Path, arguments: Sequence[str], into: Path | None) -> None:
    def experiment() -> Experiment:
        found = resumed(folder, arguments)
        found.folder = into or folder
        return found

    # Past Hydra, which would ask for an experiment and make an output folder for it.
    _run(experiment, folder)


def _start(arguments: Sequence[str], into: Path | None) -> None:
    if into is not None:
        sys.argv += [*QUIET, f"hydra.run.dir={into}"]
    # Jobs that run in other processes find their sweep's folder by it.
    os.environ["DD_SWEEP"] = secrets.token_hex(3)
    unfinished = named_folder(arguments)
    if unfinished is None:
        main()
    else:
        _go_on(unfinished, [*arguments, *(QUIET if into else [])], into)


def _report(sentence: str) -> None:
    said.append(sentence)
    sys.stderr.write(sentence + "\n")


def _ended(start: Callable[[], None], *, multirun: bool) -> int:
    """Run the command, and return its exit code."""
    try:
        with interruptible():
            start()
    except KeyboardInterrupt as interrupt:
        conclude()
        return exit_code(interrupt)
    # What became of the jobs of a multirun is gathered alike, wherever they ran.
    return 1 if failures or (said and not multirun) else 0


if __name__ == "__main__":
    # Help is shown for a whole configuration, and only an experiment makes it one.
    if {"-h", "--help"} & set(sys.argv) and not any(a.startswith("experiment=") for a in sys.argv):
        sys.argv.append("experiment=xor")
    given = sys.argv[1:]
    several = bool({"-m", "--multirun"} & set(given))
    if Processes().size > 1 and several:
        sys.exit("error: a multirun under torchrun is several runs in one; start one at a time")
    if Processes().leads:
        code = _ended(lambda: _start(given, None), multirun=several)
    else:
        # The other processes of a run compute what the first one does, and write nothing to keep.
        with tempfile.TemporaryDirectory() as scratch:
            code = _ended(lambda: _start(given, Path(scratch)), multirun=several)
    sys.exit(code)
