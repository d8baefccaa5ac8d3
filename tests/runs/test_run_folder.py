"""A run folder read back."""

import json
import math

import pytest

from dd.runs.folder import SELECTION_COLUMNS, read_run
from dd.runs.theory_file import COLUMNS as THEORY_COLUMNS
from dd.support.files import write_json
from dd.tracking.history import History, Record

ROW = Record("gd", 0, 0, 0.7, 0.71, 0.5, 0.51, 0.7, math.nan)


def write_folder(folder, summary=None):
    (folder / "config.yaml").write_text("name: xor\nseed: 3\n")
    History([ROW]).write_csv(folder / "history.csv")
    summary = summary or {"gd": {"steps": 0, "seconds": math.nan}, "experiment": "xor", "seed": 3}
    write_json(folder / "summary.json", summary)
    return folder


def test_what_a_run_wrote_is_read(tmp_path):
    run = read_run(write_folder(tmp_path))
    assert run.config.seed == 3
    assert run.optimizers == {"gd": {"steps": 0, "seconds": None}}
    assert run.provenance == {"experiment": "xor", "seed": 3}
    (record,) = run.history.records
    assert record.step == 0
    assert record.test_error == 0.51
    assert math.isnan(record.uncorrected_train_error)


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "history.csv"])
def test_a_missing_file_is_named(tmp_path, name):
    (write_folder(tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name}"):
        read_run(tmp_path)


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_run(tmp_path / "gone")


def test_a_summary_of_another_run_is_refused(tmp_path):
    write_folder(tmp_path, {"dd": {}, "experiment": "xor"})
    with pytest.raises(ValueError, match="lacks gd"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "{"),
        ("summary.json", json.dumps([1])),
        ("history.csv", ""),
        ("history.csv", "a,b\n"),
        ("config.yaml", "[1, 2]\n"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    (write_folder(tmp_path) / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        read_run(tmp_path)


def test_a_cut_line_is_named(tmp_path):
    path = write_folder(tmp_path) / "history.csv"
    path.write_text(path.read_text() + "gd,0,5,0.1\n")
    with pytest.raises(ValueError, match="line 3"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["selection.csv", "state_evolution.csv"])
@pytest.mark.parametrize("content", ["a,b\n", "{header}\ngd,x\n"])
def test_a_damaged_file_that_not_every_run_has_is_named(tmp_path, name, content):
    columns = {"selection.csv": SELECTION_COLUMNS, "state_evolution.csv": THEORY_COLUMNS}[name]
    (write_folder(tmp_path) / name).write_text(content.format(header=",".join(columns)))
    with pytest.raises(ValueError, match=name):
        read_run(tmp_path)


def test_a_summary_of_other_trials_is_refused(tmp_path):
    write_folder(tmp_path, {"gd": {"per_trial": [{}, {}]}, "experiment": "xor"})
    with pytest.raises(ValueError, match=r"has 2 trials of gd and history\.csv 1"):
        read_run(tmp_path)
