"""CIFAR-10 probing: from files and images to standardised samples, and every way it can fail."""

import functools
import hashlib
import io
import os
import pickle
import tarfile
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.datasets import CIFAR10

from dd.data import cifar10_probe, feature_cache, generator
from dd.data.backbone import backbone_features
from dd.data.cifar10_images import cifar10_images
from dd.data.cifar10_probe import _rows
from dd.data.feature_cache import digest
from dd.data.feature_file import load_features, load_images
from dd.experiments.experiment import Experiment
from dd.tracking.console import ProgressDisplay
from tests.experiments.test_experiment import configure

REAL = Path(os.environ.get("DD_DATA") or Path(__file__).parents[3] / "shared" / "data")
TRAIN, TEST, DIMENSION, CLASSES = 60, 40, 7, 5

# --- Feature files ---------------------------------------------------------------------------


def samples(**changes):
    source = np.random.default_rng(0)
    return {
        "train_features": source.normal(3, 2, (TRAIN, DIMENSION)).astype(np.float16),
        "train_labels": np.arange(TRAIN) % CLASSES,
        "test_features": source.normal(3, 2, (TEST, DIMENSION)).astype(np.float16),
        "test_labels": np.arange(TEST) % CLASSES,
        **changes,
    }


def write(path: Path, content, save=np.savez) -> Path:
    save(path, **{key: value for key, value in content.items() if value is not None})
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    return write(tmp_path / "features.npz", samples())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", "|u1", "<i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_file_gives_what_was_written(tmp_path, save, dtype, order):
    features = np.random.default_rng(1).normal(9, 3, (TRAIN, DIMENSION)).astype(dtype, order=order)
    content = samples(train_features=features)
    loaded = load_features(write(tmp_path / "features.npz", content, save))
    assert loaded.train.dtype == dtype
    assert np.array_equal(loaded.train, features)
    assert np.array_equal(loaded.test, content["test_features"])
    assert np.array_equal(loaded.train_labels, content["train_labels"])
    assert np.array_equal(loaded.test_labels, content["test_labels"])
    assert loaded.train_labels.dtype == np.int64


def test_uncompressed_features_are_mapped_and_read_only(tmp_path, file):
    mapped = load_features(file).train
    assert isinstance(mapped, np.memmap)
    assert not mapped.flags.writeable
    packed = write(tmp_path / "packed.npz", samples(), np.savez_compressed)
    assert not isinstance(load_features(packed).train, np.memmap)


def test_mapped_bytes_are_found_behind_headers_of_any_length(tmp_path):
    path, content = tmp_path / "features.npz", samples()
    with zipfile.ZipFile(path, "w") as archive:
        for key, value in content.items():
            buffer = io.BytesIO()
            np.save(buffer, value)
            info = zipfile.ZipInfo(f"{key}.npy")
            # The central directory's copy of an extra field may differ from the member's own.
            info.extra = b"\xfe\xca\x05\x00extra"
            archive.writestr(info, buffer.getvalue())
            info.extra = b""
    assert np.array_equal(load_features(path).train, content["train_features"])


def with_value(key, value):
    def change(content):
        array = content[key].copy()
        array.flat[-1] = value
        return {**content, key: array}

    return change


def changed(**changes):
    return lambda content: {**content, **changes}


BAD_CONTENT = {
    "missing features": (changed(train_features=None), "no array 'train_features', only train_la"),
    "missing labels": (changed(test_labels=None), "no array 'test_labels'"),
    "labels too short": (changed(train_labels=np.zeros(59, int)), r"shape \(60,\), one label .*59"),
    "labels of rank 2": (changed(train_labels=np.zeros((60, 1), int)), r"got \(60, 1\)"),
    "labels of floats": (changed(test_labels=np.zeros(40)), "test_labels must be integers, got da"),
    "labels of text": (changed(test_labels=np.full(40, "cat")), "test_labels must be integers"),
    "negative label": (with_value("train_labels", -1), "from 0, .* got labels -1 to 4"),
    "wild label": (with_value("test_labels", 10**9), "fewer than the 100 samples .* 1000000000"),
    "features of rank 1": (changed(train_features=np.zeros(60)), r"dimension\), .* got \(60,\)"),
    "features of rank 3": (changed(test_features=np.zeros((40, 7, 1))), r"got \(40, 7, 1\)"),
    "no samples": (changed(train_features=np.zeros((0, 7))), r"it is empty: shape \(0, 7\)"),
    "no coordinates": (changed(test_features=np.zeros((40, 0))), r"it is empty"),
    "other dimension": (changed(test_features=np.zeros((40, 8))), r"one shape, .*7\) .* \(40, 8\)"),
    "NaN": (with_value("train_features", np.nan), "finite in float32, got 1 of 60 rows"),
    "infinity": (with_value("test_features", -np.inf), "test_features must be finite"),
    "beyond float32": (changed(train_features=np.full((60, 7), 1e39)), "got 60 of 60 rows"),
    "text": (changed(train_features=np.full((60, 7), "1.0")), "must hold real numbers, got"),
    "complex": (changed(train_features=np.ones((60, 7), complex)), "must hold real numbers, got"),
    "truth values": (changed(train_features=np.ones((60, 7), bool)), "must hold real numbers"),
    "objects": (changed(train_features=np.full((60, 7), None)), "Python objects"),
    "object labels": (changed(test_labels=np.full(40, None)), "Python objects"),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("change", "words"), BAD_CONTENT.values(), ids=BAD_CONTENT)
def test_bad_content_names_the_file_the_array_and_the_remedy(tmp_path, change, words, save):
    path = write(tmp_path / "bad.npz", change(samples()), save)
    with pytest.raises(ValueError, match=words) as caught:
        cifar10_probe(path=path, num_train=20, num_test=20)
    message = str(caught.value)
    for part in (
        str(path),
        "train_features, train_labels, test_features, test_labels",
        "data.path",
    ):
        assert part in message
    assert "\n" not in message


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda whole: b"", id="empty"),
        pytest.param(lambda whole: whole[:-1], id="last byte missing"),
        pytest.param(lambda whole: whole[: len(whole) // 2], id="half"),
        pytest.param(
            lambda whole: whole[: len(whole) // 3] + whole[2 * len(whole) // 3 :], id="hole"
        ),
        pytest.param(lambda whole: b"<!DOCTYPE html>", id="a web page"),
        pytest.param(lambda whole: npy(np.zeros((60, 7))), id="a single array"),
        pytest.param(lambda whole: pickle.dumps({"train_features": [1.0]}), id="a pickle"),
    ],
)
def test_damaged_file_names_the_remedy(tmp_path, damage, save):
    path = write(tmp_path / "features.npz", samples(), save)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="cannot be used as a file of features: ") as caught:
        load_features(path)
    assert "data.path=" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_altered_byte_never_gives_other_numbers(tmp_path, save):
    path = write(tmp_path / "features.npz", samples(), save)
    whole, before = path.read_bytes(), load_features(path)
    for position in range(0, len(whole), 13):
        altered = bytearray(whole)
        altered[position] ^= 0x55
        path.write_bytes(altered)
        try:
            after = load_features(path)
        except ValueError:
            continue
        # Some bytes, such as the time of writing, do not matter.
        for name in ("train", "train_labels", "test", "test_labels"):
            assert np.array_equal(getattr(before, name), getattr(after, name))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_altered_number_deep_in_a_large_array_is_found(tmp_path, save):
    # Far beyond what a reader buffers while it looks at the header.
    features = np.random.default_rng(2).normal(size=(TRAIN, 2000)).astype(np.float32)
    content = samples(train_features=features, test_features=features[:TEST])
    path = write(tmp_path / "features.npz", content, save)
    altered = bytearray(path.read_bytes())
    altered[200_000] ^= 1
    path.write_bytes(altered)
    with pytest.raises(ValueError, match="'train_features' cannot be read"):
        load_features(path)


def test_a_header_that_promises_more_than_there_is_costs_no_memory(tmp_path):
    path = tmp_path / "features.npz"
    header = npy(np.zeros((60, 7))).replace(b"(60, 7), }   ", b"(60000000000, 7), }")[:128]
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("train_features.npy", header + b"\n" + bytes(3360))
        with pytest.raises(ValueError, match=r"cannot be read: .* bytes are not an array of shape"):
            load_features(path)


class Bomb:
    def __reduce__(self):
        return (os.makedirs, ("exploded",))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_pickle_inside_is_never_loaded(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "bad.npz", samples(train_features=np.array([Bomb()])), save)
    with pytest.raises(ValueError, match="Python objects"):
        load_features(path)
    assert not (tmp_path / "exploded").exists()


def test_missing_file_and_folder_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.npz does not exist. .*data.path="):
        cifar10_probe(path=tmp_path / "nowhere.npz")
    with pytest.raises(FileNotFoundError, match="is a folder, not a file"):
        cifar10_probe(path=tmp_path)


# --- Samples drawn and standardised ----------------------------------------------------------


def probe(file, **changes):
    return cifar10_probe(**{"path": file, "num_train": 50, "num_test": 30, **changes})


def test_training_samples_have_mean_zero_and_deviation_one_in_each_coordinate(file):
    split = probe(file)
    assert split.train_inputs.shape == (50, DIMENSION)
    assert split.test_inputs.shape == (30, DIMENSION)
    # float32 rounding of values of order one, averaged over 50.
    assert torch.allclose(split.train_inputs.mean(0), torch.zeros(DIMENSION), atol=1e-6)
    assert torch.allclose(split.train_inputs.square().mean(0), torch.ones(DIMENSION), atol=1e-5)
    assert torch.equal(split.train_components, split.train_targets)


def test_every_row_keeps_its_label_and_is_scaled_by_the_training_samples_drawn(file):
    split, content = probe(file, seed=4), samples()
    train, test = _rows("num_train", 50, TRAIN, 4), _rows("num_test", 30, TEST, 4)
    drawn = content["train_features"][train].astype(float)
    for inputs, rows in (
        (split.train_inputs, drawn),
        (split.test_inputs, content["test_features"][test]),
    ):
        assert np.allclose(inputs, (rows - drawn.mean(0)) / drawn.std(0), atol=1e-5)
    assert np.array_equal(split.train_targets, content["train_labels"][train])
    assert np.array_equal(split.test_targets, content["test_labels"][test])


def test_global_scaling_is_one_factor_for_all_coordinates(tmp_path):
    content = samples()
    content["train_features"] = content["train_features"].astype(np.float64)
    content["train_features"][:, 3] *= 50
    content["train_features"][:, 2] = 0.1
    split = probe(write(tmp_path / "features.npz", content), scaling="global", seed=4)
    drawn = content["train_features"][_rows("num_train", 50, TRAIN, 4)]
    varying = np.delete(drawn, 2, axis=1).var(0).mean()
    expected = (drawn - drawn.mean(0)) / np.sqrt(varying)
    assert np.allclose(split.train_inputs, expected, atol=1e-5)
    with pytest.raises(ValueError, match="scaling must be one of coordinate, global, got 'none'"):
        probe(write(tmp_path / "again.npz", content), scaling="none")


def test_a_coordinate_without_variation_is_zero_in_both_sets(tmp_path):
    content = samples()
    # 0.1 has no exact mean in binary; the test set differs from the training set.
    content["train_features"] = content["train_features"].astype(np.float32)
    content["train_features"][:, 2] = 0.1
    split = probe(write(tmp_path / "features.npz", content))
    assert not split.train_inputs[:, 2].any()
    assert not split.test_inputs[:, 2].any()
    assert split.train_inputs[:, 3].any()


def test_small_differences_on_a_large_offset_are_kept(tmp_path):
    content = samples()
    content["train_features"] = 1e4 + np.random.default_rng(5).normal(0, 1e-4, (TRAIN, DIMENSION))
    content["test_features"] = 1e4 + np.random.default_rng(6).normal(0, 1e-4, (TEST, DIMENSION))
    split = probe(write(tmp_path / "features.npz", content))
    assert torch.allclose(split.train_inputs.square().mean(0), torch.ones(DIMENSION), atol=1e-5)


def test_equal_samples_cannot_be_standardised(tmp_path, file):
    content = samples(train_features=np.ones((TRAIN, DIMENSION)))
    with pytest.raises(ValueError, match="are all equal and cannot be standardised"):
        probe(write(tmp_path / "equal.npz", content))
    with pytest.raises(ValueError, match="raise num_train"):
        probe(file, num_train=1)


def test_the_subset_depends_on_the_seed_alone(file):
    first, again, other = probe(file, seed=1), probe(file, seed=1), probe(file, seed=2)
    assert torch.equal(first.train_inputs, again.train_inputs)
    assert torch.equal(first.test_inputs, again.test_inputs)
    assert not torch.equal(first.train_targets, other.train_targets)
    assert torch.equal(probe(file, num_test=10).train_inputs, probe(file, num_test=20).train_inputs)
    assert torch.equal(
        probe(file, num_test=10).test_inputs, probe(file, num_test=20).test_inputs[:10]
    )


def test_samples_are_drawn_without_replacement(file):
    split = probe(file, num_train=None, num_test=None)
    assert len(split.train_inputs.unique(dim=0)) == TRAIN
    assert len(split.test_inputs.unique(dim=0)) == TEST


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_train": 61}, "num_train=61 asks for more samples than there are: 60"),
        ({"num_test": 41}, "num_test=41 .* point data.path"),
        ({"num_train": 0}, "num_train must be a positive integer, or None for all 60 samples"),
        ({"num_test": 1.5}, "num_test must be a positive integer"),
        ({"seed": -1}, "seed must be a non-negative integer"),
        (
            {"source": "pixel"},
            "one of auto, features, backbone, pixels, got 'pixel'",
        ),
        ({"source": "pixels"}, "'train_images', only train_features"),
        ({"source": "backbone"}, "'train_images', only train_features"),
    ],
)
def test_bad_arguments_are_refused(file, arguments, words):
    with pytest.raises(ValueError, match=words):
        probe(file, **arguments)


# --- Images ----------------------------------------------------------------------------------


def pictures(count=12, size=8, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def image_file(path: Path, **changes) -> Path:
    content = {
        "train_images": pictures(12, seed=1),
        "train_labels": np.arange(12) % 3,
        "test_images": pictures(8, seed=2),
        "test_labels": np.arange(8) % 3,
    }
    return write(path, {**content, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"test_images": pictures(8) / 255}, "test_images must be uint8, got data type float64"),
        ({"train_images": pictures().transpose(0, 3, 1, 2)}, r"height, width, 3\), .* 3, 8, 8\)"),
        ({"train_images": pictures()[0]}, r"got \(8, 8, 3\)"),
        ({"test_images": pictures(8, size=9)}, "must have one shape"),
        ({"test_images": None}, "no array 'test_images'"),
    ],
)
def test_bad_images_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        load_images(image_file(tmp_path / "images.npz", **changes))


def test_pixels_are_the_flattened_images(tmp_path):
    path = image_file(tmp_path / "images.npz")
    split = cifar10_probe(source="pixels", path=path, num_train=None, num_test=None)
    assert split.train_inputs.shape == (12, 192)
    images = load_images(path).train.reshape(12, -1).astype(float)
    expected = (images - images.mean(0)) / images.std(0)
    nearest = torch.cdist(split.train_inputs, torch.from_numpy(expected).float()).min(1)
    assert float(nearest.values.max()) < 1e-3
    assert torch.equal(split.train_targets, nearest.indices % 3)


def make_cifar(folder: Path, monkeypatch) -> Path:
    """Write a tiny CIFAR-10 in torchvision's form and have torchvision expect its checksums."""
    base = folder / CIFAR10.base_folder
    base.mkdir(parents=True)

    def put(name: str, content: dict) -> str:
        (base / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((base / name).read_bytes(), usedforsecurity=False).hexdigest()

    def batch(count: int, seed: int) -> dict:
        rows = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": rows, "labels": [i % 10 for i in range(count)]}

    train = [[f"data_batch_{i}", put(f"data_batch_{i}", batch(6, i))] for i in (1, 2)]
    meta = {**CIFAR10.meta, "md5": put("batches.meta", {"label_names": list("abcdefghij")})}
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", put("test_batch", batch(8, 9))]])
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return base


def test_cifar10_is_read_from_its_folder(tmp_path, monkeypatch):
    base = make_cifar(tmp_path, monkeypatch)
    content = cifar10_images(tmp_path, download=False)
    assert content.train.shape == (12, 32, 32, 3)
    assert content.test.shape == (8, 32, 32, 3)
    rows = pickle.loads((base / "test_batch").read_bytes())["data"]  # noqa: S301
    assert np.array_equal(content.test.transpose(0, 3, 1, 2).reshape(8, 3072), rows)
    assert content.train_labels.tolist() == [0, 1, 2, 3, 4, 5] * 2
    split = cifar10_probe(source="pixels", root=tmp_path, num_train=9, num_test=8, download=False)
    assert split.train_inputs.shape == (9, 3072)


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
@pytest.mark.parametrize("how", ["cut short", "missing", "another pickle"])
def test_damaged_cifar10_names_the_folder_and_the_remedy(tmp_path, monkeypatch, name, how):
    monkeypatch.chdir(tmp_path)
    base = make_cifar(tmp_path, monkeypatch)
    if how == "missing":
        (base / name).unlink()
    elif how == "cut short":
        (base / name).write_bytes((base / name).read_bytes()[:-5])
    else:
        (base / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(RuntimeError, match="is incomplete or damaged") as caught:
        cifar10_images(tmp_path, download=True)
    assert f"Delete {base}" in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_missing_cifar10_names_place_and_remedies(tmp_path):
    with pytest.raises(FileNotFoundError, match="downloading is switched off") as caught:
        cifar10_probe(source="pixels", root=tmp_path / "nowhere", download=False)
    for words in (str(tmp_path / "nowhere"), "data.root=", "data.path=", "data.download=true"):
        assert words in str(caught.value)
    assert not (tmp_path / "nowhere").exists()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A server of a tiny CIFAR-10 in place of the real one; yields the archive it serves."""
    base = make_cifar(tmp_path / "made", monkeypatch)
    folder = tmp_path / "server"
    folder.mkdir()
    archive = folder / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(base, base.name)
    md5 = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    handler = functools.partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}"
        monkeypatch.setattr(CIFAR10, "url", address)
        monkeypatch.setattr(CIFAR10, "tgz_md5", md5)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield archive
        server.shutdown()


def test_missing_cifar10_is_downloaded_once(mirror, tmp_path):
    root = tmp_path / "fresh"
    first = cifar10_images(root)
    mirror.unlink()
    assert np.array_equal(first.train, cifar10_images(root).train)
    assert [path.name for path in root.iterdir()] == [CIFAR10.base_folder]


@pytest.mark.parametrize("how", ["cut short", "not an archive", "no connection"])
def test_failed_download_leaves_nothing(mirror, tmp_path, monkeypatch, how):
    if how == "no connection":
        monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:1/cifar-10-python.tar.gz")
    elif how == "cut short":
        mirror.write_bytes(mirror.read_bytes()[:-7])
    else:
        mirror.write_bytes(b"<!DOCTYPE html>")
        md5 = hashlib.md5(b"<!DOCTYPE html>", usedforsecurity=False).hexdigest()
        monkeypatch.setattr(CIFAR10, "tgz_md5", md5)
    with pytest.raises(FileNotFoundError, match="downloading it failed") as caught:
        cifar10_images(tmp_path / "fresh")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "fresh").iterdir()) == []


# --- Backbones -------------------------------------------------------------------------------

IMAGES = torch.from_numpy(pictures(10, size=16)).movedim(-1, 1)


@pytest.fixture
def extract(tmp_path):
    return functools.partial(
        backbone_features,
        weights="none",
        resolution=16,
        cache=tmp_path / "cache",
        batch_size=4,
        progress=False,
    )


@pytest.mark.parametrize(
    ("backbone", "dimension", "head"),
    [
        ("resnet18", 512, lambda network: network.fc),
        ("resnet50", 2048, lambda network: network.fc),
        ("efficientnet_b0", 1280, lambda network: network.classifier),
        ("mobilenet_v3_small", 1024, lambda network: network.classifier[3]),
    ],
)
def test_features_are_what_the_classifier_takes(extract, backbone, dimension, head):
    features = extract(IMAGES[:3], backbone=backbone, seed=7)
    assert features.shape == (3, dimension)
    assert features.dtype == torch.float32

    # The same network with its head on, its input there caught.
    torch.manual_seed(generator(7, "backbone").initial_seed())
    network = models.get_model(backbone, weights=None).eval()
    caught = []
    head(network).register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    preprocess = models.get_model_weights(backbone).DEFAULT.transforms(crop_size=16, resize_size=16)
    with torch.no_grad():
        network(preprocess(IMAGES[:3]))
    assert torch.allclose(features, caught[0].flatten(1), rtol=1e-4, atol=1e-6 * caught[0].max())
    assert bool(features.any())


def test_preprocessing_is_that_of_the_weights(extract, monkeypatch):
    seen = []

    class Watcher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            seen.append(x)
            return self.fc(x.mean((2, 3)))

    monkeypatch.setattr(models, "get_model", lambda *_, **__: Watcher())
    white = torch.full((1, 3, 20, 10), 255, dtype=torch.uint8)
    extract(white)
    extract(white, resolution=None)
    assert seen[0].shape == (1, 3, 16, 16)
    assert seen[1].shape == (1, 3, 224, 224)
    imagenet = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    for x in seen:
        assert torch.allclose(x.mean((2, 3)), imagenet.expand(1, 3), atol=1e-5)


def test_batches_do_not_matter_and_no_gradient_is_kept(extract, tmp_path):
    whole = extract(IMAGES, batch_size=10)
    parts = extract(IMAGES, batch_size=3, cache=tmp_path / "other")
    assert not whole.requires_grad
    # Another batch size may take another convolution kernel: rounding of float32.
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-5)


def test_random_weights_come_from_the_seed_and_leave_torch_as_it_was(extract, tmp_path):
    torch.manual_seed(0)
    first = extract(IMAGES)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))
    assert torch.equal(first, extract(IMAGES, cache=tmp_path / "other"))
    assert not torch.equal(first, extract(IMAGES, seed=1))


def test_progress_is_shown_also_below_another_bar(extract, tmp_path, capsys):
    extract(IMAGES, progress=True)
    with ProgressDisplay():
        extract(IMAGES, progress=True, cache=tmp_path / "other")
    assert capsys.readouterr().out.count("resnet18 features") == 2


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"images": IMAGES.float()}, TypeError, "images must be uint8"),
        ({"images": IMAGES[:, :1]}, ValueError, r"shape \(n, 3, height, width\), .* \(10, 1, 16"),
        ({"images": IMAGES[:0]}, ValueError, "none of them zero"),
        ({"backbone": "resnet19"}, ValueError, "such as resnet18, .*; got 'resnet19'"),
        ({"backbone": "fcn_resnet50"}, ValueError, "must be an image classifier of torchvision"),
        ({"backbone": "squeezenet1_1"}, ValueError, "last layer of squeezenet1_1 is a Conv2d"),
        (
            {"weights": "IMAGENET"},
            ValueError,
            "IMAGENET1K_V1, DEFAULT, or none .* 'IMAGENET'",
        ),
        ({"resolution": 0}, ValueError, "resolution must be a positive integer, got 0"),
        ({"batch_size": 2.0}, ValueError, "batch_size must be a positive integer, got 2.0"),
    ],
)
def test_bad_requests_are_refused_and_nothing_is_kept(extract, tmp_path, arguments, error, words):
    with pytest.raises(error, match=words):
        extract(**{"images": IMAGES, **arguments})
    assert not (tmp_path / "cache").exists() or list((tmp_path / "cache").iterdir()) == []


def test_a_resolution_that_the_backbone_refuses_is_named(extract, monkeypatch):
    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            # As torchvision's vision transformers do.
            torch._assert(x.shape[-1] == 224, "Wrong image height!")

    monkeypatch.setattr(models, "get_model", lambda *_, **__: Choosy())
    with pytest.raises(ValueError, match=r"Wrong image height!\): resolution must be one that"):
        extract(IMAGES)


@pytest.mark.parametrize(("backbone", "resolution"), [("alexnet", 32), ("convnext_tiny", 16)])
def test_an_image_too_small_for_the_backbone_is_named(extract, backbone, resolution):
    with pytest.raises(ValueError, match=rf"^{backbone} features cannot be computed .*resolution"):
        extract(IMAGES[:1], backbone=backbone, resolution=resolution)


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_failures_of_the_device_are_no_matter_of_resolution(extract, monkeypatch, failure):
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            raise failure("of the device")

    monkeypatch.setattr(models, "get_model", lambda *_, **__: Failing())
    with pytest.raises(failure, match="of the device"):
        extract(IMAGES)


def test_untrained_transformers_take_the_images_of_their_recipe(extract, monkeypatch):
    """The recipe of vit_h_14's weights makes images of 518 pixels, and it is built for 224."""
    asked = {}

    class Asked(Exception):
        pass

    def get_model(name, **settings):
        asked[name] = settings.get("image_size")
        raise Asked

    monkeypatch.setattr(models, "get_model", get_model)
    for name in ("vit_h_14", "vit_b_16", "resnet18"):
        with pytest.raises(Asked):
            extract(IMAGES, backbone=name, resolution=None)
    assert asked == {"vit_h_14": 518, "vit_b_16": 224, "resnet18": None}


def test_features_that_are_not_finite_are_neither_returned_nor_kept(extract, tmp_path, monkeypatch):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(x.mean((2, 3))[:, :2]) / 0

    monkeypatch.setattr(models, "get_model", lambda *_, **__: Broken())
    with pytest.raises(RuntimeError, match="resnet18 features are not finite"):
        extract(IMAGES)
    assert list((tmp_path / "cache").iterdir()) == []


# --- Trained weights -------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty folder in place of torch.hub's, and no internet."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1/")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1/")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def weights_file(hub: Path) -> Path:
    return hub / models.ResNet18_Weights.DEFAULT.url.rsplit("/", 1)[1]


def test_weights_on_disk_are_used(extract, hub):
    network = models.resnet18(weights=None)
    with torch.no_grad():
        network.bn1.bias.add_(1.0)
    torch.save(network.state_dict(), weights_file(hub))
    features = extract(IMAGES, weights="DEFAULT", download=False)
    network.fc = nn.Identity()
    preprocess = models.ResNet18_Weights.DEFAULT.transforms(crop_size=16, resize_size=16)
    with torch.no_grad():
        expected = network.eval()(preprocess(IMAGES))
    assert torch.allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_weights_that_cannot_be_downloaded_are_one_clear_sentence(extract, hub, tmp_path):
    with pytest.raises(
        RuntimeError, match=r"ResNet18_Weights.IMAGENET1K_V1 could not be"
    ) as caught:
        extract(IMAGES, weights="DEFAULT")
    message = str(caught.value)
    for words in ("URLError", str(weights_file(hub)), "data.path=", "data.weights=none"):
        assert words in message
    assert "\n" not in message
    assert list(hub.iterdir()) == []
    assert list((tmp_path / "cache").iterdir()) == []


def test_weights_are_not_downloaded_when_that_is_switched_off(extract, hub):
    with pytest.raises(RuntimeError, match=r"switched off \(data.download=false\)"):
        extract(IMAGES, weights="DEFAULT", download=False)


@pytest.mark.parametrize("how", ["cut short", "a pickle"])
def test_damaged_weights_are_refused(extract, hub, tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    if how == "cut short":
        torch.save({"fc.bias": torch.zeros(100)}, weights_file(hub))
        weights_file(hub).write_bytes(weights_file(hub).read_bytes()[:-50])
    else:
        torch.save({"fc.bias": Bomb()}, weights_file(hub))
    with pytest.raises(RuntimeError, match="delete a damaged one") as caught:
        extract(IMAGES, weights="DEFAULT")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


# --- The cache -------------------------------------------------------------------------------


@pytest.fixture
def counted(extract, monkeypatch):
    """The extraction, and a list that grows with every network that is built."""
    built = []
    real = models.get_model

    def build(*arguments, **keywords):
        built.append(arguments)
        return real(*arguments, **keywords)

    monkeypatch.setattr(models, "get_model", build)
    return extract, built


def test_features_are_computed_once_for_each_key(counted):
    extract, built = counted
    first = extract(IMAGES)
    assert torch.equal(first, extract(IMAGES.clone(), batch_size=5))
    assert len(built) == 1
    other = IMAGES.clone()
    other[3, 1, 2, 2] ^= 1
    for number, changes in enumerate(
        [
            {"images": other},
            {"images": IMAGES.flip(0)},
            {"images": IMAGES[:5]},
            {"resolution": 17},
            {"seed": 1},
            {"backbone": "mobilenet_v3_small"},
        ],
        start=2,
    ):
        features = extract(**{"images": IMAGES, **changes})
        assert len(built) == number
        assert not torch.equal(features[:1], first[:1]) or "images" in changes
    assert torch.equal(first, extract(IMAGES))


def test_images_of_another_shape_have_another_key():
    black = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert digest(black) == digest(black.clone())
    assert digest(black) != digest(black.view(2, 3, 2, 8))


def test_trained_and_random_weights_have_different_keys(counted, hub):
    extract, built = counted
    extract(IMAGES)
    torch.save(models.resnet18(weights=None).state_dict(), weights_file(hub))
    trained = extract(IMAGES, weights="DEFAULT")
    assert torch.equal(trained, extract(IMAGES, weights="IMAGENET1K_V1", seed=3))
    assert len(built) == 2


def test_weights_are_not_needed_where_their_features_are_kept(counted, hub):
    extract, _ = counted
    torch.save(models.resnet18(weights=None).state_dict(), weights_file(hub))
    first = extract(IMAGES, weights="DEFAULT")
    weights_file(hub).unlink()
    assert torch.equal(first, extract(IMAGES, weights="DEFAULT"))


@pytest.mark.parametrize("where", ["computing", "writing"])
def test_an_interruption_leaves_nothing(counted, tmp_path, monkeypatch, where):
    extract, built = counted

    def interrupt(file, **_):
        file.write(b"PK\x03\x04 the beginning")
        file.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "writing":
            patch.setattr(feature_cache.np, "savez", interrupt)
        else:
            patch.setattr(torch, "cat", lambda *_: interrupt(io.BytesIO()))
        with pytest.raises(KeyboardInterrupt):
            extract(IMAGES)
    assert list((tmp_path / "cache").iterdir()) == []
    extract(IMAGES)
    assert len(built) == 2


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-40]), id="cut short"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: np.savez(path, features=np.zeros((9, 512), "f4")), id="rows"),
        pytest.param(lambda path: np.savez(path, features=np.zeros((10, 512))), id="float64"),
        pytest.param(lambda path: np.savez(path, features=np.array([Bomb()])), id="objects"),
    ],
)
def test_damaged_features_are_computed_again(counted, tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    extract, built = counted
    first = extract(IMAGES)
    (path,) = (tmp_path / "cache").iterdir()
    damage(path)
    with pytest.warns(UserWarning, match="is damaged .*: computing the features again"):
        again = extract(IMAGES)
    assert torch.equal(first, again)
    assert torch.equal(first, extract(IMAGES))
    assert len(built) == 2
    assert not (tmp_path / "exploded").exists()


def test_a_cache_that_cannot_be_written_is_found_out_first(counted, tmp_path):
    extract, built = counted
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        extract(IMAGES, cache=tmp_path / "file" / "cache")
    assert built == []


def test_the_default_cache_is_the_users_not_the_data_folder(extract, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DD_DATA", str(tmp_path / "data"))
    extract(IMAGES, cache=None)
    (path,) = (tmp_path / "home" / "decoupled-descent" / "features").iterdir()
    assert path.name.startswith("resnet18-")
    assert not (tmp_path / "data").exists()


# --- From images to an experiment ------------------------------------------------------------


def test_backbone_source_keeps_images_features_and_labels_together(tmp_path):
    path = image_file(tmp_path / "images.npz")
    arguments = {"weights": "none", "resolution": 16, "cache": tmp_path / "cache", "seed": 3}
    split = cifar10_probe(
        source="backbone", path=path, num_train=9, num_test=8, progress=False, **arguments
    )
    assert split.train_inputs.shape == (9, 512)
    content = load_images(path)
    everything = torch.from_numpy(np.concatenate([content.train, content.test])).movedim(-1, 1)
    features = backbone_features(everything, **{**arguments, "progress": False})
    labels = torch.from_numpy(np.concatenate([content.train_labels, content.test_labels]))
    # Which image is which is told from distances that no shift or scale of a coordinate changes.
    raw = (features - features.mean(0)) / features.std(0).clamp_min(1e-6)
    assert [len(split.train_inputs.unique(dim=0)), len(split.test_inputs.unique(dim=0))] == [9, 8]
    made = torch.cat([split.train_inputs, split.test_inputs])
    targets = torch.cat([split.train_targets, split.test_targets])
    scores = torch.corrcoef(torch.cat([made, raw]).double())[: len(made), len(made) :]
    assert torch.equal(labels[scores.argmax(1)], targets)


def test_auto_takes_the_file_where_there_is_one_and_else_the_backbone(tmp_path, monkeypatch, file):
    assert cifar10_probe(path=file, num_train=50, num_test=30).dimension == DIMENSION
    monkeypatch.setenv("DD_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not in .*data/cifar-10-batches-py"):
        cifar10_probe(download=False)
    with pytest.raises(FileNotFoundError, match=r"data/cifar10_efficientnet_lite0.npz does not"):
        cifar10_probe(source="features")
    file.rename(tmp_path / "data" / "cifar10_efficientnet_lite0.npz")
    assert cifar10_probe(num_train=50, num_test=30).dimension == DIMENSION


def test_experiment_trains_on_features_of_images(tmp_path):
    config = configure(
        "data.source=backbone",
        f"data.path={image_file(tmp_path / 'images.npz')}",
        f"data.cache={tmp_path / 'cache'}",
        "data.weights=none",
        "data.resolution=16",
        "data.num_train=12",
        "data.num_test=8",
        "steps=3",
        "trials=2",
        "optimizers=[gd,dd]",
        "tracking.wandb.mode=disabled",
        experiment="cifar10_probe",
    )
    experiment = Experiment(config, tmp_path / "run")
    experiment.run()
    assert experiment.failures == []
    assert {r.optimizer for r in experiment.history.records} == {"gd", "dd"}
    # Another seed draws another subset and other random weights.
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_defaults_are_those_of_the_published_figures():
    config = configure(experiment="cifar10_probe")
    assert (config.data.num_train, config.model.width, config.model.activation) == (
        3000,
        32,
        "gelu",
    )
    assert (config.lr, config.steps, config.model.hidden_scale) == (0.05, 300, 1.0)
    assert config.components == "known"


# --- Real data -------------------------------------------------------------------------------


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not (REAL / name).is_file(), reason=f"no {name} in {REAL}: set DD_DATA to its folder"
    )


@needs("cifar10_efficientnet_lite0.npz")
def test_real_features():
    split = cifar10_probe(root=REAL)
    assert split.train_inputs.shape == (3000, 1280)
    assert split.test_inputs.shape == (2000, 1280)
    # Ten classes of one in ten, within five standard deviations.
    shares = split.train_targets.bincount(minlength=10) / 3000
    assert float((shares - 0.1).abs().max()) < 5 * (0.1 * 0.9 / 3000) ** 0.5
    # The nearest class mean is far better than chance, so inputs and labels belong together.
    means = torch.stack([split.train_inputs[split.train_targets == c].mean(0) for c in range(10)])
    guesses = torch.cdist(split.test_inputs, means).argmin(1)
    assert float((guesses == split.test_targets).float().mean()) > 0.5
    assert float(split.test_inputs.square().mean()) == pytest.approx(1, abs=0.05)


@needs("cifar10_images_small.npz")
def test_real_images_to_features_of_an_untrained_backbone(tmp_path):
    split = cifar10_probe(
        source="backbone",
        path=REAL / "cifar10_images_small.npz",
        weights="none",
        resolution=32,
        num_train=100,
        num_test=50,
        cache=tmp_path,
        progress=False,
    )
    assert split.train_inputs.shape == (100, 512)
    assert split.num_classes == 10
