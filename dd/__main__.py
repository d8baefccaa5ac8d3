"""``python -m dd experiment=xor``: train optimizers side by side and write a run folder."""

import logging
import math
import os
import secrets
import sys
import tempfile
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
    from dd.experiments.resume import named_folder, resumed
    from dd.experiments.sweep_callback import failures
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

# Sentences on jobs that could not be done. A job that exits would end a whole multirun.
failed: list[str] = []


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
    """Run one job of a multirun; infinity where it has no tracked loss."""
    hydra_config = HydraConfig.get()
    searches = not hydra_config.sweeper["_target_"].endswith(".BasicSweeper")
    parallel = not hydra_config.launcher["_target_"].endswith(".BasicLauncher")
    try:
        objective = objective_of(config) if searches else None
    except ValueError as error:
        # The same in all jobs, so that the search ends here.
        sys.exit(f"error: {error}")
    job = SweepJob.of_overrides(int(hydra_config.job.num), overrides)
    job.write(folder)
    if parallel:
        # Bars of several processes would be drawn over one another.
        config.tracking.progress = False
    if not any(override.startswith("tracking.report=") for override in overrides):
        # One report compares all jobs.
        config.tracking.report = False
    experiment = _run(lambda: _experiment(config, folder, overrides), folder, tells=not parallel)
    if experiment is None:
        replace(job, failed=failed[-1]).write(folder)
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


def _run(make: Callable[[], Experiment], folder: Path, *, tells: bool = True) -> Experiment | None:
    """Run an experiment, or say in one sentence why it cannot be done; then return None.

    Args:
        make: builds it.
        folder: of the run.
        tells: whether its report is printed.
    """
    # Each run's noise model stands in its report.
    logging.getLogger("dd").setLevel(logging.WARNING)
    # The loop clears the gradients before every step, which is what this warning asks for.
    warnings.filterwarnings("ignore", message=".*create_graph=True will create a reference cycle.*")
    # What it says is in the table of what was read, and in the notes.
    warnings.filterwarnings("ignore", category=DataWarning)
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    expected = () if full_error else (OSError, RuntimeError, ValueError, KeyboardInterrupt)
    try:
        experiment = make()
        if tells:
            experiment.on_read = print_reading
        experiment.run()
    except expected as error:
        _report(_sentence(error, folder))
        return None
    if not Processes().leads:
        return experiment
    if tells:
        print_report(
            experiment.summary,
            str(experiment.figure),
            experiment.notes,
            noise=experiment.noise,
            report=None if experiment.report is None else str(experiment.report),
        )
    for failure in experiment.failures:
        _report(f"stopped early: {failure}")
    return experiment


def _sentence(error: BaseException, folder: Path) -> str:
    if isinstance(error, KeyboardInterrupt):
        kept = (folder / "checkpoint.pt").exists()
        remedy = f"; python -m dd resume={folder} goes on from its checkpoint" if kept else ""
        return f"interrupted; what was recorded is in {folder}{remedy}"
    return f"error: {error} (HYDRA_FULL_ERROR=1 shows where)"


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
    failed.append(sentence)
    sys.stderr.write(sentence + "\n")


if __name__ == "__main__":
    # Help is shown for a whole configuration, and only an experiment makes it one.
    if {"-h", "--help"} & set(sys.argv) and not any(a.startswith("experiment=") for a in sys.argv):
        sys.argv.append("experiment=xor")
    given = sys.argv[1:]
    if Processes().size > 1 and {"-m", "--multirun"} & set(given):
        sys.exit("error: a multirun under torchrun is several runs in one; start one at a time")
    if Processes().leads:
        _start(given, None)
    else:
        # The other processes of a run compute what the first one does, and write nothing to keep.
        with tempfile.TemporaryDirectory() as scratch:
            _start(given, Path(scratch))
    sys.exit(1 if failed or failures else 0)
