"""Interrupted runs go on as if nothing had happened, and say why where they cannot."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf

import dd
import dd.__main__ as command
from dd.experiments.assembly import settled
from dd.experiments.checkpoint import Checkpoint
from dd.experiments.experiment import Experiment
from dd.experiments.resume import named_folder, resumed
from dd.support.folder_lock import FolderLocked
from dd.tracking import figures
from dd.training import loop as training
from tests.composed import QUICK, composed

REPOSITORY = Path(__file__).parents[2]
SMALL = ["optimizers=[gd,dd]", *QUICK]
# What two runs of one configuration do not share: times, and the token that is each run's own.
OWN = {"seconds", "steps_per_second", "fit_seconds", "fits", "setup", "token"}


def configure(*overrides: str):
    return composed("experiment=xor", *SMALL, *overrides)


def go_on(folder: Path, *arguments: str) -> Experiment:
    experiment = resumed(folder, [f"resume={folder}", *arguments])
    experiment.run()
    return experiment


def run_with_snapshots(folder: Path, updates: set[int], *overrides: str) -> Experiment:
    """Run, and copy the folder right before some updates, counted over all optimizers."""
    update, count = training._update, 0

    def watched(*arguments: Any) -> int:
        nonlocal count
        if count in updates:
            shutil.copytree(folder, folder.with_name(f"at_{count}"))
        count += 1
        return update(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_update", watched)
        experiment = Experiment(configure(*overrides), folder)
        experiment.run()
    return experiment


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_own(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: without_own(v) for key, v in content.items() if key not in OWN}
    if isinstance(content, (list, tuple)):
        return [without_own(value) for value in content]
    return content


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def assert_same_run(one: Path, other: Path) -> None:
    assert (one / "history.csv").read_bytes() == (other / "history.csv").read_bytes()
    kept = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (one, other)]
    assert equal(without_own(kept[0]), without_own(kept[1]))
    said = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    assert without_own(said[0]) == without_own(said[1])
    assert said[1]["finished"] is True
    assert (one / "config.yaml").read_bytes() == (other / "config.yaml").read_bytes()
    left = {path.name for path in other.iterdir()}
    assert left == {path.name for path in one.iterdir()}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing takes longer than these runs."""
    monkeypatch.setattr(figures, "train_vs_test", lambda history, path, *rest: path.touch())


# --- Equal to the uninterrupted run ----------------------------------------------------------

FOLLOWED = ("dd_adamw", "dd_muon", "dd_schedulefree")

# Updates 0 to 21 are gd's, 22 to 43 dd's, and so on in the second trial.
RUNS = {
    "full batch": ({6, 22, 30, 43}, []),
    "momentum": ({17, 33}, ["optimizer.momentum=0.8", "available.gd.momentum=0.8"]),
    "mini-batches": (
        {10, 35},
        ["data.batch_size=32", "optimizer.momentum=0.8", "optimizer.weight_decay=0.01"],
    ),
    "mini-batches, known components": ({39}, ["data.batch_size=50", "components=known"]),
    "trials": ({47, 70}, ["trials=2", "data.batch_size=50"]),
    "head": ({36}, ["correct_head=true", "components=known", "noise_bins=3"]),
    "steps of their own choice": (
        {30, 50, 65},
        ["optimizers=[gd,dd,dd_auto]", "available.dd_auto.stop=null"],
    ),
    "the same with the head": (
        {7, 21},
        [
            *("optimizers=[dd_auto]", "available.dd_auto.stop=null"),
            *("correct_head=true", "components=known", "noise_bins=3"),
        ],
    ),
    "followed by dd.decouple": (
        {10, 30, 57, 65, 85, 101},
        ["optimizers=[dd_adamw,dd_muon,dd_schedulefree,schedulefree,muon]", "components=known"],
    ),
    "followed, full batch": (
        {15, 36, 60},
        [
            *("optimizers=[dd_adamw,dd_muon,dd_schedulefree]", "components=known"),
            *(f"available.{name}.batch_size=null" for name in FOLLOWED),
        ],
    ),
    # 22 updates of gd; 44 of gd_holdout; 44 of gd_kfold and its last fit; 22 of dd_tracked; dd.
    "candidates": (
        {30, 60, 70, 120, 150},
        [
            "optimizers=[gd,gd_holdout,gd_kfold,dd_tracked,dd]",
            "available.gd_holdout.selection.lr_factors=[0.5,1]",
            "available.gd_holdout.selection.weight_decays=[0]",
            "available.gd_kfold.selection={by:kfold,folds:2,lr_factors:[1],weight_decays:[0]}",
            "available.dd_tracked.selection={by:tracked,folds:2,lr_factors:[1],weight_decays:[0]}",
        ],
    ),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(kind, tmp_path):
    updates, overrides = RUNS[kind]
    run_with_snapshots(tmp_path / "run", updates, *overrides)
    for update in updates:
        go_on(tmp_path / f"at_{update}")
        assert_same_run(tmp_path / "run", tmp_path / f"at_{update}")


NOTED = {
    "the stability edge": ("past the head's stability edge", {7, 30}, ["lr=3.6"]),
    "sizes": (
        "34 parameters that all samples share",
        {30, 47},
        ["data.num_train=20", "trials=2", "together=false"],
    ),
    "wrong components": (
        "not the mixture components",
        {54, 118},
        [
            *("components=labels", "data.num_train=1000", "data.dimension=250", "steps=60"),
            *("optimizer.curvature=stein", "lr=0.5", "tracking.checkpoint_every=20"),
        ],
    ),
    "feedback of the correction": (
        "feeds back on itself",
        {25, 38},
        ["data.num_train=20", "optimizer.lr=3", "data.noise=2"],
    ),
    "failures": ("the training loss is", {1, 15}, ["available.gd.lr=1e30"]),
}


@pytest.mark.parametrize("kind", NOTED)
def test_what_was_said_before_and_after_the_interruption_is_kept(kind, tmp_path):
    sentence, updates, overrides = NOTED[kind]
    whole = run_with_snapshots(tmp_path / "run", updates, *overrides)
    assert any(sentence in said for said in whole.notes + whole.failures)
    for update in updates:
        folder = tmp_path / f"at_{update}"
        again = go_on(folder)
        assert (again.notes, again.failures) == (whole.notes, whole.failures)
        assert_same_run(tmp_path / "run", folder)


def test_a_run_can_be_interrupted_again_and_again(tmp_path, monkeypatch):
    run_with_snapshots(tmp_path / "run", {5}, "data.batch_size=32")
    update = training._update

    def interrupted(*arguments: Any) -> int:
        if random.random() < 0.1:  # noqa: S311
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(training, "_update", interrupted)
    for _ in range(50):
        with contextlib.suppress(KeyboardInterrupt):
            go_on(tmp_path / "at_5")
            break
    assert_same_run(tmp_path / "run", tmp_path / "at_5")


def test_the_history_may_be_older_or_younger_than_the_checkpoint(tmp_path):
    run_with_snapshots(tmp_path / "run", {34, 35})
    (tmp_path / "at_34" / "history.csv").unlink()
    shutil.copy(tmp_path / "run" / "history.csv", tmp_path / "at_35")
    (tmp_path / "at_35" / ".checkpoint.pt.1.tmp").write_bytes(b"half of it")
    for folder in (tmp_path / "at_34", tmp_path / "at_35"):
        go_on(folder)
        assert_same_run(tmp_path / "run", folder)


def test_killed_between_the_last_checkpoint_and_the_summary(tmp_path, monkeypatch):
    for write in ("_write_results", "_write_report"):
        monkeypatch.setattr(Experiment, write, lambda *_, **__: None)
    run_with_snapshots(tmp_path / "killed", set())
    monkeypatch.undo()
    run_with_snapshots(tmp_path / "run", set())
    go_on(tmp_path / "killed")
    assert_same_run(tmp_path / "run", tmp_path / "killed")


def test_the_folder_keeps_references_to_the_seed_and_resolves_all_others():
    config = configure("lr=0.3", "data.noise=${lr}")
    kept = settled(config)
    raw = OmegaConf.to_container(kept, resolve=False)
    assert raw["data"]["seed"] == raw["optimizer"]["seed"] == "${seed}"
    assert raw["data"]["noise"] == raw["available"]["gd"]["lr"] == 0.3
    assert kept == config


# --- Killed ----------------------------------------------------------------------------------

LONG = ["steps=200", "tracking.checkpoint_every=10"]
KINDS = {
    "full": LONG,
    "mini": [
        *LONG,
        "lr=0.1",
        "data.batch_size=32",
        "optimizer.momentum=0.8",
        "available.gd.momentum=0.5",
    ],
}


def start(*arguments: str) -> subprocess.Popen[str]:
    # As many threads as here, on which the rounding depends.
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "dd", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def started(commands: dict[str, list[str]]) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Processes side by side, none of which outlives the test."""
    with contextlib.ExitStack() as stack:
        processes = {}
        for kind, command in commands.items():
            processes[kind] = stack.enter_context(start(*command))
            stack.callback(processes[kind].kill)
        yield processes


def kill_after_a_checkpoint(process: subprocess.Popen[str], folder: Path, delay: float) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(delay)
    assert process.poll() is None, "finished before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def check_killed(tmp_path: Path, kinds: list[str]) -> None:
    delays = {kind: random.uniform(0, 0.7) for kind in kinds}  # noqa: S311
    print("killed after", delays)  # noqa: T201
    folders = {kind: tmp_path / kind for kind in kinds}
    fresh = {
        kind: ["experiment=xor", *SMALL, *KINDS[kind], f"hydra.run.dir={folders[kind]}"]
        for kind in kinds
    }
    with started(fresh) as processes:
        for kind in sorted(kinds, key=delays.get):
            kill_after_a_checkpoint(processes[kind], folders[kind], delays[kind])
    with started({kind: [f"resume={folders[kind]}"] for kind in kinds}) as processes:
        for kind, process in processes.items():
            out, error = process.communicate(timeout=240)
            assert process.returncode == 0, error
            assert "DD" in out
            Experiment(configure(*KINDS[kind]), tmp_path / f"{kind}_whole").run()
            assert_same_run(tmp_path / f"{kind}_whole", folders[kind])
    assert {path.name for path in tmp_path.iterdir()} == {
        *kinds,
        *(f"{kind}_whole" for kind in kinds),
    }


def test_a_killed_run_is_resumed_to_the_bit(tmp_path):
    check_killed(tmp_path, ["mini"])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(2))
def test_runs_killed_at_other_moments(tmp_path, number):
    check_killed(tmp_path, ["full", "mini"])


# --- The disk --------------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to write more into any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    model = torch.nn.Linear(100, 100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt", trial=0, origin={})
    checkpoint.keep("gd", 3, model, optimizer)
    before = checkpoint.path.read_bytes()
    with largest_file(20_000), pytest.raises(OSError, match=r"step 4 could not .* disk full"):
        checkpoint.keep("gd", 4, model, optimizer)
    assert checkpoint.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_run_that_finds_the_disk_full_can_be_resumed(tmp_path, monkeypatch):
    run_with_snapshots(tmp_path / "run", {29})
    save, folder = torch.save, tmp_path / "at_29"

    def full(*arguments: Any) -> None:
        save(*arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"step 8 could not be written .*No space left"):
        go_on(folder)
    monkeypatch.undo()
    assert not list(folder.glob(".*"))
    go_on(folder)
    assert_same_run(tmp_path / "run", folder)


# --- What cannot be resumed ------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A finished run in ``run`` and an interrupted one in ``at_30``."""
    folder = tmp_path_factory.mktemp("runs")
    run_with_snapshots(folder / "run", {30})
    return folder


@pytest.fixture
def interrupted(runs, tmp_path) -> Path:
    return shutil.copytree(runs / "at_30", tmp_path / "interrupted")


def test_a_finished_run_is_not_resumed(runs):
    with pytest.raises(ValueError, match="is finished; there is nothing to resume"):
        go_on(runs / "run")


def test_a_missing_folder_and_one_without_a_run_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        go_on(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="it is no run folder"):
        go_on(tmp_path)


def test_a_run_without_a_checkpoint_is_told(interrupted):
    (interrupted / "checkpoint.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint\.pt"):
        go_on(interrupted)


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flip(content: bytes) -> bytes:
    # More than lies between two tensors to align them, which nobody reads.
    middle, after = len(content) // 2, len(content) // 2 + 256
    return content[:middle] + bytes(b ^ 255 for b in content[middle:after]) + content[after:]


@pytest.mark.parametrize("damage", [_cut, _flip, lambda _: b"", lambda _: b"something else"])
def test_a_damaged_checkpoint_is_told(interrupted, damage):
    path = interrupted / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged \(.+\), so that its run"):
        go_on(interrupted)


@pytest.mark.parametrize("content", [{"trial": 0, "optimizers": {}}, {"format": 99}, [1, 2]])
def test_a_checkpoint_of_another_format_is_told(interrupted, content):
    torch.save(content, interrupted / "checkpoint.pt")
    with pytest.raises(ValueError, match="written by another version of this package"):
        go_on(interrupted)


@pytest.mark.parametrize(
    ("group", "key", "value", "message"),
    [
        ("model", "width", 9, r"model\.width was 8 and is 9"),
        ("data", "noise", 2.0, r"data\.noise was 1\.0 and is 2\.0"),
        (None, "optimizers", ["gd"], r"optimizers was \[gd,dd\] and is \[gd\]"),
        (None, "trials", 3, "trials was 1 and is 3"),
        (None, "steps", 40, "steps was 22 and is 40"),
        (None, "seed", 1, "seed was 0 and is 1"),
    ],
)
def test_an_edited_configuration_is_told(interrupted, group, key, value, message):
    path = interrupted / "config.yaml"
    config = yaml.safe_load(path.read_text())
    (config if group is None else config[group])[key] = value
    path.write_text(yaml.safe_dump(config))
    before = contents(interrupted)
    with pytest.raises(ValueError, match=f"are not of one run: .*{message}"):
        go_on(interrupted)
    assert contents(interrupted) == before


def test_a_configuration_written_in_other_words_is_the_same(interrupted, runs):
    path = interrupted / "config.yaml"
    path.write_text("# mine\n" + yaml.safe_dump(yaml.safe_load(path.read_text())))
    go_on(interrupted)
    assert (interrupted / "history.csv").read_bytes() == (runs / "run/history.csv").read_bytes()


def test_a_checkpoint_of_another_run_is_told(interrupted, tmp_path):
    run_with_snapshots(tmp_path / "other", set(), "lr=0.3")
    shutil.copy(tmp_path / "other" / "checkpoint.pt", interrupted)
    with pytest.raises(ValueError, match=r"are not of one run: .*lr was 0\.3 and is 0\.2"):
        go_on(interrupted)


def test_another_version_is_noted(interrupted, monkeypatch):
    monkeypatch.setattr(dd, "__version__", "0.0.9")
    assert "the run began with dd 0.1.0 and went on with 0.0.9" in go_on(interrupted).notes


@pytest.mark.parametrize("other", ["experiment=xor", "lr=0.1", "-m", "tracking.record_every=1"])
def test_other_settings_beside_resume_are_refused(interrupted, other):
    with pytest.raises(ValueError, match=f"{other} cannot go with it, only tracking.progress"):
        go_on(interrupted, other)


# --- The data of a file ----------------------------------------------------------------------


FROM_FILE = ["experiment=probe", "data.test_share=0.25", "optimizers=[gd]", "steps=12", "lr=0.2"]


def made_data(seed: int = 0) -> dict[str, Any]:
    g = np.random.default_rng(seed)
    labels = np.arange(80) % 2
    features = g.normal(size=(80, 12)) + labels[:, None]
    return {"features": features.astype(np.float32), "labels": labels}


def interrupted_after_file(folder: Path, *overrides: str) -> Path:
    """A run from f.npz in the current directory, interrupted at its seventh update."""
    np.savez(Path.cwd() / "f.npz", **made_data())
    given = [*FROM_FILE, "data.path=f.npz", *SMALL[5:], *overrides]
    with interrupted_after(6):
        Experiment(composed(*given), folder).run()
    return folder


@contextlib.contextmanager
def interrupted_after(updates: int) -> Iterator[None]:
    """Interrupt what runs in here after so many updates."""
    update, left = training._update, iter(range(updates))

    def interrupting(*arguments: Any) -> int:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return update(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_update", interrupting)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.fixture
def from_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return interrupted_after_file(tmp_path / "run")


def in_another_order(data):
    order = np.random.default_rng(1).permutation(80)
    return {key: value[order] for key, value in data.items()}


def with_another_sample(data):
    data["features"][3, 2] += 0.5
    return data


def with_another_label(data):
    data["labels"] = data["labels"].copy()
    data["labels"][5] = 1 - data["labels"][5]
    return data


CHANGES = {
    "order": (in_another_order, "training samples"),
    "a sample": (with_another_sample, "samples are others"),
    "a label": (with_another_label, "training labels are others"),
    "fewer": (lambda data: {k: v[:60] for k, v in data.items()}, "45 training samples for 60"),
    "other samples": (lambda data: made_data(1), "60 of 60 training samples are others"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_changed_data_are_refused_and_the_folder_is_left_alone(from_file, kind):
    change, message = CHANGES[kind]
    np.savez("f.npz", **change(made_data()))
    before = contents(from_file)
    with pytest.raises(ValueError, match=message) as caught:
        go_on(from_file)
    assert "f.npz now gives" in str(caught.value)
    assert contents(from_file) == before


def test_samples_in_another_order_are_called_that(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = interrupted_after_file(tmp_path / "run", "data.test_share=null")
    np.savez("f.npz", **in_another_order(made_data()))
    with pytest.raises(ValueError, match="the training samples stand in another order"):
        go_on(folder)


def test_a_file_written_again_with_the_same_data_goes_on(from_file):
    data = made_data()
    np.savez_compressed("f.npz", labels=data["labels"].astype(np.int32), features=data["features"])
    assert go_on(from_file).history.records[-1].step == 12


def test_data_computed_anew_may_differ_in_rounding(from_file):
    data = made_data()
    data["features"] *= 1 + np.float32(2**-22)
    np.savez("f.npz", **data)
    assert go_on(from_file).history.records[-1].step == 12


def test_relative_paths_are_looked_for_where_the_run_began(from_file, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert go_on(Path("../run")).history.records[-1].step == 12


def test_a_folder_and_data_that_moved_go_on(from_file, tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    shutil.move(from_file, tmp_path / "new" / "moved")
    shutil.move("f.npz", tmp_path / "new" / "g.npz")
    monkeypatch.chdir(tmp_path / "new")
    with pytest.raises(FileNotFoundError):
        go_on(Path("moved"))
    assert go_on(Path("moved"), "data.path=g.npz").history.records[-1].step == 12


def test_the_second_trial_is_held_against_its_own_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_with_snapshots(tmp_path / "run", {30}, "optimizers=[gd]", "trials=2", "together=false")
    again = go_on(tmp_path / "at_30")
    assert_same_run(tmp_path / "run", tmp_path / "at_30")
    assert again.kept["trial"] == 1


def test_a_run_that_was_interrupted_in_two_trials_goes_on(tmp_path, monkeypatch):
    """What the first resumption changed, as where its data are, is not what the run began with."""
    monkeypatch.chdir(tmp_path)
    trials = ("trials=2", "together=false")
    folder = interrupted_after_file(tmp_path / "run", *trials)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with interrupted_after(12), monkeypatch.context() as patch:
        patch.setattr(dd, "__version__", "0.0.9")
        go_on(folder, "tracking.report=true")
    again = go_on(folder)
    assert (again.kept["trial"], again.history.records[-1].step) == (1, 12)
    assert [note for note in again.notes if "the run began with" in note] == [
        "the run began with dd 0.1.0 and went on with 0.0.9"
    ]


# --- What goes with it -----------------------------------------------------------------------


def test_two_folders_are_refused(interrupted):
    with pytest.raises(ValueError, match="resume= takes one folder"):
        go_on(interrupted, "resume=other")


def test_what_computes_nothing_can_be_set(interrupted, runs):
    free = ("tracking.progress=true", "tracking.wandb.mode=disabled", "tracking.report=true")
    experiment = go_on(interrupted, *free)
    assert experiment.config.tracking.progress is True
    assert_same_run(runs / "run", interrupted)
    report = (interrupted / "report.html").read_text(encoding="utf-8")
    assert "did not come to its end" not in report


def test_a_run_that_is_still_going_on_is_not_resumed(interrupted, monkeypatch):
    second = resumed(interrupted, [f"resume={interrupted}"])

    def meanwhile(*_: Any) -> None:
        with pytest.raises(FolderLocked, match="is still going on"):
            second.run()
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_update", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        go_on(interrupted)


def test_resume_is_for_the_command_line(tmp_path):
    with pytest.raises(ValueError, match="resume= belongs on the command line"):
        Experiment(configure("resume=somewhere"), tmp_path)


def test_the_folder_is_found_on_the_command_line():
    assert named_folder(["tracking.progress=false", "resume=a b/c"]) == Path("a b/c")
    assert named_folder(["+resume='x=1'"]) == Path("x=1")
    assert named_folder(["experiment=xor", "resume=null"]) is None
    assert named_folder(["experiment=xor"]) is None


def test_the_command_says_in_one_sentence_why_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "said", [])
    command._go_on(tmp_path, [f"resume={tmp_path}"], None)
    (sentence,) = command.said
    assert "it is no run folder" in sentence
    assert capsys.readouterr().err == sentence + "\n"
