"""Tables are read as their authors meant them, and what was read is told."""

import decimal
import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from dd.data import probe
from dd.data.reading import DataWarning, described
from dd.tracking.console import print_reading

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

N = 60
CLASSES = np.arange(N) % 3
WORDS = np.array(["ant", "bee", "cat"])[CLASSES]


def features(seed=0, n=N):
    return np.random.default_rng(seed).normal(size=(n, 3)).round(6)


A, B = features(0), features(1)


def written(path, columns, separator=",", decimal="."):
    """A file of text, cells as they are."""
    rows = zip(*(map(str, column) for column in columns.values()), strict=True)
    lines = [separator.join(map(str, columns)), *(separator.join(row) for row in rows)]
    path.write_text("\n".join(lines).replace(".", decimal) + "\n", encoding="utf-8")
    return path


def columns(values=A, labels=WORDS, **first):
    return {**first, **dict(zip("abc", values.T.tolist(), strict=True)), "label": labels}


def table(path, **content):
    parquet.write_table(pa.table(content), path)
    return path


def read(folder, content, **settings):
    return probe(path=written(folder / "train.csv", content), **settings)


# --- Columns that are no features ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "why"),
    [
        ("", range(N), "row numbers, 0 to 59"),
        ("anything", range(7, N + 7), "row numbers, 7 to 66"),
        ("shuffled", np.random.default_rng(0).permutation(N), "row numbers"),
        ("Unnamed: 0", range(0, 3 * N, 3), "an index"),
        ("sample_id", np.random.default_rng(0).permutation(5 * N)[:N], "an identifier"),
        ("PassengerId", range(0, 2 * N, 2), "an identifier"),
        ("", [f"row {i}" for i in range(N)], "row names"),
        ("", [""] * N, "empty"),
    ],
)
def test_what_tells_rows_apart_is_no_feature(tmp_path, name, values, why):
    split = read(tmp_path, {name: values, **columns()})
    assert split.dimension == 3
    ((left_out, reason),) = split.reading.left_out.items()
    assert left_out == (name or "Unnamed: 0")
    assert reason.startswith(why)


def test_a_column_that_is_meant_can_be_kept(tmp_path):
    split = read(tmp_path, columns(id=range(N)), keep=["id"])
    assert (split.dimension, split.reading.left_out) == (4, {})


@pytest.mark.parametrize("values", [np.arange(N) % 7, np.arange(N) + 0.5, 2 * np.arange(N)])
def test_other_columns_stay(tmp_path, values):
    assert read(tmp_path, columns(level=values)).dimension == 4


def test_few_rows_may_count_by_chance(tmp_path):
    content = {"small": [2, 0, 1, 3, 4, 5], "label": [0, 1] * 3}
    assert read(tmp_path, content).dimension == 1


def test_a_column_without_a_name_is_not_guessed(tmp_path):
    with pytest.raises(ValueError, match=r"'Unnamed: 0' has no name.*data\.drop=\['Unnamed: 0'\]"):
        read(tmp_path, {"": A[:, 0] + 0.5, **columns()})
    assert read(tmp_path, {"": A[:, 0] + 0.5, **columns()}, drop=["Unnamed: 0"]).dimension == 3


def test_an_identifier_that_repeats_is_told(tmp_path):
    split = read(tmp_path, columns(user_id=np.arange(N) % 7))
    assert split.dimension == 4
    assert "'user_id' has the name of an identifier" in " ".join(split.reading.notes)


def test_order_that_tells_the_labels_is_doubted(tmp_path):
    rising = np.cumsum(1 + np.arange(N) % 5)
    with pytest.warns(DataWarning, match=r"sorted by their labels, and 'when' by row"):
        read(tmp_path, columns(labels=np.sort(WORDS), when=rising))
    assert read(tmp_path, columns(when=rising)).reading.doubts == []


@pytest.mark.parametrize("kind", ["index", "__index_level_0__"])
def test_the_index_of_a_pandas_table_is_no_feature(tmp_path, kind):
    content = pa.table({"a": A[:, 0], kind: A[:, 1], "label": CLASSES})
    metadata = {b"pandas": json.dumps({"index_columns": [kind]}).encode()}
    parquet.write_table(content.replace_schema_metadata(metadata), tmp_path / "t.parquet")
    split = probe(path=tmp_path / "t.parquet")
    assert split.reading.left_out == {kind: "the index of a pandas table"}
    # A range is described, and no column.
    metadata = {b"pandas": json.dumps({"index_columns": [{"kind": "range"}]}).encode()}
    plain = pa.table({"a": A[:, 0], "label": CLASSES}).replace_schema_metadata(metadata)
    parquet.write_table(plain, tmp_path / "t.parquet")
    assert probe(path=tmp_path / "t.parquet").dimension == 1


def test_row_numbers_of_arrays_are_no_features(tmp_path):
    np.savez(tmp_path / "f.npz", X=np.c_[A, np.arange(N)], y=CLASSES)
    split = probe(path=tmp_path / "f.npz")
    assert split.reading.left_out == {"3": "row numbers, 0 to 59"}
    assert probe(path=tmp_path / "f.npz", keep=[3]).dimension == 4
    assert probe(path=tmp_path / "f.npz", drop=[0, 1]).dimension == 1
    np.savez(tmp_path / "f.npz", X=np.arange(N)[:, None], y=CLASSES)
    with pytest.raises(ValueError, match=r"has no feature \('0': row numbers.*data\.keep"):
        probe(path=tmp_path / "f.npz")


# --- Two files -------------------------------------------------------------------------------


def test_columns_are_matched_by_name(tmp_path):
    content = columns(B)
    same = written(tmp_path / "same.csv", content)
    other = written(tmp_path / "other.csv", dict(reversed(content.items())))
    expected = read(tmp_path, columns(), test_path=same)
    found = read(tmp_path, columns(), test_path=other)
    assert torch.equal(found.test_inputs, expected.test_inputs)
    assert torch.equal(found.test_targets, expected.test_targets)


def test_columns_of_arrays_are_matched_by_name(tmp_path):
    names = np.array(["a", "b", "c"])
    np.savez(tmp_path / "f.npz", X=A, y=CLASSES, feature_names=names)
    np.savez(tmp_path / "g.npz", X=B[:, ::-1], y=CLASSES, feature_names=names[::-1])
    np.savez(tmp_path / "h.npz", X=B, y=CLASSES)
    by_name, by_place = (
        probe(path=tmp_path / "f.npz", test_path=tmp_path / name) for name in ("g.npz", "h.npz")
    )
    assert torch.equal(by_name.test_inputs, by_place.test_inputs)


@pytest.mark.parametrize("index_of", ["train", "test", "both"])
def test_an_index_of_one_file_alone_is_no_difference(tmp_path, index_of):
    index = {"": range(N)}
    train = {**(index if index_of != "test" else {}), **columns()}
    test = {**(index if index_of != "train" else {}), **columns(B)}
    split = read(tmp_path, train, test_path=written(tmp_path / "test.csv", test))
    plain = read(tmp_path, columns(), test_path=written(tmp_path / "test.csv", columns(B)))
    assert torch.equal(split.test_inputs, plain.test_inputs)


def test_what_a_test_file_alone_leaves_out_is_told(tmp_path):
    path = written(tmp_path / "test.csv", {"": range(N), **columns(B)})
    split = read(tmp_path, columns(), test_path=path)
    assert split.reading.left_out == {"Unnamed: 0": f"row numbers, 0 to 59, in {path} alone"}
    # What both leave out is told once.
    split = read(tmp_path, {"": range(7, N + 7), **columns()}, test_path=path)
    assert split.reading.left_out == {"Unnamed: 0": "row numbers, 7 to 66"}


@pytest.mark.parametrize("named", ["train", "test"])
def test_columns_with_and_without_names_are_matched_by_their_order_and_told(tmp_path, named):
    files = {each: tmp_path / f"{each}.npz" for each in ("train", "test")}
    for each, values in (("train", A), ("test", B)):
        names = {"feature_names": ["c", "b", "a"]} if each == named else {}
        np.savez(files[each], X=values, y=CLASSES, **names)
    split = probe(path=files["train"], test_path=files["test"])
    expected = (B - A.mean(0)) / A.std(0)
    np.testing.assert_allclose(split.test_inputs, expected, rtol=1e-5, atol=1e-6)
    (note,) = split.reading.notes
    unnamed = files["test" if named == "train" else "train"]
    pairs = "'0' as 'c', '1' as 'b'" if named == "train" else "'c' as '0', 'b' as '1'"
    assert f"by their order, as {unnamed}: X has no names for them: {pairs}" in note


@pytest.mark.parametrize("place", range(4))
def test_row_numbers_of_the_training_file_alone_cost_no_test_column(tmp_path, place):
    """Numbers of columns are names only where both files have the same columns."""
    numbered = np.insert(A, place, np.arange(N), axis=1)
    np.savez(tmp_path / "train.npz", X=numbered, y=CLASSES)
    np.savez(tmp_path / "test.npz", X=B, y=CLASSES)
    split = probe(path=tmp_path / "train.npz", test_path=tmp_path / "test.npz")
    expected = (B - A.mean(0)) / A.std(0)
    np.testing.assert_allclose(split.test_inputs, expected, rtol=1e-5, atol=1e-6)
    assert len(split.reading.notes) == (place < 3)
    # Where there is another column in that place, it is left out, and told.
    np.savez(tmp_path / "test.npz", X=np.insert(B, place, 0.5, axis=1), y=CLASSES)
    again = probe(path=tmp_path / "train.npz", test_path=tmp_path / "test.npz")
    assert torch.equal(again.test_inputs, split.test_inputs)
    np.savez(tmp_path / "test.npz", X=B[:, :2], y=CLASSES)
    few = rf"X has 2 features .*, .*X has 3 .* left out \('{place}': row numbers, 0 to 59\)"
    with pytest.raises(ValueError, match=few):
        probe(path=tmp_path / "train.npz", test_path=tmp_path / "test.npz")


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ({"a": A[:, 0], "label": WORDS}, r"no column 'b', 'c', which .*train\.csv has"),
        (columns(B, z=A[:, 0]), r"'z', which .*train\.csv has not; .*data\.drop=\[z\]"),
    ],
)
def test_columns_that_differ_are_named(tmp_path, test, message):
    path = written(tmp_path / "test.csv", test)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, columns(), test_path=path)


def test_what_one_file_has_in_excess_can_be_dropped(tmp_path):
    path = written(tmp_path / "test.csv", columns(B, z=A[:, 0]))
    assert read(tmp_path, columns(), test_path=path, drop=["z"]).dimension == 3


def test_samples_on_both_sides_are_told(tmp_path):
    path = written(tmp_path / "test.csv", columns(np.r_[A[:5], B[5:]]))
    with pytest.warns(DataWarning, match=r"5 of 60 test samples equal .* \(test rows 0, 1, 2"):
        split = read(tmp_path, columns(), test_path=path)
    assert len(split.reading.doubts) == 1
    twice = columns(np.r_[A, A], labels=np.r_[WORDS, WORDS])
    with pytest.warns(DataWarning, match="drop copies from the file"):
        read(tmp_path, twice, test_share=0.3)
    # Zero is zero, whatever its sign, and constant columns tell nothing.
    zero = A.copy()
    zero[:, 1] = 0.0
    path = written(tmp_path / "test.csv", columns(zero * np.array([1, -1, 1])))
    with pytest.warns(DataWarning, match="60 of 60 test samples"):
        read(tmp_path, columns(zero), test_path=path)


def test_equal_draws_of_few_values_are_no_copies(tmp_path):
    dice = np.random.default_rng(0).integers(0, 3, size=(200, 3))
    labels = ["x", "y"] * 100
    split = read(tmp_path, columns(dice, labels), test_share=0.3)
    rows = [set(map(tuple, each.tolist())) for each in (split.train_inputs, split.test_inputs)]
    assert rows[0] & rows[1]
    assert split.reading.doubts == []


@pytest.mark.parametrize("factor", [255.0, 1 / 255])
def test_other_units_are_told(tmp_path, factor):
    path = written(tmp_path / "test.csv", columns(B * factor))
    with pytest.warns(DataWarning, match="are both in the same units"):
        read(tmp_path, columns(), test_path=path)


# --- Labels ----------------------------------------------------------------------------------

MISSING = ["", " ", "NA", "nan", "NaN", "None", "null", "?", "<NA>", "-"]


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("others", [["ant", "bee"], ["0", "1"]])
def test_no_label_is_no_class(tmp_path, missing, others):
    labels = np.array([*others, missing])[CLASSES]
    with pytest.raises(ValueError, match=r"20 of 60 rows have no label.*rows 2, 5"):
        read(tmp_path, columns(labels=labels))


def test_minus_is_a_class_beside_plus(tmp_path):
    labels = np.array(["+", "-"])[np.arange(N) % 2]
    assert list(read(tmp_path, columns(labels=labels)).reading.classes) == ["+", "-"]


@pytest.mark.parametrize(
    "labels",
    [
        pa.array(["x", None, "y"] * 20),
        pa.array(["x", None, "y"] * 20).dictionary_encode(),
        pa.array([0.0, np.nan, 1.0] * 20),
        pa.array([0, None, 1] * 20),
        pa.array(["x", "", "y"] * 20),
    ],
)
def test_no_label_of_a_typed_table_is_no_class(tmp_path, labels):
    with pytest.raises(ValueError, match="20 of 60 rows have no"):
        probe(path=table(tmp_path / "t.parquet", a=A[:, 0], label=labels))


def test_categories_are_what_they_are_called(tmp_path):
    words = pa.array(WORDS.tolist()).dictionary_encode()
    numbers = pa.array((CLASSES * 10 + 5).tolist()).dictionary_encode()
    # In an order of their own, with one that no row has.
    reversed_ = pa.DictionaryArray.from_arrays(2 - CLASSES, ["cat", "bee", "ant", "dog"])
    for labels, names in ((words, WORDS), (numbers, CLASSES * 10 + 5), (reversed_, WORDS)):
        split = probe(path=table(tmp_path / "t.parquet", a=A[:, 0], label=labels))
        assert split.train_targets.tolist() == CLASSES.tolist()
        assert list(split.reading.classes) == np.unique(names).astype(str).tolist()


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (["0", "1"], ["0.0", "1.0"]),
        (["0", "1"], ["false", "true"]),
        (["False", "True"], ["0", "1"]),
        (["0.0", "1.0"], ["0", "1"]),
        (["00", "01"], ["0", "1"]),
        (["0", "1"], ["00", "01"]),
        (["no", "yes"], [" no", "yes "]),
        (["1", "2", "x"], ["1", "2"]),
        (["10", "9"], ["10", "9"]),
    ],
)
def test_classes_are_what_is_written(tmp_path, train, test):
    labels = [np.array(each)[np.arange(N) % len(each)] for each in (train, test)]
    path = written(tmp_path / "test.csv", columns(B, labels[1]))
    split = read(tmp_path, columns(labels=labels[0]), test_path=path)
    known = dict(zip(train, split.train_targets.tolist(), strict=False))
    expected = [known[train[test.index(each)]] for each in labels[1]]
    assert split.test_targets.tolist() == expected


def test_numbers_of_any_type_are_one_class(tmp_path):
    two = np.arange(N) % 2
    plain = probe(path=table(tmp_path / "a.parquet", a=A[:, 0], label=two))
    for labels in (two.astype(bool), two.astype(float), two.astype(np.uint8), two.astype(str)):
        path = table(tmp_path / "b.parquet", a=B[:, 0], label=labels)
        split = probe(path=tmp_path / "a.parquet", test_path=path)
        assert split.test_targets.tolist() == plain.train_targets.tolist()


def test_text_that_differs_is_two_classes(tmp_path):
    labels = np.array(["1", "1.0", "x"])[CLASSES]
    split = read(tmp_path, columns(labels=labels))
    assert split.num_classes == 3
    assert "labels '1', '1.0' are classes of their own" in split.reading.notes
    # Where all are numbers, these two are one.
    split = read(tmp_path, columns(labels=np.array(["1", "1.0", "2"])[CLASSES]))
    assert split.num_classes == 2
    # A code is no number.
    split = read(tmp_path, columns(labels=np.array(["1", "01", "2"])[CLASSES]))
    assert list(split.reading.classes) == ["01", "1", "2"]


def test_unknown_labels_name_both_types(tmp_path):
    path = written(tmp_path / "test.csv", columns(B, CLASSES))
    words = r"test\.csv.* labels 0, 1, 2.*are numbers, and those of .*are text: ant, bee, cat"
    with pytest.raises(ValueError, match=words):
        read(tmp_path, columns(), test_path=path)
    path = written(tmp_path / "test.csv", columns(B, np.char.upper(WORDS)))
    with pytest.raises(ValueError, match="other in upper and lower case alone"):
        read(tmp_path, columns(), test_path=path)


def test_a_class_is_on_both_sides_or_an_error(tmp_path):
    labels = np.where(np.arange(N) == 0, "zebra", WORDS)
    with pytest.raises(ValueError, match="class zebra would be tested on, and none trained on"):
        read(tmp_path, columns(labels=labels), test_share=0.5)
    with pytest.raises(ValueError, match=r"num_train=5 .* have none of class .*zebra"):
        read(tmp_path, columns(labels=labels), num_train=5)
    assert (
        "class 'zebra' has 1 training samples"
        in read(tmp_path, columns(labels=labels)).reading.notes
    )


# --- Numbers in text -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("separator", "decimal"),
    [(",", "."), (";", "."), ("\t", "."), ("|", "."), (";", ","), ("\t", ",")],
)
def test_separators_and_decimal_commas(tmp_path, separator, decimal):
    expected = read(tmp_path, columns())
    found = probe(path=written(tmp_path / "other.csv", columns(), separator, decimal))
    assert torch.equal(found.train_inputs, expected.train_inputs)
    assert found.train_targets.tolist() == expected.train_targets.tolist()


def test_quotes_spaces_line_ends_and_a_mark_of_the_encoding_change_nothing(tmp_path):
    expected = read(tmp_path, columns())
    plain = (tmp_path / "train.csv").read_text()
    changes = [
        plain.encode("utf-8-sig"),
        plain.replace("\n", "\r\n").encode(),
        plain.replace(",", " , ").encode(),
        "\n".join(
            ",".join(f'"{c}"' for c in line.split(",")) for line in plain.splitlines()
        ).encode(),
        b"\n\n" + plain.encode(),
    ]
    for content in changes:
        (tmp_path / "other.csv").write_bytes(content)
        found = probe(path=tmp_path / "other.csv")
        assert torch.equal(found.train_inputs, expected.train_inputs)
        assert list(found.reading.classes) == ["ant", "bee", "cat"]


def test_whole_numbers_may_be_followed_by_others(tmp_path):
    """Types are inferred a megabyte at a time."""
    n = 200_000
    values = [*(np.arange(n) % 1000).tolist(), 0.5]
    split = read(tmp_path, {"a": values, "label": np.arange(n + 1) % 2})
    assert (tmp_path / "train.csv").stat().st_size > 1 << 20
    assert len(split.train_targets) == n + 1


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ('"1,234.5"', r"column 'x' separates thousands, as in '1,234\.5'"),
        ('"1.234,5"', r"column 'x' separates thousands"),
        ('"1,234"', "may be a decimal point or separate thousands"),
        ("12%", "no numbers but text, such as '12%'; .*a column of 0 and 1 for each category"),
        ("2026-01-31", r"no numbers but dates or times; .*seconds since.*data\.drop=\[x\]"),
        ("red", "such as 'red'"),
        ("0xFFFFFFFFFFFFFFFF", "such as '0xFFFFFFFFFFFFFFFF'"),
        ("0x1f", "such as '0x1f'"),
    ],
)
def test_what_is_no_number_gets_a_remedy(tmp_path, cell, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, columns(x=[cell] * N))


@pytest.mark.parametrize("cell", ["", "NA", "NaN", "?", "-", "inf", "-inf", "1e400", "null"])
def test_a_missing_number_is_named(tmp_path, cell):
    values = [cell if row == 5 else row * 2.5 for row in range(N)]
    with pytest.raises(ValueError, match=r"1 that are missing, infinite or beyond .*row 5 'x'"):
        read(tmp_path, columns(x=values))
    with pytest.raises(ValueError, match=r"leave out columns without any, data\.drop=\[e\]"):
        read(tmp_path, columns(e=[""] * N))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("größe,label\n1,0\n".encode("latin-1"), r"f\.csv is not in UTF-8 \(byte 0xf6.*iconv"),
        ("a,label\n1,café\n".encode("latin-1"), r"f\.csv is not in UTF-8 \(byte 0xe9"),
        ("a,label\n1,0\n".encode("utf-16"), r"f\.csv is no text in UTF-8.*UTF-16"),
        (b"", r"f\.csv cannot be read as a table: it is empty"),
        (b"a,label\n", r"has 0 rows"),
        (b"1.5,2.5,0\n1.5,2.5,1\n", r"no column 'label'.*needs a line of names"),
        (b"a b label\n1 2 0\n", r"separated by commas, semicolons or tabs"),
        (b"a,Label\n1,0\n", r"data\.label=Label"),
    ],
)
def test_what_is_no_table_is_named_with_a_remedy(tmp_path, content, message):
    (tmp_path / "f.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        probe(path=tmp_path / "f.csv")


def test_a_file_without_names_loses_no_row(tmp_path):
    (tmp_path / "f.csv").write_text("1.5,2.5,0\n1.5,2.5,1\n" * 5)
    with pytest.raises(ValueError, match="looks like a row"):
        probe(path=tmp_path / "f.csv", label="0")
    # Columns that are numbered are none.
    assert read(tmp_path, dict(zip("0123", [*A.T.tolist(), CLASSES], strict=True)), label="3")


@pytest.mark.parametrize("origin", [2**53, 2**63, -(2**63) - 9, 2**64, 10**37])
@pytest.mark.parametrize("separator", [",", ";"])
def test_whole_numbers_of_any_size_keep_their_digits(tmp_path, origin, separator):
    values = np.random.default_rng(0).integers(0, 4, size=N)
    small = read(tmp_path, columns(x=values))
    large = [origin + int(value) for value in values]
    found = probe(path=written(tmp_path / "other.csv", columns(x=large), separator))
    assert torch.equal(found.train_inputs, small.train_inputs)
    assert found.reading.constant == []
    exact = pa.array([decimal.Decimal(each) for each in large], pa.decimal256(40))
    split = probe(path=table(tmp_path / "t.parquet", x=exact, label=WORDS))
    assert torch.equal(split.train_inputs[:, 0], small.train_inputs[:, 0])


def test_arrays_keep_the_digit_after_the_last_that_a_float_has(tmp_path):
    values = 2**53 + np.arange(N) % 2
    np.savez(tmp_path / "f.npz", X=values[:, None], y=CLASSES)
    inputs = probe(path=tmp_path / "f.npz").train_inputs[:, 0]
    assert inputs.tolist() == [-1.0, 1.0] * (N // 2)


@pytest.mark.parametrize(
    "labels",
    [
        [2**63, 2**63 + 1],
        [-1, 2**63, 2**63 + 1],
        [2**64, 2**64 + 1],
        ["9007199254740992", "9007199254740993", "1.0"],
        ["1e30", "1000000000000000000000000000001"],
    ],
)
def test_labels_keep_their_digits(tmp_path, labels):
    cells = [labels[row % len(labels)] for row in range(N)]
    path = written(tmp_path / "test.csv", columns(B, cells))
    split = read(tmp_path, columns(labels=cells), test_path=path)
    assert split.num_classes == len(labels)
    assert sorted(split.reading.classes) == sorted(map(str, labels))
    assert torch.equal(split.train_targets, split.test_targets)


def test_decimal_labels_keep_their_digits(tmp_path):
    cells = [decimal.Decimal(2**64 + n % 2) for n in range(N)]
    labels = pa.array(cells, pa.decimal128(25, 2))
    split = probe(path=table(tmp_path / "t.parquet", a=A[:, 0], label=labels))
    assert split.num_classes == 2


# --- Columns of other types ------------------------------------------------------------------


@pytest.mark.parametrize(
    "column",
    [
        pa.array(list(A)),
        pa.FixedSizeListArray.from_arrays(pa.array(A.ravel()), 3),
        pa.array(list(A), type=pa.large_list(pa.float64())),
        pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(A)),
    ],
)
def test_a_list_is_a_feature_for_each_entry(tmp_path, column):
    split = probe(path=table(tmp_path / "t.parquet", embedding=column, label=CLASSES))
    plain = read(tmp_path, columns(labels=CLASSES))
    assert torch.equal(split.train_inputs, plain.train_inputs)


def test_an_entry_of_a_list_can_be_left_out(tmp_path):
    path = table(tmp_path / "t.parquet", emb=pa.array(A.tolist()), label=CLASSES)
    split = probe(path=path, drop=["emb[1]"])
    assert split.dimension == 2
    assert split.reading.left_out == {"emb[1]": "data.drop"}
    expected = probe(path=path).train_inputs[:, [0, 2]]
    assert torch.equal(split.train_inputs, expected)


def test_an_entry_of_a_list_and_a_column_of_one_name_are_told(tmp_path):
    content = {"x": pa.array(A.tolist()), "x[0]": B[:, 0], "label": CLASSES}
    for columns in (content, dict(reversed(content.items()))):
        path = table(tmp_path / "t.parquet", **columns)
        with pytest.raises(ValueError, match=r"column 'x\[0\]' beside the lists of column 'x'"):
            probe(path=path)
    assert probe(path=path, drop=["x"]).dimension == 1


def test_lists_that_are_no_features_are_named(tmp_path):
    ragged = pa.array([[1.0, 2.0]] * (N - 1) + [[1.0]])
    with pytest.raises(ValueError, match=r"column 'x' holds lists of different lengths \(1, 2\)"):
        probe(path=table(tmp_path / "t.parquet", x=ragged, label=CLASSES))
    missing = pa.array([None, *A[1:].tolist()])
    with pytest.raises(ValueError, match=r"3 that are missing.*row 0 'x\[0\]'"):
        probe(path=table(tmp_path / "t.parquet", x=missing, label=CLASSES))
    with pytest.raises(ValueError, match=r"'x' hold no numbers but struct"):
        probe(path=table(tmp_path / "t.parquet", x=pa.array([{"p": 1}] * N), label=CLASSES))


def test_numbers_of_any_type_are_features(tmp_path):
    whole = np.random.default_rng(0).integers(0, 9, size=N)
    expected = probe(path=table(tmp_path / "t.parquet", x=whole.astype(float), label=CLASSES))
    kinds = [pa.int8(), pa.uint64(), pa.float32(), pa.decimal128(25, 2)]
    arrays = [pa.array(whole.astype("f2")), *(pa.array(whole).cast(kind) for kind in kinds)]
    for array in [*arrays, pa.array(whole).dictionary_encode()]:
        split = probe(path=table(tmp_path / "t.parquet", x=array, label=CLASSES))
        torch.testing.assert_close(split.train_inputs, expected.train_inputs)
    for array in (whole.astype(">f4"), whole.astype("f2"), whole.astype(">i8"), whole > 4):
        np.savez(tmp_path / "f.npz", X=np.asfortranarray(array[:, None]), y=CLASSES)
        split = probe(path=tmp_path / "f.npz")
        plain = array.astype(float)
        expected_inputs = (plain - plain.mean()) / plain.std()
        np.testing.assert_allclose(split.train_inputs[:, 0], expected_inputs, rtol=1e-6, atol=1e-6)


# --- Arrays ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": A, "y": np.eye(3)[CLASSES]}, r"\(one-hot\), save labels\.argmax\(1\)"),
        ({"X": A.T, "y": CLASSES}, r"save features\.T"),
        ({"X": A.reshape(N, 3, 1), "y": CLASSES}, r"features\.reshape\(len\(features\), -1\)"),
        ({"X": A + 1j, "y": CLASSES}, "real and imaginary parts"),
        ({"X": A.astype("M8[s]"), "y": CLASSES}, "write dates as numbers"),
        ({"X": A.astype(str), "y": CLASSES}, r"features\.astype\(float\)"),
        ({"X": A, "y": WORDS.astype(object)}, r"unpickled; labels\.astype\(str\)"),
        ({"X": A, "y": CLASSES, "features": A, "labels": CLASSES}, "save one pair"),
        ({"X": A, "y": CLASSES, "X_test": B}, r"holds X_test and no y_test; save both"),
        ({"data": A, "indices": A, "format": A, "shape": A}, r"sparse matrix.*toarray"),
        ({"X": A, "y": CLASSES, "feature_names": ["a", "b"]}, "must be 3 different names"),
        (
            {"X": A, "y": CLASSES, "feature_names": ["a", "a ", "b"]},
            r"3 different names, spaces around them apart, and has 'a' more than once",
        ),
        (
            {"X": A, "y": CLASSES, "feature_names": np.array([b"a", b"b", b"caf\xe9"])},
            r"f\.npz: feature_names: b'caf\\xe9' is not in UTF-8; .*np\.char\.decode",
        ),
        (
            {"X": A, "y": np.array([b"ant", b"bee", b"caf\xe9"])[CLASSES]},
            r"f\.npz: X: b'caf\\xe9' is not in UTF-8; .*np\.char\.decode",
        ),
    ],
)
def test_arrays_that_are_not_meant_so_get_a_remedy(tmp_path, arrays, message):
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        probe(path=tmp_path / "f.npz")


def test_bytes_in_utf8_are_text(tmp_path):
    words = np.array(["café".encode(), b"tea", b"water"])
    np.savez(tmp_path / "f.npz", X=A, y=words[CLASSES], feature_names=words)
    split = probe(path=tmp_path / "f.npz", drop=["café"])
    assert list(split.reading.classes) == ["café", "tea", "water"]
    assert split.reading.left_out == {"café": "data.drop"}


@pytest.mark.parametrize("shape", [(N, 1), (1, N)])
def test_labels_in_a_column_or_row_are_told(tmp_path, shape):
    np.savez(tmp_path / "f.npz", X=A, y=CLASSES.reshape(shape), meta=A)
    split = probe(path=tmp_path / "f.npz")
    assert split.train_targets.tolist() == CLASSES.tolist()
    said = " ".join(split.reading.notes)
    assert f"have shape {shape} and are read as (60,)" in said
    assert "not read: meta" in said


def test_test_arrays_go_with_any_names(tmp_path):
    np.savez(tmp_path / "f.npz", X=A, y=CLASSES, X_test=B, y_test=CLASSES)
    assert len(probe(path=tmp_path / "f.npz").test_targets) == N


# --- The table -------------------------------------------------------------------------------


def test_what_was_read_is_a_table(tmp_path):
    content = {"": range(N), **columns(), "[b]same": [3] * N}
    split = read(tmp_path, content, test_share=0.5, drop=["b"])
    rows = dict(described(json.loads(json.dumps(split.reading.as_dict()))))
    assert rows["samples"] == "30 to train, 30 to test"
    assert rows["features"] == "3"
    assert rows["columns left out"] == "b (data.drop), Unnamed: 0 (row numbers, 0 to 59)"
    assert rows["constant, set to 0"] == "[b]same"
    assert rows["missing values"] == "none"
    assert rows["classes: samples to train/test"] == "ant: 10/10, bee: 10/10, cat: 10/10"
    console = Console(width=200, record=True, file=io.StringIO())
    print_reading(split.reading.as_dict(), console)
    said = console.export_text()
    assert "[b]same" in said
    assert "Unnamed: 0 (row numbers" in said
