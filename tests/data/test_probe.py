"""A user's own features and labels: files, splits, and runs without a test set."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dd.data import probe
from dd.data.reading import DataWarning
from dd.experiments.assembly import make_split
from dd.runs.results import Results
from dd.tracking.console import comparison, methods
from tests.composed import composed, ran

SMALL = [
    "experiment=probe",
    "optimizers=[gd,gd_holdout,dd,dd_auto]",
    "available.gd_holdout.selection.lr_factors=[1]",
    "available.gd_holdout.selection.weight_decays=[0]",
    "steps=4",
    "model.width=4",
    "tracking.progress=false",
    "tracking.wandb.mode=disabled",
]


def samples(n=60, d=5, seed=0):
    """Two classes whose means differ, on scales of their own, far from zero."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, n)
    features = generator.normal(size=(n, d)) + 2 * labels[:, None]
    return 3.0 + features * np.arange(1, d + 1), labels


def saved(folder, **arrays):
    path = folder / "features.npz"
    np.savez(path, **arrays)
    return path


def csv_file(folder, header, rows, name="features.csv"):
    path = folder / name
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def table_rows(features, labels):
    return [[*row, label] for row, label in zip(features, labels, strict=True)]


HEADER = ["f0", "f1", "f2", "f3", "f4", "label"]


# --- Files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("features", "labels"), ("X", "y")])
def test_npz_is_standardised_by_coordinate(tmp_path, names):
    features, labels = samples()
    split = probe(path=saved(tmp_path, **dict(zip(names, (features, labels), strict=True))))
    expected = (features - features.mean(0)) / features.std(0)
    np.testing.assert_allclose(split.train_inputs.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert split.train_targets.tolist() == labels.tolist()
    assert torch.equal(split.train_components, split.train_targets)
    assert not split.is_tested


@pytest.mark.parametrize(
    "names",
    [
        ("train_features", "train_labels", "test_features", "test_labels"),
        ("X_train", "y_train", "X_test", "y_test"),
    ],
)
def test_npz_with_test_samples_is_scaled_by_the_training_samples(tmp_path, names):
    features, labels = samples()
    more, their = samples(30, seed=1)
    arrays = dict(zip(names, (features, labels, more, their), strict=True))
    split = probe(path=saved(tmp_path, **arrays))
    expected = (more - features.mean(0)) / features.std(0)
    np.testing.assert_allclose(split.test_inputs.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert split.test_targets.tolist() == their.tolist()


def test_csv_and_parquet_are_read_as_npz_is(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    features, labels = samples()
    plain = probe(path=saved(tmp_path, features=features, labels=labels))
    columns = dict(zip(HEADER, [*features.T, labels], strict=True))
    parquet.write_table(pyarrow.table(columns), tmp_path / "features.parquet")
    paths = [
        csv_file(tmp_path, HEADER, table_rows(features, labels)),
        tmp_path / "features.parquet",
    ]
    for path in paths:
        split = probe(path=path)
        torch.testing.assert_close(split.train_inputs, plain.train_inputs)
        assert torch.equal(split.train_targets, plain.train_targets)


def test_columns_of_a_table_are_chosen(tmp_path):
    pytest.importorskip("pyarrow")
    features, labels = samples()
    rows = [[f"id{i}", *row] for i, row in enumerate(table_rows(features, labels))]
    path = csv_file(tmp_path, ["id", *HEADER[:-1], "species"], rows)
    split = probe(path=path, label="species", drop=["id", "f4"])
    assert split.dimension == 4
    with pytest.raises(
        ValueError, match=r"columns 'id' hold no numbers but text.*data\.drop=\[id\]"
    ):
        probe(path=path, label="species")


def test_classes_are_numbered_by_their_sorted_names(tmp_path):
    features, labels = samples()
    names = np.array(["cat", "dog"])[labels]
    split = probe(path=saved(tmp_path, features=features, labels=names))
    assert split.train_targets.tolist() == labels.tolist()
    split = probe(path=saved(tmp_path, features=features, labels=labels * 10 + 7))
    assert split.train_targets.tolist() == labels.tolist()


def test_truth_values_are_labels(tmp_path):
    features, labels = samples()
    split = probe(path=saved(tmp_path, features=features, labels=labels.astype(bool)))
    assert split.train_targets.tolist() == labels.tolist()


def test_test_classes_have_the_numbers_of_the_training_classes(tmp_path):
    features, _ = samples()
    names = np.array(["ant", "bee", "cat"])[np.arange(60) % 3]
    arrays = {"X_train": features, "y_train": names, "X_test": features[:4] + 1}
    split = probe(path=saved(tmp_path, **arrays, y_test=np.array(["cat", "bee", "cat", "cat"])))
    assert split.test_targets.tolist() == [2, 1, 2, 2]


# --- Test samples ----------------------------------------------------------------------------


@given(share=st.floats(0.05, 0.9), seed=st.integers(0, 50))
@settings(deadline=None, max_examples=25)
def test_share_is_taken_of_every_class(tmp_path_factory, share, seed):
    features, labels = samples(100)
    path = saved(tmp_path_factory.mktemp("share"), features=features, labels=labels)
    split = probe(path=path, test_share=share, seed=seed)
    assert len(split.test_targets) == round(share * 100)
    assert len(split.train_targets) + len(split.test_targets) == 100
    for label in (0, 1):
        expected = share * int((labels == label).sum())
        assert abs(int((split.test_targets == label).sum()) - expected) <= 1.5


def test_shares_of_two_seeds_differ_and_share_no_sample(tmp_path):
    features, labels = samples(100)
    path = saved(tmp_path, features=features, labels=labels)
    first, other = (probe(path=path, test_share=0.3, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.test_targets, other.test_targets)
    raw = torch.cat([first.train_inputs, first.test_inputs])
    assert len(raw.unique(dim=0)) == 100


def test_another_file_to_test_on(tmp_path):
    features, labels = samples()
    path = saved(tmp_path, features=features, labels=labels)
    (tmp_path / "test").mkdir()
    other = saved(tmp_path / "test", features=features[:7], labels=labels[:7])
    with pytest.warns(DataWarning, match="7 of 7 test samples equal a training sample"):
        split = probe(path=path, test_path=other)
    torch.testing.assert_close(split.test_inputs, split.train_inputs[:7])


def test_training_samples_are_drawn_by_the_seed(tmp_path):
    features, labels = samples()
    path = saved(tmp_path, features=features, labels=labels)
    first, again, other = (probe(path=path, num_train=40, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.train_inputs, again.train_inputs)
    assert not torch.equal(first.train_targets, other.train_targets)


# --- Bad input -------------------------------------------------------------------------------

FEATURES, LABELS = samples()


def changed(values, row, column, value):
    copy = values.copy()
    copy[row, column] = value
    return copy


BAD_ARRAYS = {
    "no arrays of these names": (
        {"data": FEATURES},
        r"must hold the arrays features and labels.*holds data",
    ),
    "not numbers": (
        {"features": FEATURES.astype(str), "labels": LABELS},
        r"features must be numbers, got data type",
    ),
    "images": (
        {"features": FEATURES.reshape(60, 5, 1), "labels": LABELS},
        r"shape \(samples, dimension\).*got \(60, 5, 1\)",
    ),
    "too few labels": (
        {"features": FEATURES, "labels": LABELS[:-1]},
        r"one label for each of 60 samples, got shape \(59,\)",
    ),
    "missing value": (
        {"features": changed(FEATURES, 3, 1, np.nan), "labels": LABELS},
        r"1 that are missing.*row 3 column 1, counted from 0",
    ),
    "overflow in single precision": (
        {"features": changed(FEATURES, 3, 1, 1e300), "labels": LABELS},
        r"beyond 3\.4e38",
    ),
    "regression": (
        {"features": FEATURES, "labels": FEATURES[:, 0]},
        r"labels must name classes, .* got 60 different values",
    ),
    "one class": ({"features": FEATURES, "labels": np.zeros(60)}, r"all labels are 0\.0"),
    "test features of another dimension": (
        {"X_train": FEATURES, "y_train": LABELS, "X_test": FEATURES[:, :4], "y_test": LABELS},
        r"X_test has 4 features a sample",
    ),
    "unknown test class": (
        {"X_train": FEATURES, "y_train": LABELS, "X_test": FEATURES, "y_test": LABELS + 1},
        r"X_test has labels 2, which the training samples have not",
    ),
    "constant features": (
        {"features": np.ones((60, 5)), "labels": LABELS},
        r"all equal and cannot be standardised",
    ),
}


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_bad_arrays(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        probe(path=saved(tmp_path, **arrays))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test_share": 1.0}, r"data\.test_share must be a number between 0 and 1"),
        ({"test_share": 0.001}, r"leaves some of 60 samples"),
        ({"test_share": "half"}, r"got 'half'"),
        ({"num_train": 61}, r"num_train.*60"),
        ({"num_train": 0}, r"num_train"),
        ({"scaling": "rank"}, r"scaling must be one of coordinate, global"),
        ({"drop": ["f0"]}, r"no column 'f0' but '0', '1'.*correct data\.drop"),
        ({"keep": ["7"]}, r"no column '7' but .*correct data\.keep"),
        ({"seed": -1}, r"seed"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        probe(path=saved(tmp_path, features=FEATURES, labels=LABELS), **settings)


def test_test_samples_of_two_places(tmp_path):
    path = saved(tmp_path, X_train=FEATURES, y_train=LABELS, X_test=FEATURES, y_test=LABELS)
    with pytest.raises(ValueError, match=r"come from one place: .*data\.path \(given\)"):
        probe(path=path, test_share=0.2)


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (["a", "b"], [[1, 0], [2, 1]], r"no column 'label', only 'a', 'b'.*data\.label"),
        (["a", "a", "label"], [[1, 1, 0]], r"more than one column 'a'"),
        (["label"], [[0], [1]], r"0 columns of features beside 'label'"),
        (["a", "label"], [[1, 0], ["", 1], [2, 1], [3, 0]], r"row 1 'a'"),
        (
            ["a", "label"],
            [[1, 0], [2, ""], [2, 1]],
            r"'label': 1 of 3 rows have no label but '' \(rows 1,",
        ),
        (["a", "label"], [[1, 0], [2]], r"cannot be read as a table"),
    ],
)
def test_bad_tables(tmp_path, header, rows, message):
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=message):
        probe(path=csv_file(tmp_path, header, rows))


@pytest.mark.parametrize("content", [b"", b"PAR1 but not really", b"PK\x03\x04 cut short"])
@pytest.mark.parametrize("name", ["features.npz", "features.parquet"])
def test_damaged_files(tmp_path, name, content):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"features\.(npz|parquet) cannot be"):
        probe(path=tmp_path / name)


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path=\.\.\. must name a file"):
        probe()
    with pytest.raises(FileNotFoundError, match=r"does not exist; point data\.path"):
        probe(path=tmp_path / "missing.npz")
    with pytest.raises(FileNotFoundError, match=r"is a folder, not a file"):
        probe(path=tmp_path)
    (tmp_path / "features.txt").write_text("1 2 3")
    with pytest.raises(ValueError, match=r"name must end in \.npz, \.csv or \.parquet"):
        probe(path=tmp_path / "features.txt")


def test_a_table_without_its_reader_says_what_to_install(tmp_path, monkeypatch):
    path = csv_file(tmp_path, HEADER, table_rows(FEATURES, LABELS))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RuntimeError, match=r"pip install 'decoupled-descent\[tables\]'"):
        probe(path=path)


# --- Runs ------------------------------------------------------------------------------------


def ran_small(folder, *overrides):
    return ran(folder, *SMALL, *overrides)


def test_run_without_a_test_set_says_what_it_would_have_reported(tmp_path):
    path = saved(tmp_path, features=FEATURES, labels=LABELS)
    experiment = ran_small(tmp_path / "run", f"data.path={path}")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name in ("gd", "gd_holdout", "dd", "dd_auto"):
        found = summary[name]
        assert 0 <= found["reported_error"] <= 1
        for key in ("reported_test_error", "reported_gap", "best_test_error", "best_test_step"):
            assert found[key] is None
    assert (tmp_path / "run" / "train_vs_test.png").stat().st_size > 0
    cells = [list(column.cells) for column in methods(experiment.summary).columns]
    assert cells[1] == cells[3] == ["-"] * 4
    assert "-" not in cells[2]
    words = [
        str(cell) for column in comparison(experiment.summary).columns for cell in column.cells
    ]
    assert not any("nan" in word or "step 0" in word for word in words)


def test_run_with_a_share_to_test_on(tmp_path):
    path = saved(tmp_path, features=FEATURES, labels=LABELS)
    experiment = ran_small(tmp_path / "run", f"data.path={path}", "data.test_share=0.25")
    for found in experiment.summary.values():
        assert 0 <= found["reported_test_error"] <= 1
    assert experiment.summary["gd_holdout"]["samples"] == 36


def test_what_was_read_is_told_first_and_kept(tmp_path):
    rows = [[i, *row] for i, row in enumerate(table_rows(FEATURES, LABELS))]
    path = csv_file(tmp_path, ["", *HEADER], [*rows, [60, *rows[0][1:]]])
    settings = [f"data.path={path}", "data.test_share=0.3", "optimizers=[gd]", "seed=1"]
    command = [sys.executable, "-m", "dd", *SMALL[:1], *SMALL[4:], *settings]
    command += [f"hydra.run.dir={tmp_path / 'run'}"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)  # noqa: S603
    assert found.returncode == 0, found.stderr
    first = found.stdout.splitlines()[0]
    assert first.startswith("read from")
    told = " ".join(found.stdout.split())
    assert "columns left out Unnamed: 0 (row numbers, 0 to 60)" in told
    data = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]
    assert data["left_out"] == {"Unnamed: 0": "row numbers, 0 to 60"}
    assert data["train_samples"] + data["test_samples"] == 61
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What was read" in page
    assert "Unnamed: 0 (row numbers, 0 to 60)" in page
    assert page.index("What was read") < page.index("The answer")
    assert "DataWarning" not in found.stdout + found.stderr


def test_samples_on_both_sides_are_a_note_of_the_run(tmp_path):
    features, labels = np.concatenate([FEATURES] * 2), np.concatenate([LABELS] * 2)
    path = saved(tmp_path, features=features, labels=labels)
    with pytest.warns(DataWarning, match="equal a training sample"):
        experiment = ran_small(
            tmp_path / "run", f"data.path={path}", "data.test_share=0.3", "optimizers=[gd]"
        )
    assert any("equal a training sample" in note for note in experiment.notes)
    assert experiment.results.data["doubts"]
    assert Results.restored(experiment.results.state_dict()).data == experiment.results.data


def test_command_names_the_setting_that_is_missing(tmp_path):
    command = [sys.executable, "-m", "dd", *SMALL, f"hydra.run.dir={tmp_path / 'run'}"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)  # noqa: S603
    assert found.returncode == 1
    assert found.stderr.startswith("error: data.path=... must name a file of features and labels")
    assert "Traceback" not in found.stderr


def test_relative_paths_are_those_of_the_shell(tmp_path, monkeypatch):
    saved(tmp_path, features=FEATURES, labels=LABELS)
    monkeypatch.chdir(tmp_path)
    config = composed(*SMALL, "data.path=features.npz")
    assert len(make_split(config).train_targets) == 60
