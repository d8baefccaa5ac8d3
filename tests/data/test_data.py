"""The data sets: what they hold, what decides it, and what happens to bad input."""

import functools
import gzip
import hashlib
import os
import struct
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from dd.data import Split, generator, noisy_mnist, xor
from dd.data.noisy_mnist import FILES
from dd.data.places import data_root

REPOSITORY = Path(__file__).resolve().parents[2]
TENSORS = ("train_inputs", "train_targets", "train_components", "test_inputs", "test_targets")


def equal(first: Split, second: Split) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in TENSORS)


# Seeds and streams


def test_a_stream_is_the_same_in_every_process():
    assert generator(3, "data").initial_seed() == 8612807319678281750


def test_streams_and_seeds_differ():
    seeds = {generator(s, name).initial_seed() for s in range(3) for name in ("data", "probe", "")}
    assert len(seeds) == 9


def test_streams_are_uncorrelated():
    n = 100_000
    first, second = (torch.randn(n, generator=generator(0, name)) for name in ("data", "probe"))
    assert abs(float(first @ second)) / n < 5 / n**0.5


@pytest.mark.parametrize("seed", [-1, 1.5, "0", None, True])
def test_a_seed_that_is_no_count_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be a non-negative integer, got"):
        generator(seed, "data")


def test_numpy_and_very_large_seeds_are_taken():
    assert generator(np.int64(7), "data").initial_seed() == generator(7, "data").initial_seed()
    assert generator(2**80, "data").initial_seed() != generator(0, "data").initial_seed()


# Split


def parts(**changes):
    good = {
        "train_inputs": torch.zeros(4, 3),
        "train_targets": torch.tensor([0, 1, 2, 0]),
        "train_components": torch.tensor([0, 1, 2, 3]),
        "test_inputs": torch.zeros(2, 3),
        "test_targets": torch.tensor([1, 0]),
    }
    return {**good, **changes}


def test_split_knows_its_sizes():
    split = Split(**parts())
    assert (split.dimension, split.num_classes) == (3, 3)
    assert Split(**parts(test_targets=torch.tensor([5, 0]))).num_classes == 6


def test_split_moves_as_a_whole():
    split = Split(**parts(train_components=None)).to("cpu")
    assert split.train_components is None
    assert equal(Split(**parts()).to(torch.device("cpu")), Split(**parts()))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"train_inputs": torch.zeros(4, 3, 1)}, ValueError, "train_inputs must have shape"),
        ({"train_inputs": torch.zeros(0, 3)}, ValueError, "train_inputs must have shape"),
        ({"train_inputs": torch.zeros(4, 3).double()}, TypeError, "must be float32, got"),
        ({"test_inputs": torch.full((2, 3), torch.nan)}, ValueError, "got 2 of 2 rows with NaN"),
        ({"test_inputs": torch.zeros(2, 4)}, ValueError, "3 columns of train_inputs, got 4"),
        ({"train_targets": torch.tensor([0, 1, 2])}, ValueError, "each of the 4 samples"),
        ({"train_targets": torch.zeros(4)}, TypeError, "train_targets must be int64"),
        ({"test_targets": torch.tensor([0, -1])}, ValueError, "integers from 0, got -1"),
        ({"train_components": torch.tensor([0])}, ValueError, "train_components must hold one"),
    ],
)
def test_split_refuses_what_does_not_fit(change, error, words):
    with pytest.raises(error, match=words):
        Split(**parts(**change))


# XOR


def test_xor_has_the_documented_shapes():
    split = xor(dimension=20, num_train=30, num_test=40)
    assert split.train_inputs.shape == (30, 20)
    assert split.test_inputs.shape == (40, 20)
    assert split.train_inputs.dtype == torch.float32
    assert split.num_classes == 2
    assert torch.equal(split.train_targets, split.train_components // 2)


def test_xor_clusters_are_equally_likely():
    n = 40_000
    counts = xor(dimension=2, num_train=n, num_test=1).train_components.bincount(minlength=4)
    assert (counts - n / 4).abs().max() < 5 * (n * 0.25 * 0.75) ** 0.5


def test_xor_means_are_two_orthogonal_axes():
    n, d, separation, noise = 40_000, 30, 1.7, 0.6
    split = xor(dimension=d, num_train=n, num_test=1, separation=separation, noise=noise)
    rows = [split.train_inputs[split.train_components == c] for c in range(4)]
    means = torch.stack([r.mean(0) for r in rows])
    a = separation**2
    expected = torch.tensor([[a, -a, 0, 0], [-a, a, 0, 0], [0, 0, a, -a], [0, 0, -a, a]])
    # A mean over n/4 samples is off by Gaussian noise of variance s² = noise²/(n/4) a coordinate:
    # an entry of the Gram matrix by up to 2·separation·s, and d s² on the diagonal.
    s = noise / (n / 4) ** 0.5
    bias = d * s**2 * torch.eye(4)
    assert (means @ means.T - expected - bias).abs().max() < 5 * 2 * separation * s


def test_xor_noise_is_isotropic():
    n, d, noise = 40_000, 10, 0.6
    split = xor(dimension=d, num_train=n, num_test=1, noise=noise)
    components = split.train_components
    means = torch.stack([split.train_inputs[components == c].mean(0) for c in range(4)])
    residual = (split.train_inputs - means[components]) / noise
    covariance = residual.T @ residual / n
    # Standard deviations of the entries are 1/√n off the diagonal and √2/√n on it.
    assert (covariance - torch.eye(d)).abs().max() < 5 * (2 / n) ** 0.5


def test_xor_test_set_has_the_distribution_of_the_training_set():
    n, d = 40_000, 10
    split = xor(dimension=d, num_train=n, num_test=n)
    moments = [
        inputs[targets == c].T @ inputs[targets == c] / (targets == c).sum()
        for inputs, targets in (
            (split.train_inputs, split.train_targets),
            (split.test_inputs, split.test_targets),
        )
        for c in (0, 1)
    ]
    # Second moments of x are at most 1 + 2.5²; their fourth-moment spread is below twice that.
    tolerance = 5 * 2 * (1 + 2.5**2) * (2 / (n / 2)) ** 0.5
    assert (moments[0] - moments[2]).abs().max() < tolerance
    assert (moments[1] - moments[3]).abs().max() < tolerance
    assert (moments[0] - moments[1]).abs().max() > 1
    assert not torch.equal(split.train_inputs, split.test_inputs)


def test_xor_depends_on_the_seed_alone():
    small = functools.partial(xor, dimension=20, num_train=30, num_test=40)
    torch.manual_seed(0)
    first = small(seed=5)
    torch.manual_seed(1)
    assert equal(first, small(seed=5))
    assert not equal(first, small(seed=6))


def test_xor_training_set_does_not_depend_on_the_size_of_the_test_set():
    few, many = (xor(dimension=20, num_train=30, num_test=n) for n in (10, 1000))
    assert torch.equal(few.train_inputs, many.train_inputs)


@pytest.mark.parametrize(
    "bad",
    [
        {"dimension": 1},
        {"num_train": 0},
        {"num_test": 2.5},
        {"separation": -1.0},
        {"noise": float("nan")},
        {"seed": -1},
    ],
)
def test_xor_refuses_bad_arguments(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        xor(**bad)


# Noisy MNIST

TRAIN, TEST = 60, 40


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(root: Path) -> Path:
    """Write a tiny MNIST whose images carry their label's brightness; return its raw folder."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    source = np.random.default_rng(0)
    for images, labels, count in ((*FILES[:2], TRAIN), (*FILES[2:], TEST)):
        y = (np.arange(count) % 10).astype(np.uint8)
        x = source.integers(0, 20, (count, 28, 28)) + 20 * y[:, None, None]
        (folder / images).write_bytes(idx(x.astype(np.uint8)))
        (folder / labels).write_bytes(idx(y))
    return folder


@pytest.fixture
def mnist(tmp_path):
    write_mnist(tmp_path)
    return functools.partial(
        noisy_mnist, root=tmp_path, num_train=50, num_test=30, noise=0.5, download=False
    )


def test_mnist_is_scaled_to_unit_mean_square(mnist):
    split = mnist()
    assert split.train_inputs.shape == (50, 784)
    assert split.test_inputs.shape == (30, 784)
    assert float(split.train_inputs.square().mean()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(split.train_components, split.train_targets)
    assert split.num_classes == 10


def test_mnist_is_centred_and_scaled_by_the_training_digits(mnist, tmp_path):
    split = mnist(num_train=TRAIN, num_test=TEST, noise=0.0, pooled=False)
    folder = tmp_path / "MNIST" / "raw"
    train, test = (
        np.frombuffer((folder / name).read_bytes(), np.uint8, offset=16).reshape(-1, 784) / 255
        for name in (FILES[0], FILES[2])
    )
    mean = train.mean(0)
    scale = np.sqrt(np.mean((train - mean) ** 2))
    for raw, made in ((train, split.train_inputs), (test, split.test_inputs)):
        expected = torch.from_numpy((raw - mean) / scale).float()
        nearest = torch.cdist(made, expected, compute_mode="donot_use_mm_for_euclid_dist").min(0)
        assert len(nearest.indices.unique()) == len(raw)
        assert float(nearest.values.max()) < 1e-3


def test_mnist_noise_has_the_given_size(mnist):
    clean, noisy = mnist(noise=0.0), mnist(noise=0.5)
    for name in ("train_inputs", "test_inputs"):
        x, y = getattr(clean, name), getattr(noisy, name)
        # y = (c x + 0.5 z)/s with c and s fixed by unit mean square: s² = c² + 0.25.
        share = float((x * y).mean() / (x * x).mean())
        residual = float((y - share * x).square().mean())
        scale = 0.5 / residual**0.5
        assert share**2 + residual == pytest.approx(1, rel=0.05)
        assert scale**2 == pytest.approx((share * scale) ** 2 + 0.25, rel=0.05)


def test_mnist_pools_digits_unless_told_otherwise(tmp_path):
    folder = write_mnist(tmp_path)
    white = np.full((TEST, 28, 28), 255, np.uint8)
    (folder / FILES[2]).write_bytes(idx(white))
    pooled = noisy_mnist(root=tmp_path, num_train=50, num_test=None, noise=0)
    official = noisy_mnist(root=tmp_path, num_train=50, num_test=None, noise=0, pooled=False)

    assert len(pooled.test_inputs) == TRAIN + TEST - 50
    assert len(official.test_inputs) == TEST
    assert float(official.test_inputs.std(0).max()) < 1e-6
    assert float(pooled.test_inputs.std(0).max()) > 0.1


def test_mnist_digits_are_drawn_without_replacement(mnist):
    split = mnist(num_train=TRAIN, num_test=None, noise=0.0)
    everything = torch.cat([split.train_inputs, split.test_inputs])
    assert len(everything) == TRAIN + TEST
    assert len(everything.unique(dim=0)) == TRAIN + TEST


def test_mnist_depends_on_the_seed_alone(mnist):
    assert equal(mnist(seed=1), mnist(seed=1))
    assert not equal(mnist(seed=1), mnist(seed=2))
    assert torch.equal(mnist(num_test=10).train_inputs, mnist(num_test=20).train_inputs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_train": 101}, "num_train=101 asks for more digits than there are: 100"),
        ({"num_test": 51}, "num_test=51 asks for more digits than there are: 50"),
        ({"num_train": 61, "pooled": False}, "num_train=61 .* 60 can be used"),
        ({"num_test": 41, "pooled": False}, "num_test=41 .* 40 can be used"),
        ({"num_train": 0}, "num_train must be a positive integer"),
        ({"num_train": 100, "num_test": None}, "num_test must be a positive integer"),
        ({"noise": -1.0}, "noise must be a number, finite and not negative"),
        ({"num_train": 1, "noise": 0.0}, "raise num_train or noise"),
    ],
)
def test_mnist_refuses_bad_arguments(mnist, arguments, words):
    with pytest.raises(ValueError, match=words):
        mnist(**arguments)


def test_missing_mnist_names_place_and_remedy(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        noisy_mnist(root=tmp_path / "nowhere", download=False)
    message = str(caught.value)
    for words in (str(tmp_path / "nowhere"), FILES[0], "data.root=", "DD_DATA", "data.download"):
        assert words in message
    assert not (tmp_path / "nowhere").exists()


def test_incomplete_mnist_names_the_missing_file(mnist, tmp_path):
    (tmp_path / "MNIST" / "raw" / FILES[1]).unlink()
    with pytest.raises(RuntimeError, match=f"is incomplete: {FILES[1]} missing") as caught:
        mnist(download=True)
    assert "Delete" in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda whole: whole[:-5], id="truncated"),
        pytest.param(lambda whole: whole[:9], id="header only"),
        pytest.param(lambda whole: b"", id="empty"),
        pytest.param(lambda whole: whole + b"0", id="too long"),
        pytest.param(lambda whole: b"\x00\x00\x0d\x01" + whole[4:], id="wrong type"),
        pytest.param(lambda whole: b"\x00\x00\x0a" + whole[3:], id="unknown type"),
        pytest.param(lambda whole: b"\x00\x00\x08\x02" + whole[4:], id="wrong rank"),
        pytest.param(lambda whole: b"<!DOCTYPE html>" + whole, id="a web page"),
        pytest.param(lambda whole: gzip.compress(whole), id="not unpacked"),
        pytest.param(lambda whole: b"\xff" * len(whole), id="garbage"),
        pytest.param(lambda whole: idx(np.zeros(7, np.uint8)), id="other labels"),
        pytest.param(lambda whole: idx(np.zeros((60, 32, 32), np.uint8)), id="other images"),
        pytest.param(lambda whole: idx(np.full(TRAIN, 10, np.uint8)), id="eleven classes"),
    ],
)
def test_damaged_mnist_names_the_file_and_the_remedy(mnist, tmp_path, name, damage):
    path = tmp_path / "MNIST" / "raw" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RuntimeError, match="is damaged or is not a file of MNIST") as caught:
        mnist()
    message = str(caught.value)
    assert str(path.parent) in message
    assert "data.root=" in message
    assert "\n" not in message


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A server of a tiny MNIST in place of the real mirrors; yields the folder it serves."""
    folder = write_mnist(tmp_path / "server")
    resources = []
    for name in FILES:
        packed = gzip.compress((folder / name).read_bytes())
        (folder / f"{name}.gz").write_bytes(packed)
        md5 = hashlib.md5(packed, usedforsecurity=False).hexdigest()
        resources.append((f"{name}.gz", md5))
    handler = functools.partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [address])
        monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield folder
        server.shutdown()


def test_missing_mnist_is_downloaded_once(mirror, tmp_path):
    root = tmp_path / "fresh"
    first = noisy_mnist(root=root, num_train=50, num_test=30)
    for file in mirror.iterdir():
        file.unlink()
    assert equal(first, noisy_mnist(root=root, num_train=50, num_test=30))
    assert [path.name for path in root.iterdir()] == ["MNIST"]


def test_download_fills_an_existing_empty_folder(mirror, tmp_path):
    (tmp_path / "fresh" / "MNIST" / "raw").mkdir(parents=True)
    assert noisy_mnist(root=tmp_path / "fresh", num_train=50, num_test=30).dimension == 784


@pytest.mark.parametrize("how", ["cut short", "no connection"])
def test_failed_download_leaves_nothing_that_looks_valid(mirror, tmp_path, how, monkeypatch):
    last = mirror / f"{FILES[3]}.gz"
    if how == "no connection":
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:1/"])
    else:
        last.write_bytes(last.read_bytes()[:-7])
    root = tmp_path / "fresh"
    with pytest.raises(FileNotFoundError, match="downloading it failed") as caught:
        noisy_mnist(root=root, num_train=50, num_test=30)
    assert "DD_DATA" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_root_is_argument_then_environment_then_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DD_DATA", str(tmp_path / "environment"))
    assert data_root(tmp_path / "argument") == tmp_path / "argument"
    assert data_root() == tmp_path / "environment"
    monkeypatch.setenv("DD_DATA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_root() == tmp_path / "cache" / "decoupled-descent"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_root() == tmp_path / ".cache" / "decoupled-descent"


def test_real_digits():
    root = Path(os.environ.get("DD_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (root / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST in {root}: set DD_DATA to a folder that holds MNIST/raw")
    split = noisy_mnist(root=root, download=False)
    assert split.train_inputs.shape == (2000, 784)
    assert split.test_inputs.shape == (5000, 784)
    # Ten classes, none rarer than 8 % nor commoner than 12.5 %, within five standard deviations.
    shares = split.train_targets.bincount(minlength=10) / 2000
    assert float((shares - 0.1).abs().max()) < 0.025 + 5 * (0.1 * 0.9 / 2000) ** 0.5
    # The nearest class mean gets most noisy digits right, so inputs and labels belong together.
    means = torch.stack([split.train_inputs[split.train_targets == c].mean(0) for c in range(10)])
    guesses = torch.cdist(split.test_inputs, means).argmin(1)
    assert float((guesses == split.test_targets).float().mean()) > 0.6
    # Train and test come from one distribution.
    assert float(split.test_inputs.square().mean()) == pytest.approx(1, abs=0.02)
