"""What a run records, where it goes, and what it shows."""

import csv
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dd.support.files import replacing, write_json
from dd.tracking.console import ProgressDisplay, comparison, print_report
from dd.tracking.history import (
    COLUMNS,
    METRICS,
    History,
    Record,
    aggregate,
    selected_step,
    summarise,
)

NAN = float("nan")


def record(optimizer="dd", trial=0, step=0, *, train=(0.5, 0.4), test=(0.6, 0.3)):
    """Return a record; train and test are (loss, error)."""
    return Record(optimizer, trial, step, train[0], test[0], train[1], test[1], 0.1, 0.2)


@pytest.fixture
def history():
    """GD and DD, two trials of three records, the last trial of DD cut short."""
    made = History()
    for optimizer in ("gd", "dd"):
        for trial in (0, 1):
            for step in (0, 10, 20)[: 2 if (optimizer, trial) == ("dd", 1) else 3]:
                loss = 1 / (3 + step + trial)
                made.append(record(optimizer, trial, step, train=(loss, loss / 2), test=(1.0, 0.5)))
    return made


# History


def test_columns_are_those_of_the_specification():
    assert ",".join(COLUMNS) == (
        "optimizer,trial,step,train_loss,test_loss,train_error,test_error,"
        "uncorrected_train_loss,uncorrected_train_error"
    )


def test_csv_gives_back_every_record_to_the_last_digit(history, tmp_path):
    history.append(record("dd", 1, 20, train=(NAN, 1 / 3)))
    history.write_csv(tmp_path / "history.csv")
    with (tmp_path / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == len(history.records)
    for row, made in zip(rows, history.records, strict=True):
        assert (row["optimizer"], int(row["trial"]), int(row["step"])) == (
            made.optimizer,
            made.trial,
            made.step,
        )
        for name in METRICS:
            assert repr(float(row[name])) == repr(getattr(made, name))
    assert b"\r" not in (tmp_path / "history.csv").read_bytes()


def test_csv_is_written_whole_or_not_at_all(history, tmp_path):
    path = tmp_path / "history.csv"
    history.write_csv(path)
    before = path.read_bytes()
    history.records.append(None)
    with pytest.raises(TypeError):
        history.write_csv(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_replacing_leaves_no_trace_of_a_failure(tmp_path):
    with pytest.raises(RuntimeError), replacing(tmp_path / "file") as scratch:  # noqa: PT012
        scratch.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_history_knows_its_optimizers_and_trials(history):
    assert history.optimizers == ["gd", "dd"]
    assert history.trials("dd") == [0, 1]
    assert [r.step for r in history.select("dd", 1)] == [0, 10]


def test_curves_share_steps_and_end_in_nan(history):
    steps, values = history.curves("dd", "train_loss")
    assert steps.tolist() == [0, 10, 20]
    expected = [[1 / 3, 1 / 13, 1 / 23], [1 / 4, 1 / 14, NAN]]
    np.testing.assert_array_equal(values, expected)
    own, single = history.curve("dd", 1, "train_loss")
    assert (own.tolist(), single.tolist()) == ([0, 10], [1 / 4, 1 / 14])


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda h: h.select("sgd", 0), r"no records of 'sgd', trial 0; there are gd: \[0, 1\]"),
        (lambda h: h.curves("sgd", "test_loss"), r"no records of 'sgd'; there are \['gd', 'dd'\]"),
        (lambda h: h.curve("gd", 0, "loss"), "column must be one of train_loss, .* got 'loss'"),
    ],
)
def test_asking_for_what_is_not_there_names_what_is(history, ask, words):
    with pytest.raises(KeyError, match=words):
        ask(history)


# Summary


def test_summary_of_known_curves():
    records = [
        record(step=0, train=(0.9, 0.50), test=(0.8, 0.40)),
        record(step=5, train=(0.5, 0.20), test=(0.7, 0.10)),
        record(step=10, train=(0.4, 0.15), test=(0.7, 0.25)),
        record(step=15, train=(0.6, 0.35), test=(0.9, 0.40)),
    ]
    assert summarise(records) == pytest.approx(
        {
            "steps": 15,
            "final_train_error": 0.35,
            "final_test_error": 0.40,
            "final_train_loss": 0.6,
            "final_test_loss": 0.9,
            "best_test_error": 0.10,
            "best_test_step": 5,
            "selected_step": 10,
            "selected_test_error": 0.25,
            "mean_error_gap": (0.1 + 0.1 + 0.1 + 0.05) / 4,
            "mean_loss_gap": (0.1 + 0.2 + 0.3 + 0.3) / 4,
        }
    )


def test_selected_step_is_the_first_of_lowest_error_then_loss_and_never_nan():
    pairs = [(NAN, NAN), (0.1, 0.3), (0.5, 0.2), (0.4, 0.2), (0.4, 0.2), (NAN, NAN)]
    records = [record(step=i, train=pair) for i, pair in enumerate(pairs)]
    assert selected_step(records) == 3
    assert selected_step(records[:1]) == 0


def test_summary_of_a_run_that_diverged_is_honest():
    records = [record(step=0), record(step=1, train=(NAN, 1.0), test=(NAN, 0.9))]
    summary = summarise(records)
    assert math.isnan(summary["final_train_loss"])
    assert math.isnan(summary["mean_loss_gap"])
    assert summary["mean_error_gap"] == pytest.approx(0.1)
    assert summary["best_test_step"] == 0


def test_summary_takes_one_optimizer_and_trial(history):
    with pytest.raises(ValueError, match="one optimizer and trial"):
        summarise(history.records)
    with pytest.raises(ValueError, match="no records to summarise"):
        summarise([])


def test_aggregate_is_the_mean_over_trials():
    trials = [{"a": 1.0, "best_test_step": 10}, {"a": 2.0, "best_test_step": 15}]
    assert aggregate(trials) == {"a": 1.5, "best_test_step": 12.5, "per_trial": trials}
    for bad in ([], [{"a": 1.0}, {"b": 1.0}]):
        with pytest.raises(ValueError, match="one or more trials of equal keys"):
            aggregate(bad)


def test_json_has_null_for_what_is_no_number(tmp_path):
    write_json(tmp_path / "summary.json", {"a": NAN, "b": [math.inf, 0.1], "c": {"d": 3}})
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text) == {"a": None, "b": [None, 0.1], "c": {"d": 3}}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_tracking_needs_neither_torch_nor_wandb():
    source = (Path(__file__).parents[2] / "dd" / "tracking" / "history.py").read_text()
    assert not re.search(r"^\s*(import|from) (torch|wandb|rich|matplotlib)", source, re.MULTILINE)


# Console


def printed(what):
    stream = io.StringIO()
    what(Console(file=stream, width=80))
    return stream.getvalue()


def test_table_sets_optimizers_side_by_side():
    trials = [{**summarise([record(), record(step=7)]), "seconds": 2.0, "steps_per_second": 3.5}]
    summaries = {"gd": aggregate(trials * 2), "dd": aggregate(trials * 2)}
    picture, notes = "out/[run]/train_vs_test.png", ["the step [0] is past the edge"]
    text = printed(lambda console: print_report(summaries, picture, notes, console))
    lines = text.splitlines()
    (row,) = [line for line in lines if "best test error" in line]
    assert row.count("0.3000 (step 0)") == 2
    assert any("GD" in line and "DD" in line for line in lines)
    assert "means over 2 trials" in text
    assert "note: the step [0] is past the edge" in text
    assert "picture: out/[run]/train_vs_test.png" in text
    assert max(map(len, lines)) <= 80


def test_more_optimizers_than_fit_are_tables_below_each_other():
    figures = aggregate([{**summarise([record()]), "seconds": 2.0, "steps_per_second": 3.5}])
    summaries = dict.fromkeys(["gd", "dd", "dd_half", "dd_pure"], figures)
    lines = printed(lambda console: print_report(summaries, console=console)).splitlines()
    assert sum("final error, train/test" in line for line in lines) == 2
    assert any("GD" in line and "DD HALF" in line for line in lines)
    (row,) = [line for line in lines if "DD PURE" in line]
    assert "GD" not in row
    assert max(map(len, lines)) <= 80


def test_table_says_where_there_is_no_number():
    text = printed(lambda console: console.print(comparison({"dd": {"mean_loss_gap": NAN}})))
    (row,) = [line for line in text.splitlines() if "| loss" in line]
    assert re.search(r"\s-\s*$", row.rsplit("loss", 1)[1])
    assert "nan" not in text


def test_progress_shows_step_and_errors_without_a_terminal():
    def train(console):
        with ProgressDisplay(console) as progress:
            first, second = progress.start("gd", "gd", 200), progress.start("dd", "dd", 200)
            progress.update(first, record(step=200, train=(0, 0.001), test=(0, 0.199)))
            progress.update(second, record(step=40, train=(0, 0.25), test=(0, 0.26)))

    text = printed(train)
    assert re.search(r"gd .*200/200 .*0\.001 .*0\.199", text)
    assert re.search(r"dd .* 40/200 .*0\.250 .*0\.260", text)
    assert max(map(len, text.splitlines())) <= 80


def test_progress_stops_when_training_raises():
    stream = io.StringIO()
    display = ProgressDisplay(Console(file=stream, width=80))
    with pytest.raises(RuntimeError), display:
        raise RuntimeError
    assert not display._progress.live.is_started
