"""Multiruns: launchers, the search for the lowest tracked loss, folders, table and picture."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import hydra
import matplotlib.image
import pytest
from omegaconf import OmegaConf

from dd.experiments import sweep_callback
from dd.experiments.experiment import Experiment
from dd.experiments.sweep_study import bind_study
from dd.support.folder_lock import FolderLocked
from dd.sweep.job import SweepJob, objective_of, read_job, tracked_loss
from dd.sweep.show import show
from dd.sweep.table import FIGURES, gather, swept
from dd.tracking.history import History, Record
from tests.composed import composed

REPOSITORY = Path(__file__).parents[2]
SMALL = [
    "experiment=xor",
    "data.num_train=60",
    "data.num_test=40",
    "data.dimension=15",
    "steps=4",
    "tracking.progress=false",
    "tracking.wandb.mode=disabled",
]


def configure(*overrides, hydra=False):
    return composed(*SMALL, *overrides, hydra=hydra)


def command(folder, *overrides):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(  # noqa: S603
        [sys.executable, "-W", "ignore", "-m", "dd", "-m", *SMALL, *overrides],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def rows_of(folder):
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def only_sweep(folder):
    (found,) = (folder / "outputs" / "xor").iterdir()
    return found


def lowest_loss(folder, name):
    with (folder / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    own = [r for r in rows if r["optimizer"] == name and int(r["step"]) > 0]
    return min(float(row["train_loss"]) for row in own)


# --- Commands --------------------------------------------------------------------------------


def test_multirun_is_gathered_and_a_job_that_fails_is_named(tmp_path):
    found = command(tmp_path, "optimizers=[gd,dd]", "lr=0.1,-1,0.5")
    assert found.returncode == 1
    sweep = only_sweep(tmp_path)
    rows = rows_of(sweep)
    assert [(row["job"], row["lr"], row["optimizer"]) for row in rows] == [
        ("0", "0.1", "gd"),
        ("0", "0.1", "dd"),
        ("1", "-1", ""),
        ("2", "0.5", "gd"),
        ("2", "0.5", "dd"),
    ]
    assert "lr of optimizer" in rows[2]["failed"]
    assert "lr of optimizer gd must be" in found.stderr
    assert "Traceback" not in found.stderr
    assert "failed: job 1: error: lr of optimizer" in " ".join(found.stdout.split())
    summary = json.loads((sweep / "2_0" / "summary.json").read_text())
    assert float(rows[4]["reported_error"]) == summary["dd"]["reported_error"]
    assert (sweep / "sweep.png").stat().st_size > 0
    # One report of all jobs instead of one of each.
    assert [path.parent for path in sweep.rglob("report.html")] == [sweep]
    said = (sweep / "report.html").read_text(encoding="utf-8")
    assert "lr=0.1, train" in said
    assert "job 1: error: lr of optimizer" in said
    assert f"report: {sweep / 'report.html'}".replace(str(tmp_path) + "/", "") in found.stdout


def test_a_folder_that_holds_a_multirun_is_refused_before_a_job_begins(tmp_path):
    arguments = ("optimizers=[gd]", "tracking.report=false", "hydra.sweep.dir=sweep")
    assert command(tmp_path, *arguments, "lr=0.1").returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "sweep").rglob("*") if path.is_file()}
    again = command(tmp_path, *arguments, "lr=0.2,0.3")
    assert again.returncode == 1
    assert "sweep holds the 1 jobs of another multirun (job 0: experiment=xor" in again.stderr
    assert "hydra.sweep.dir=" in again.stderr
    after = {path: path.read_bytes() for path in (tmp_path / "sweep").rglob("*") if path.is_file()}
    assert after == before


def test_jobs_that_would_share_a_folder_are_refused(tmp_path):
    found = command(
        tmp_path, "optimizers=[gd]", "lr=0.1,0.2", "hydra.sweep.subdir=all", "tracking.report=false"
    )
    assert found.returncode == 1
    rows = rows_of(only_sweep(tmp_path))
    assert [(row["lr"], row["optimizer"]) for row in rows] == [("0.1", "gd"), ("0.2", "")]
    assert "holds job 0 of this multirun" in rows[1]["failed"]


def test_a_job_that_a_cluster_runs_once_more_is_known(tmp_path):
    job = SweepJob.of_overrides(1, ["lr=0.1"], "ab12")
    assert not job.is_begun_in(tmp_path)
    SweepJob(1, {"lr": "0.1"}, "interrupted", "ab12").write(tmp_path)
    assert job.is_begun_in(tmp_path)
    for other in (
        SweepJob(2, {"lr": "0.1"}, sweep="ab12"),
        SweepJob(1, {"lr": "0.2"}, sweep="ab12"),
        SweepJob(1, {"lr": "0.1"}, sweep="cd34"),
    ):
        with pytest.raises(FolderLocked, match="need folders of their own"):
            other.is_begun_in(tmp_path)


def test_jobs_of_several_multiruns_are_not_gathered(tmp_path):
    for name in ("a", "b"):
        SweepJob(0, {"lr": "1"}).write(tmp_path / name)
    with pytest.raises(ValueError, match="are both job 0: these are jobs of several multiruns"):
        gather(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_search_in_which_a_trial_diverges_has_found_its_answer(tmp_path, launcher):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    search = ("hydra/sweeper=tracked", "hydra.sweeper.n_trials=4", "optimizers=[dd]")
    found = command(
        tmp_path, *search, f"hydra/launcher={launcher}", "optimizer.lr=choice(0.2,1e30)"
    )
    assert found.returncode == 0, found.stderr
    assert any("the training loss is" in row["failed"] for row in rows_of(only_sweep(tmp_path)))
    lost = command(
        tmp_path, *search, f"hydra/launcher={launcher}", "optimizer.lr=choice(1e30,1e31)"
    )
    assert lost.returncode == 1
    assert "no job of the search came to its end" in lost.stderr


def search(storage, monkeypatch, *overrides):
    """The configuration of a search whose study lives in this storage."""
    monkeypatch.setattr(hydra.utils, "instantiate", lambda _: storage)
    config = configure("hydra/sweeper=tracked", *overrides, hydra=True)
    OmegaConf.set_struct(config, False)
    config.hydra.sweeper.storage = {"_target_": "a.storage"}
    return config


def test_a_stored_study_is_bound_to_its_settings_and_data(tmp_path, monkeypatch):
    """Wherever they stand: on the command line, which nothing here tells apart, or in a file."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    optuna = pytest.importorskip("optuna")
    storage = optuna.storages.InMemoryStorage()
    data = tmp_path / "f.csv"
    data.write_text("1,2")
    monkeypatch.setenv("HOME", str(tmp_path))
    follows = "+data.progress=${tracking.progress}"
    first = ("lr=0.1", "tracking.progress=false", follows, "+data.path='~/f.csv'")
    bind_study(search(storage, monkeypatch, *first))
    study = optuna.load_study(study_name="tracked", storage=storage)
    study.tell(study.ask(), 0.5)
    idle = ("tracking.record_every=1", "tracking.progress=true")
    bind_study(search(storage, monkeypatch, *first, *idle))
    with pytest.raises(ValueError, match=r"settings: data\.noise was 1\.0 and is 2\.0\. Its best"):
        bind_study(search(storage, monkeypatch, *first, "data.noise=2.0"))
    with pytest.raises(ValueError, match=r"1 trials of other settings: lr was 0\.1 and is 0\.2"):
        bind_study(search(storage, monkeypatch, "lr=0.2", *first[1:]))
    data.write_text("1,3")
    with pytest.raises(ValueError, match=r"data\.path was .*digest .* and is .*digest"):
        bind_study(search(storage, monkeypatch, *first))


def test_a_study_of_unknown_settings_is_refused(monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    optuna = pytest.importorskip("optuna")
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(study_name="tracked", storage=storage)
    study.tell(study.ask(), 0.5)
    with pytest.raises(ValueError, match=r"1 trials of unknown settings.*study_name="):
        bind_study(search(storage, monkeypatch, "lr=0.1"))


def test_a_study_that_cannot_be_read_ends_the_search_with_a_reason(tmp_path, monkeypatch):
    def broken(config):
        raise AssertionError

    monkeypatch.setattr(sweep_callback, "bind_study", broken)
    config = configure(f"hydra.sweep.dir={tmp_path}", hydra=True)
    with pytest.raises(SystemExit, match=r"error: AssertionError\(\)"):
        sweep_callback.Gather().on_multirun_start(config)


@pytest.mark.slow
def test_jobs_of_other_processes_are_gathered_and_their_failures_counted(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    found = command(
        tmp_path,
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "lr=0.1,-1",
        "tracking.report=false",
    )
    assert found.returncode == 1
    assert not list(tmp_path.rglob("report.html"))
    rows = rows_of(only_sweep(tmp_path))
    assert [row["optimizer"] for row in rows] == ["gd", "dd", "dd_auto", ""]
    assert "lr of optimizer" in rows[3]["failed"]
    # One line a job instead of the reports of several processes at once.
    assert "job 0, experiment=xor" in found.stdout
    assert "dd reports" in found.stdout
    assert "picture: " in found.stdout
    assert "best test error" not in found.stdout


@pytest.mark.slow
def test_search_minimises_the_tracked_loss(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    found = command(
        tmp_path,
        "hydra/sweeper=tracked",
        "hydra.sweeper.n_trials=4",
        "optimizers=[gd,dd]",
    )
    assert found.returncode == 0, found.stderr
    sweep = only_sweep(tmp_path)
    best = OmegaConf.load(sweep / "optimization_results.yaml")
    losses = [lowest_loss(path.parent, "dd") for path in sweep.glob("*/history.csv")]
    assert len(losses) == 4
    assert best.best_value == pytest.approx(min(losses), rel=1e-12)
    assert set(best.best_params) == {"optimizer.lr", "optimizer.weight_decay"}


def test_search_without_a_tracked_loss_ends_at_once(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    found = command(tmp_path, "hydra/sweeper=tracked", "optimizers=[gd]")
    assert found.returncode == 1
    assert "there is no tracked loss to minimise: gd is plain" in found.stderr
    assert "Traceback" not in found.stderr
    assert not list(tmp_path.glob("outputs/xor/*/*/history.csv"))


@pytest.mark.slow
def test_jobs_of_submitit_are_gathered(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    found = command(tmp_path, "hydra/launcher=submitit_local", "optimizers=[dd]", "seed=0,1")
    assert found.returncode == 0, found.stderr
    assert [row["seed"] for row in rows_of(only_sweep(tmp_path))] == ["0", "1"]


def test_slurm_preset_is_what_sbatch_is_given():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    slurm = pytest.importorskip("submitit.slurm.slurm")
    config = configure("hydra/launcher=slurm", "hydra.launcher.partition=long", hydra=True)
    launcher = config.hydra.launcher
    assert launcher["_target_"].endswith("SlurmLauncher")
    script = slurm._make_sbatch_string(
        command="python",
        folder="logs",
        partition=launcher.partition,
        time=launcher.timeout_min,
        cpus_per_task=launcher.cpus_per_task,
        mem=f"{launcher.mem_gb}GB",
        map_count=100,
        array_parallelism=launcher.array_parallelism,
    )
    for line in ("--partition=long", "--time=120", "--cpus-per-task=4", "--mem=16GB", "%64"):
        assert line in script


# --- Folders ---------------------------------------------------------------------------------


def test_runs_begun_at_once_have_folders_of_their_own(tmp_path):
    arguments = [sys.executable, "-W", "ignore", "-m", "dd", *SMALL, "optimizers=[gd]"]
    # The same second, by a date that does not move.
    arguments += ["hydra.run.dir=outputs/xor/now"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(  # noqa: S603
            arguments,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in running]
    # A folder that was asked for by name is never left for another.
    assert sorted(process.returncode for process in running) == [0, 1]
    (error,) = [text for text in errors if text]
    assert "holds another run" in error or "still going on" in error


def test_a_folder_that_is_taken_is_left_for_the_next(tmp_path):
    config = configure("optimizers=[gd]")
    folders = []
    for _ in range(3):
        experiment = Experiment(config, tmp_path / "run_0", moves_aside=True)
        experiment.run()
        folders.append(experiment.folder.name)
    assert folders == ["run_0", "run_0_2", "run_0_3"]
    assert all((tmp_path / name / "summary.json").is_file() for name in folders)
    with pytest.raises(FolderLocked, match="holds another run"):
        Experiment(config, tmp_path / "run_0").run()


def test_folders_of_two_sweeps_differ(monkeypatch):
    folders = []
    for token in ("ab12cd", "ef34ab"):
        monkeypatch.setenv("DD_SWEEP", token)
        folders.append(configure(hydra=True).hydra.sweep.dir)
    assert [folder[-13:] for folder in folders] == ["_sweep_ab12cd", "_sweep_ef34ab"]


# --- What is minimised -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optimizers=[gd,dd,dd_auto]"], "dd"),
        (["optimizers=[gd,dd,dd_auto]", "objective=dd_auto"], "dd_auto"),
        (["optimizers=auto"], "dd"),
    ],
)
def test_objective_is_of_a_decoupled_optimizer(overrides, expected):
    assert objective_of(configure(*overrides)) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizers=[gd,sgd]"], r"gd, sgd is plain"),
        (["optimizers=[gd,dd]", "objective=gd"], r"gd is plain, and its training loss falls"),
        (["optimizers=[dd]", "objective=dd_auto"], r"objective=dd_auto is not trained"),
    ],
)
def test_objective_that_tracks_nothing_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        objective_of(configure(*overrides))


def test_tracked_loss_is_the_lowest_after_the_start_and_infinite_where_a_trial_failed():
    losses = {0: (0.1, 0.6, 0.4, 0.5), 1: (0.7, 0.2, 0.3, 0.9)}
    history = History(
        [
            Record("dd", trial, step, loss, 0.0, 0.0, 0.0, 0.0, 0.0)
            for trial, own in losses.items()
            for step, loss in enumerate(own)
        ]
    )
    assert tracked_loss(history, "dd", [0, 1]) == pytest.approx((0.4 + 0.2) / 2)
    assert tracked_loss(history, "dd", [0]) == math.inf
    assert tracked_loss(history, "dd_auto", []) == math.inf


# --- Table and picture -----------------------------------------------------------------------


def finished(folder, number, overrides, figures, failures=()):
    """A job's folder with what a run leaves there."""
    job = folder / f"{number}_0"
    SweepJob(number, overrides).write(job)
    summary = {"experiment": "xor", "finished": True, "failures": list(failures)}
    for name, (test, reported) in figures.items():
        own = dict.fromkeys(FIGURES.values(), 1.0)
        gap = None if test is None else abs(test - reported)
        own |= {"reported_test_error": test, "reported_error": reported, "reported_gap": gap}
        summary[name] = own
    (job / "summary.json").write_text(json.dumps(summary))
    (job / "config.yaml").write_text("name: xor\n")
    history = History([Record(name, 0, 0, 1.0, 1.0, 0.5, 0.5, 1.0, 0.5) for name in figures])
    history.write_csv(job / "history.csv")


@pytest.mark.parametrize(
    "overrides",
    [
        [{"lr": "0.1", "seed": "0"}, {"lr": "0.1", "seed": "1"}, {"lr": "10", "seed": "0"}],
        [{"seed": "0"}, {"seed": "1"}, {"seed": "2"}],
        [{"model.activation": "relu"}, {"model.activation": "gelu"}, {"model.activation": "tanh"}],
        [{"lr": "0.1", "steps": "5"}, {"lr": "0.2", "steps": "5"}, {"lr": "0.1", "steps": "9"}],
    ],
    ids=["number", "seeds", "names", "two numbers"],
)
def test_every_kind_of_sweep_is_drawn(tmp_path, overrides):
    for number, own in enumerate(overrides):
        finished(tmp_path, number, own, {"gd": (0.3, 0.0), "dd": (0.25, 0.2 + 0.01 * number)})
    show(gather(tmp_path))
    assert matplotlib.image.imread(tmp_path / "sweep.png").shape[1] > 500
    assert len(rows_of(tmp_path)) == 6


def test_jobs_without_test_samples_or_results_are_rows(tmp_path):
    finished(tmp_path, 0, {"lr": "1"}, {"dd": (None, 0.2)})
    finished(tmp_path, 1, {"lr": "2"}, {"dd": (None, 0.3)}, ["dd: the training loss is nan"])
    SweepJob(10, {"lr": "3"}).write(tmp_path / "10_0")
    SweepJob(2, {"lr": "4"}, "error: no").write(tmp_path / "2_0")
    sweep = gather(tmp_path)
    show(sweep)
    assert [row.job.number for row in sweep.rows] == [0, 1, 2, 10]
    assert sweep.failures[0] == "job 1: dd: the training loss is nan"
    assert sweep.failures[1] == "job 2: error: no"
    assert "it is not through" in sweep.failures[2]
    rows = rows_of(tmp_path)
    assert (rows[0]["test_error"], rows[0]["reported_error"]) == ("nan", "0.2")


def test_settings_that_differ_are_the_columns():
    jobs = [
        SweepJob.of_overrides(0, ["experiment=xor", "+a=1", "lr=0.1"]),
        SweepJob.of_overrides(1, ["experiment=xor", "lr=0.1"]),
        SweepJob.of_overrides(2, ["experiment=xor", "+a=1", "lr=0.2"]),
    ]
    assert swept(jobs) == ["a", "lr"]


def test_a_folder_without_jobs_and_a_damaged_job_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no jobs"):
        gather(tmp_path)
    SweepJob(0, {}).write(tmp_path / "0_0")
    assert read_job(tmp_path / "0_0") == SweepJob(0, {})
    (tmp_path / "0_0" / "job.json").write_text("{")
    with pytest.raises(ValueError, match=r"job\.json is damaged"):
        gather(tmp_path)
