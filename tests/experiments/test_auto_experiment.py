"""Experiments with optimizers that choose their own steps, and end when they like."""

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console

import dd
from dd.experiments.assembly import make_model, make_split, refuse_idle_overrides
from dd.experiments.experiment import Experiment
from dd.experiments.recorder import Recorder
from dd.experiments.resume import resumed
from dd.tracking import figures
from dd.tracking.console import ProgressDisplay
from dd.tracking.figures import train_vs_test
from dd.tracking.history import History, Record
from dd.training import loop as training
from dd.training.batches import Batches
from dd.training.loop import Schedule, TrainingStopped, train
from dd.training.stability import EdgeWatch
from tests.composed import CONFIGS, QUICK, composed, ran

ALONE = "optimizers=[dd_auto]"

pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing takes longer than these runs."""
    monkeypatch.setattr(figures, "train_vs_test", lambda history, path, *rest: path.touch())


def configure(*overrides: str):
    return composed("experiment=xor", *QUICK, *overrides)


def run(folder: Path, *overrides: str) -> Experiment:
    return ran(folder, "experiment=xor", *QUICK, *overrides)


def steps_of(experiment: Experiment, name: str = "dd_auto", trial: int = 0) -> list[int]:
    return [record.step for record in experiment.history.select(name, trial)]


# --- Which optimizers are trained ------------------------------------------------------------


def line_up(*overrides: str) -> tuple[list[str], list[str]]:
    experiment = Experiment(configure(*overrides), Path("unused"))
    return list(experiment.config.optimizers), experiment.notes


# Experiments whose optimizers are not the usual three.
OWN_LINE_UP = {
    "xor_paper": ["gd", "dd", "dd_half", "dd_pure"],
    "probe": [
        "gd",
        "gd_holdout",
        "adamw",
        "adamw_holdout",
        "lbfgs_holdout",
        "gd_kfold",
        "dd",
        "dd_auto",
        "dd_adamw",
    ],
}


@pytest.mark.parametrize("experiment", [p.stem for p in (CONFIGS / "experiment").glob("*.yaml")])
def test_full_batches_in_one_process_train_all_three(experiment):
    found = Experiment(composed(f"experiment={experiment}"), Path("unused"))
    usual = ["gd", "dd", "dd_auto"]
    assert list(found.config.optimizers) == OWN_LINE_UP.get(experiment, usual)
    assert found.notes == []


def test_by_default_mini_batches_and_processes_do_without_it_and_say_so(monkeypatch):
    names, notes = line_up("data.batch_size=30")
    assert names == ["gd", "dd"]
    assert len(notes) == 1
    assert notes[0].startswith("dd_auto was left out")
    assert notes[0].endswith("data.batch_size=30 should be null")
    monkeypatch.setenv("WORLD_SIZE", "2")
    names, notes = line_up()
    assert names == ["gd", "dd"]
    assert len(notes) == 1
    assert notes[0].endswith("in one process; there are 2")


@pytest.mark.parametrize(
    "wish", ["optimizers=[gd,dd_auto]", "optimizer=dd_auto", "optimizer.lr=auto"]
)
def test_asked_for_by_name_it_is_refused_where_it_cannot_run(wish, monkeypatch):
    name = "dd" if wish == "optimizer.lr=auto" else "dd_auto"
    with pytest.raises(ValueError, match=rf"{name} cannot be trained: .* data\.batch_size=30 "):
        line_up(wish, "data.batch_size=30")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=rf"{name} cannot be trained: .*one process; there are 3"):
        line_up(wish)
    monkeypatch.undo()
    assert name in line_up(wish)[0]


def test_silu_goes_with_it(tmp_path):
    names, notes = line_up("model.activation=silu")
    assert names == ["gd", "dd", "dd_auto"]
    assert not notes
    experiment = run(tmp_path, "model.activation=silu", ALONE, "steps=8")
    assert steps_of(experiment)[-1] == 8
    assert experiment.failures == []


def test_mini_batches_by_default_run_to_their_end(tmp_path):
    experiment = run(tmp_path, "data.batch_size=30", "steps=3")
    assert set(experiment.summary) == {"gd", "dd"}
    said = json.loads((tmp_path / "summary.json").read_text())["notes"]
    assert [note for note in said if "left out" in note] == experiment.notes[:1]


def test_learning_rate_of_the_command_line_is_for_the_two_others():
    for wish in ("optimizer=dd", "optimizer=dd_auto"):
        config = Experiment(configure(wish, "lr=0.3"), Path("unused")).config
        assert [config.available[name].lr for name in ("gd", "dd")] == [0.3, 0.3]
        assert config.available.dd_auto.lr == "auto"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=auto", "lr of optimizer gd must be a number.*'auto'; only decoupled descent"),
        ("optimizer.momentum=auto", "momentum of optimizer dd must be a number, .* got 'auto'"),
        ("available.dd_auto.lr=best", "lr of optimizer dd_auto must be a number.* got 'best'"),
        ("tracking.record_every_auto=0", "record_every_auto must be a positive integer, got 0"),
    ],
)
def test_only_the_rate_of_a_decoupled_optimizer_can_be_auto(override, message):
    with pytest.raises(ValueError, match=message):
        line_up(override)


def test_a_rule_beyond_plain_steps_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match=r'lr="auto" chooses step .* got momentum=0\.9'):
        run(tmp_path, "+available.dd_auto.momentum=0.9")
    assert not (tmp_path / "config.yaml").exists()


def test_a_learning_rate_that_reaches_no_optimizer_is_refused():
    overrides = [ALONE, "lr=0.3"]
    with pytest.raises(ValueError, match=r"lr=0\.3 has no effect: .*dd_auto chooses its own"):
        refuse_idle_overrides(configure(*overrides), overrides)
    overrides = ["optimizers=[gd,dd_auto]", "lr=0.3"]
    refuse_idle_overrides(configure(*overrides), overrides)


# --- The loop --------------------------------------------------------------------------------


def test_updates_of_gradient_descent_are_those_of_a_plain_loop(tmp_path):
    experiment = run(tmp_path, "lr=0.5", "optimizers=[gd]", "steps=9", "available.gd.momentum=0.5")
    split = make_split(experiment.config)
    model = make_model(experiment.config, split)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    for _ in range(9):
        optimizer.zero_grad()
        F.cross_entropy(model(split.train_inputs), split.train_targets).backward()
        optimizer.step()
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizers"]["gd"]["model"]
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


class Trying(torch.optim.SGD):
    """Calls the closure at infinite weights too, from some call on."""

    def __init__(self, parameters: Any, first: int) -> None:
        super().__init__(parameters, lr=0.1)
        self.calls, self.first = 0, first

    def step(self, closure: Any = None) -> Any:
        for _ in range(2):
            self.calls += 1
            parameter = self.param_groups[0]["params"][0]
            kept = parameter.detach().clone()
            if self.calls >= self.first:
                parameter.data.fill_(math.inf)
            with torch.enable_grad():
                closure()
            parameter.data.copy_(kept)


@pytest.mark.parametrize(("first", "fails"), [(2, False), (1, True)])
def test_trial_points_may_be_infinite_and_the_state_may_not(first, fails):
    config = configure()
    split = make_split(config)
    model = make_model(config, split)
    optimizer = Trying(model.parameters(), first)
    arguments = (model, optimizer, split, None, 1.0, 0)
    if fails:
        with pytest.raises(TrainingStopped, match="the training loss is nan at step 0"):
            training._update(*arguments)
    else:
        assert training._update(*arguments) == 2 * len(split.train_inputs)
    assert optimizer.calls == (1 if fails else 2)


def test_a_loss_that_is_not_finite_is_not_blamed_on_a_rate_that_nobody_gave(tmp_path, monkeypatch):
    def overflowing(config, split):
        model = make_model(config, split)
        model[0].weight.data.fill_(math.inf)
        return model

    monkeypatch.setattr("dd.experiments.experiment.make_model", overflowing)
    experiment = run(tmp_path)
    blamed = {text.split(":")[0]: "learning rate" in text for text in experiment.failures}
    assert blamed == {"gd": True, "dd": True, "dd_auto": False}


def test_records_do_not_change_what_is_recorded(tmp_path):
    endless = [ALONE, "available.dd_auto.stop=null"]
    often = run(tmp_path / "often", *endless)
    seldom = run(tmp_path / "seldom", *endless, "tracking.record_every_auto=5")
    assert steps_of(often) == list(range(23))
    assert steps_of(seldom) == [0, 5, 10, 15, 20, 22]
    assert seldom.history.records == [
        r for r in often.history.records if r.step in steps_of(seldom)
    ]


def test_a_step_of_its_own_choice_is_not_held_against_the_stability_edge():
    config = configure()
    split = make_split(config)
    crossings = {}
    for lr in (0.1, "auto"):
        model = make_model(config, split)
        optimizer = dd.DecoupledDescent(model, lr=lr)
        optimizer.param_groups[0]["lr"] = 1e6
        watch = EdgeWatch(model, optimizer, split.train_inputs, split.train_targets)
        watch.look(0)
        crossings[lr] = watch.crossing
    assert crossings["auto"] is None
    assert crossings[0.1] is not None


# --- An optimizer that stops -----------------------------------------------------------------

MADE = "steps_of_this_test"


@pytest.fixture
def stopping(monkeypatch):
    """Let optimizers with lr="auto" stop after some steps, one number a trial, and no sooner."""
    monkeypatch.setattr("dd.rules.line_search.step.StopRule.look", lambda *_, **__: False)
    step = dd.DecoupledDescent.step
    limits: dict[int, int] = {}

    def stopped(optimizer: Any) -> bool:
        group = optimizer.param_groups[0]
        made, limit = group.get(MADE, 0), limits.get(optimizer._seed, math.inf)
        return optimizer._policy is not None and made >= limit

    def counted(optimizer: Any, closure: Any = None) -> Any:
        assert not stopped(optimizer), "the loop goes on after the stop"
        loss = step(optimizer, closure)
        optimizer.param_groups[0][MADE] = optimizer.param_groups[0].get(MADE, 0) + 1
        return loss

    monkeypatch.setattr(dd.DecoupledDescent, "stopped", property(stopped), raising=False)
    monkeypatch.setattr(dd.DecoupledDescent, "step", counted)
    return limits


def test_the_run_ends_where_the_optimizer_stopped(tmp_path, stopping):
    stopping[0] = 7
    experiment = run(tmp_path, "tracking.record_every_auto=5", "optimizers=[dd,dd_auto]")
    assert steps_of(experiment) == [0, 5, 7]
    assert steps_of(experiment, "dd")[-1] == 22
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizers"]["dd_auto"]
    assert kept["step"] == 7
    assert len(kept["progress"]["seconds"]) == 7
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [summary[name]["steps"] for name in ("dd", "dd_auto")] == [22, 7]
    assert summary["dd_auto"]["completed_trials"] == 1
    assert summary["dd_auto"]["seconds"] == pytest.approx(sum(kept["progress"]["seconds"]))
    last = experiment.history.select("dd_auto", 0)[-1]
    assert summary["dd_auto"]["final_test_error"] == last.test_error


def test_a_stop_at_the_last_step_is_recorded_once(tmp_path, stopping):
    stopping[0] = 22
    assert steps_of(run(tmp_path, ALONE)) == list(range(23))


def snapshots(folder: Path, keeps: set[int], *overrides: str) -> Experiment:
    """Run, and copy the folder right after some checkpoints."""
    original, count = Recorder.keep, 0

    def watched(recorder: Recorder, *arguments: Any) -> None:
        nonlocal count
        original(recorder, *arguments)
        if count in keeps:
            shutil.copytree(folder, folder.with_name(f"at_{count}"))
        count += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "keep", watched)
        return run(folder, *overrides)


def test_a_run_is_resumed_before_at_and_after_the_stop(tmp_path, stopping):
    stopping.update({0: 7, 1: 10})
    # Checkpoints of a trial: at steps 0, 4 and 7 of the first, at 0, 4, 8 and 10 of the second.
    whole = snapshots(tmp_path / "run", {1, 2, 4, 6}, ALONE, "trials=2")
    assert [steps_of(whole, trial=t)[-1] for t in (0, 1)] == [7, 10]
    for number in (1, 2, 4, 6):
        folder = tmp_path / f"at_{number}"
        again = resumed(folder, [f"resume={folder}"])
        again.run()
        assert again.history.records == whole.history.records
        assert (
            again.history.completed == whole.history.completed == {("dd_auto", 0), ("dd_auto", 1)}
        )
        assert again.summary["dd_auto"]["steps"] == 8.5
        assert (folder / "history.csv").read_bytes() == (tmp_path / "run/history.csv").read_bytes()


def test_a_run_that_stops_by_itself_is_resumed_too(tmp_path):
    sizes = ["steps=60", "tracking.checkpoint_every=1", "tracking.record_every_auto=5"]
    whole = snapshots(tmp_path / "run", {9}, ALONE, *sizes)
    end = steps_of(whole)[-1]
    assert 9 < end < 60
    # Nothing but the summary is missing from the folder of a run killed at its very end.
    shutil.copytree(tmp_path / "run", tmp_path / "at_end")
    (tmp_path / "at_end" / "summary.json").unlink()
    for name in ("at_9", "at_end"):
        again = resumed(tmp_path / name, [f"resume={tmp_path / name}"])
        again.run()
        assert again.history.records == whole.history.records
        assert again.summary["dd_auto"]["steps"] == end


def test_the_settled_list_is_what_a_resumed_run_keeps(tmp_path, monkeypatch):
    run(tmp_path, "steps=2")
    (tmp_path / "summary.json").unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"dd_auto cannot be trained: .* there are 2"):
        resumed(tmp_path, [f"resume={tmp_path}"])


def test_bars_of_optimizers_that_stopped_are_full():
    stream = io.StringIO()
    with ProgressDisplay(Console(file=stream, width=80)) as display:
        stopped, broken = display.start("dd_auto", "dd_auto", 200), display.start("gd", "gd", 200)
        display.update(stopped, Record("dd_auto", 0, 37, *[0.1] * 6))
        display.update(broken, Record("gd", 0, 40, *[0.1] * 6))
        display.finish(stopped)
        assert display._progress.tasks[stopped].finished
        assert display.start("dd_auto", "dd_auto 2/2", 200) == stopped
        assert display._progress.tasks[stopped].total == 200
        display.update(stopped, Record("dd_auto", 1, 41, *[0.1] * 6))
        display.finish(stopped)
    text = stream.getvalue()
    assert "41/41" in text
    assert "40/200" in text


def test_a_resumed_run_shows_where_it_was(tmp_path, stopping, capsys):
    stopping[0] = 7
    snapshots(tmp_path / "run", {2}, ALONE)
    folder = tmp_path / "at_2"
    resumed(folder, [f"resume={folder}", "tracking.progress=true"]).run()
    assert "7/7 train error 0." in capsys.readouterr().out


# --- Curves of several lengths ---------------------------------------------------------------


def history_of(ends: dict[int, int], completed: bool = True) -> History:
    history = History()
    for trial, end in ends.items():
        for step in [*range(0, end, 5), end]:
            history.append(Record("dd_auto", trial, step, *[float(step + 100 * trial)] * 6))
        if completed:
            history.completed.add(("dd_auto", trial))
    return history


def test_a_trial_that_came_to_rest_stays_there():
    steps, values = history_of({0: 7, 1: 12}).curves("dd_auto", "test_loss")
    np.testing.assert_array_equal(steps, [0, 5, 7, 10, 12])
    np.testing.assert_allclose(values, [[0, 5, 7, 7, 7], [100, 105, 107, 110, 112]])


def test_a_trial_that_broke_off_does_not():
    _, values = history_of({0: 7, 1: 12}, completed=False).curves("dd_auto", "test_loss")
    np.testing.assert_allclose(values[0], [0, 5, 7, np.nan, np.nan])
    np.testing.assert_allclose(values[1], [100, 105, 107, 110, 112])


def test_a_far_shorter_curve_has_an_axis_and_a_colour_of_its_own(tmp_path, monkeypatch):
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1]
    )
    history = history_of({0: 20, 1: 37})
    history.records[:0] = [
        Record(name, 0, step, *[0.5] * 6) for name in ("gd", "dd") for step in range(0, 201, 5)
    ]
    train_vs_test(history, tmp_path / "x.png", "")
    gd, decoupled, auto = drawn[0].axes[3:]
    assert gd.get_xlim() == decoupled.get_xlim() == (-0.5, 200.5)
    assert auto.get_xlim() == (-0.5, 37.5)
    assert (gd.get_xlabel(), auto.get_xlabel()) == ("Step", "Step (own scale)")
    colours = {
        axes: {line.get_label(): line.get_color() for line in axes.get_lines()}
        for axes in (gd, decoupled, auto)
    }
    assert colours[gd]["train"] == colours[decoupled]["train"] != colours[auto]["train"]
    assert colours[auto]["train"] != colours[auto]["test"] == colours[gd]["test"]
    legends = [axes.get_legend() is not None for axes in drawn[0].axes[:3]]
    assert legends == [True, False, True]


# --- In the flesh ----------------------------------------------------------------------------


def test_it_goes_at_least_as_low_as_a_fixed_step_on_the_tracked_loss(tmp_path):
    sizes = ["data.num_train=800", "data.dimension=200", "data.num_test=1000", "steps=40"]
    experiment = run(tmp_path, *sizes, "optimizers=[dd,dd_auto]")
    dd_loss, auto_loss = (
        min(r.train_loss for r in experiment.history.select(name, 0)) for name in ("dd", "dd_auto")
    )
    assert auto_loss <= dd_loss
    assert not any(note.startswith("dd_auto") for note in experiment.notes)


def test_the_loop_takes_any_optimizer_of_closures():
    config = configure()
    split = make_split(config)
    model = make_model(config, split)
    losses: list[float] = []

    class Watching:
        def record(self, step: int, found: dict[str, float]) -> None:
            losses.append(found["train_loss"])

        def keep(self, *_: Any) -> None: ...

        def spend(self, seconds: float, samples: int) -> None: ...

    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5)
    train(model, optimizer, split, Schedule(3, 1, 1), Watching(), Batches(120, None, 0))
    assert losses[-1] < losses[0]
