"""Features on one scale: constants, rounding, and the ends of floating point."""

import numpy as np
import pytest
import torch

from dd.data import probe
from dd.data.constant import constant_columns
from dd.data.standardise import SCALINGS, standardise

N = 120
NOISE = np.random.default_rng(0).normal(size=N)
SHARES = np.random.default_rng(0).uniform(size=(N, 9)).astype(np.float32)


def is_constant(values):
    (found,) = constant_columns(np.asarray(values, dtype=np.float64)[:, None])
    return bool(found)


def single(values):
    """What a file of single precision holds."""
    return np.asarray(values).astype(np.float32)


CONSTANTS = {
    "one number": np.full(N, 14.62),
    "a few units of single precision": single(14.62 + 1e-6 * NOISE),
    "the same around a power of two": single(16 + 1e-6 * NOISE),
    "the same as text": [float(f"{v:.6f}") for v in single(14.62 + 1e-6 * NOISE)],
    "shortest text": [float(str(v)) for v in single(14.62 + 1e-6 * NOISE)],
    "shares that sum to one": (SHARES / SHARES.sum(1, keepdims=True)).sum(1),
    "a few units of double precision": 0.1 + 2e-17 * np.round(NOISE),
    "tenths in two ways": np.where(NOISE > 0, 0.1 + 0.2, 0.3),
    "large and single": single(3e8 + 20 * NOISE),
}


@pytest.mark.parametrize("values", CONSTANTS.values(), ids=CONSTANTS)
def test_what_varies_by_rounding_alone_is_constant(values):
    assert is_constant(values)


VARYING = {
    "noise": NOISE,
    "small noise": 1e-30 * NOISE,
    "denormal": 1e-310 * NOISE,
    "one that differs": np.r_[np.ones(N - 1), 2.0],
    "seconds within a minute": 1.7e9 + 10 * NOISE,
    "seconds as whole numbers": np.round(1.7e9 + 10 * NOISE),
    "dates": 20230101.0 + np.arange(N) % 28,
    "whole numbers a unit apart": 2.0**30 + np.arange(N) % 2,
    "halves of large numbers": 1e6 + 0.5 * (np.arange(N) % 3),
    "a thousand units of single precision": single(14.62 + 1e-3 * NOISE),
    "years in half precision": (2000 + np.arange(N) % 20).astype(np.float16),
}


@pytest.mark.parametrize("values", VARYING.values(), ids=VARYING)
def test_what_varies_more_is_not(values):
    assert not is_constant(values)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_constants_are_zero_in_all_rows(scaling):
    train = torch.from_numpy(np.stack([NOISE, single(14.62 + 1e-6 * NOISE)], axis=1))
    test = train.clone()
    test[0, 1] = 14.7
    inputs, test_inputs, _ = standardise(train, test, scaling)
    assert (inputs[:, 1] == 0).all()
    assert (test_inputs[:, 1] == 0).all()
    torch.testing.assert_close(inputs[:, 0].square().mean(), torch.tensor(1.0))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e-40, 1.0, 1e38, 1e200])
def test_every_scale_is_the_same(scaling, scale):
    train = torch.from_numpy(np.random.default_rng(1).normal(size=(N, 3)))
    # Denormal numbers keep the digits that are left: at 1e-310 thirteen.
    found, _, _ = standardise(scale * train, train[:0], scaling)
    expected, _, _ = standardise(train, train[:0], scaling)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_rows_beyond_single_precision_are_an_error():
    train = torch.from_numpy(1e-30 * NOISE)[:, None]
    with pytest.raises(ValueError, match=r"1 test samples are beyond.*same units"):
        standardise(train, torch.tensor([[1e10], [0.0]]), "coordinate")


@pytest.mark.parametrize("origin", [0, 2**53, 2**60, -(2**62)])
@pytest.mark.parametrize("kind", ["npz", "csv", "parquet"])
def test_whole_numbers_keep_every_digit(tmp_path, origin, kind):
    """Of an integer beyond 2**53 double precision would lose the last digits."""
    steps = np.random.default_rng(0).integers(0, 50, size=N)
    values, labels = origin + steps, np.arange(N) % 2
    path = tmp_path / f"f.{kind}"
    if kind == "npz":
        np.savez(
            path, X=values[:, None], y=labels, X_test=values[:9, None] + 100, y_test=labels[:9]
        )
        settings = {}
    else:
        pyarrow = pytest.importorskip("pyarrow")
        write = {
            "csv": lambda t, p: pytest.importorskip("pyarrow.csv").write_csv(t, p),
            "parquet": lambda t, p: pytest.importorskip("pyarrow.parquet").write_table(t, p),
        }[kind]
        write(pyarrow.table({"a": values, "label": labels}), path)
        other = tmp_path / f"g.{kind}"
        write(pyarrow.table({"a": values[:9] + 100, "label": labels[:9]}), other)
        settings = {"test_path": other}
    split = probe(path=path, **settings)
    expected = (steps - steps.mean()) / steps.std()
    np.testing.assert_allclose(split.train_inputs[:, 0], expected, rtol=1e-6, atol=1e-6)
    shifted = expected[:9] + 100 / steps.std()
    np.testing.assert_allclose(split.test_inputs[:, 0], shifted, rtol=1e-6, atol=1e-6)


def test_moments_of_large_times_keep_their_digits(tmp_path):
    times = 1.7e9 + 1e-3 * NOISE
    np.savez(tmp_path / "f.npz", X=times[:, None], y=np.arange(N) % 2)
    split = probe(path=tmp_path / "f.npz")
    expected = (NOISE - NOISE.mean()) / NOISE.std()
    # A unit of double precision there is 2.4e-7, of a deviation of 1e-3.
    np.testing.assert_allclose(split.train_inputs[:, 0], expected, atol=1e-3)
