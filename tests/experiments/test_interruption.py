"""Whatever ends a run leaves what it has found: signals, backends, pictures, half a folder."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dd.experiments.experiment import Experiment
from dd.experiments.interruption import Interruption, exit_code, interruptible
from dd.report import page
from dd.runs.folder import read_run
from dd.tracking import figures
from dd.tracking.any_backend import any_backend
from tests.run_folders import write_run
from tests.sweep.test_sweeps import SMALL, configure

REPOSITORY = Path(__file__).parents[2]
LONG = [*SMALL, "optimizers=[gd]", "steps=100000", "tracking.checkpoint_every=10"]


def start(folder, *arguments, **environment):
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-W", "ignore", "-m", "dd", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell has its background jobs ignore the keyboard's signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def end_after_a_checkpoint(process, folder, number):
    deadline = time.monotonic() + 300
    while not (folder / "summary.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    return process.communicate(timeout=300)


# --- Signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_its_results(tmp_path, number):
    run = tmp_path / "run"
    with start(tmp_path, *LONG, f"hydra.run.dir={run}") as process:
        _, error = end_after_a_checkpoint(process, run, number)
    assert process.returncode == 128 + number, error
    assert "interrupted" in error
    assert f"resume={run} goes on" in error
    assert "Traceback" not in error
    found = read_run(run)
    assert found.provenance["finished"] is False
    assert found.optimizers["gd"]["steps"] == found.history.records[-1].step
    assert (run / "train_vs_test.png").exists()


def test_a_signal_ends_a_multirun_after_its_present_job(tmp_path):
    sweep = tmp_path / "sweep"
    with start(tmp_path, "-m", *LONG, "lr=0.1,0.2", f"hydra.sweep.dir={sweep}") as process:
        out, error = end_after_a_checkpoint(process, sweep / "0_0", signal.SIGTERM)
    assert process.returncode == 143, error
    assert [path.parent.name for path in sweep.glob("*/job.json")] == ["0_0"]
    with (sweep / "sweep.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["optimizer"], row["failed"]) == ("gd", "it was interrupted")
    assert "failed: job 0: it was interrupted" in " ".join(out.split())


def test_a_killed_run_has_its_table_and_summary(tmp_path):
    run = tmp_path / "run"
    with start(tmp_path, *LONG, f"hydra.run.dir={run}") as process:
        end_after_a_checkpoint(process, run, signal.SIGKILL)
    assert json.loads((run / "summary.json").read_text())["gd"]["steps"] >= 0
    assert (run / "history.csv").exists()


def test_signals_that_somebody_handles_are_left_alone(monkeypatch):
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
            with pytest.raises(Interruption, match="SIGTERM") as caught:
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert exit_code(caught.value) == 143
    assert exit_code(KeyboardInterrupt()) == 130


# --- Pictures --------------------------------------------------------------------------------


def ran_without(monkeypatch, folder, owner, name, reason):
    """A run in which a function of a module fails, and its summary."""

    def broken(*arguments):
        raise ValueError(reason)

    monkeypatch.setattr(owner, name, broken)
    experiment = Experiment(configure("optimizers=[gd]"), folder)
    experiment.run()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"]
    return experiment, summary


def test_a_picture_that_cannot_be_drawn_costs_nothing_else(tmp_path, monkeypatch):
    failing = figures, "train_vs_test", "no such font"
    experiment, summary = ran_without(monkeypatch, tmp_path, *failing)
    assert "train_vs_test.png could not be drawn: no such font" in summary["notes"]
    assert (tmp_path / "report.html").exists()
    assert not experiment.figure.exists()


def test_a_report_that_cannot_be_written_is_noted_beside_what_was_found(tmp_path, monkeypatch):
    failing = page, "write_report", "no such template"
    experiment, summary = ran_without(monkeypatch, tmp_path, *failing)
    assert "report.html could not be written: no such template" in summary["notes"]
    assert summary["notes"] == experiment.notes


@pytest.mark.parametrize("module", ["dd.tracking.figures", "dd.sweep.figure", "dd.report.charts"])
def test_the_backend_of_the_environment_is_not_needed(module):
    program = (
        f"import {module}, os, matplotlib\n"
        "print(os.environ['MPLBACKEND'], matplotlib.rcParams['backend'])\n"
    )
    for backend, then in (("module://nobody.knows", None), ("pdf", "pdf")):
        found = subprocess.run(  # noqa: S603
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "MPLBACKEND": backend},
            capture_output=True,
            text=True,
        )
        assert found.returncode == 0, found.stderr
        kept, drawn_by = found.stdout.split()
        assert kept == backend
        assert then in {None, drawn_by.lower()}


def test_a_matplotlib_that_is_there_is_left_alone(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://nobody.knows")
    with any_backend():
        assert os.environ["MPLBACKEND"] == "module://nobody.knows"


# --- Folders half written --------------------------------------------------------------------


def test_a_summary_of_an_earlier_state_is_told(tmp_path):
    write_run(tmp_path)
    history = (tmp_path / "history.csv").read_text().splitlines(keepends=True)
    longer = history[4].replace(",15,", ",20,", 1)
    (tmp_path / "history.csv").write_text("".join([*history[:5], longer, *history[5:]]))
    with pytest.raises(ValueError, match=r"to step 20 of gd, trial 1, and .* to step 15"):
        read_run(tmp_path)


def test_a_full_disk_leaves_what_can_be_written(tmp_path, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dd.tracking.history.History.write_csv", full)
    with pytest.raises(OSError, match="No space left"):
        Experiment(configure("optimizers=[gd]"), tmp_path).run()
    assert (tmp_path / "checkpoint.pt").exists()
    assert not list(tmp_path.glob(".*"))
