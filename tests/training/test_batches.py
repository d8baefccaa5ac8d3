"""The batches of every update, and runs in mini-batches."""

import csv
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dd.experiments.assembly import make_model, make_optimizer, make_split
from dd.experiments.experiment import Experiment
from dd.training.batches import Batches
from tests.composed import ran

SMALL = [
    "data.num_train=200",
    "data.num_test=300",
    "data.dimension=50",
    "steps=9",
    "tracking.record_every=4",
    "tracking.progress=false",
    "tracking.wandb.mode=disabled",
]


def run(folder: Path, *overrides: str) -> Experiment:
    return ran(folder, "experiment=xor", *SMALL, *overrides)


def test_a_pass_holds_every_sample_once_and_its_last_batch_is_what_is_left():
    batches = Batches(23, 5, seed=0)
    for number in range(3):
        rows = [batches.at(5 * number + i) for i in range(5)]
        assert [len(r) for r in rows] == [5, 5, 5, 5, 3]
        assert torch.cat(rows).sort().values.tolist() == list(range(23))


def test_every_pass_is_shuffled_anew_from_the_seed():
    batches = Batches(20, 20, seed=0)
    first, second = batches.at(0), batches.at(1)
    assert first.tolist() != second.tolist() != sorted(second.tolist())
    assert Batches(20, 20, seed=0).at(1).tolist() == second.tolist()
    assert Batches(20, 20, seed=1).at(1).tolist() != second.tolist()
    assert batches.at(0).tolist() == first.tolist()


def test_without_a_batch_size_there_are_no_rows_to_choose():
    assert Batches(20, None, seed=0).at(3) is None


@pytest.mark.parametrize("size", [0, -3, 1.5, True, "all"])
def test_a_batch_size_is_a_positive_integer(size):
    with pytest.raises(ValueError, match="batch_size must be a positive integer, got"):
        Batches(20, size, seed=0)


def test_bad_batch_sizes_are_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match="batch_size must be a positive integer, got 0"):
        run(tmp_path / "none", "data.batch_size=0")
    with pytest.raises(ValueError, match="batch_size=201 asks for more than the 200 training"):
        run(tmp_path / "many", "data.batch_size=201")
    assert not (tmp_path / "many" / "config.yaml").exists()


def test_steps_are_updates_and_records_are_over_all_samples(tmp_path):
    experiment = run(tmp_path, "data.batch_size=64")
    with (tmp_path / "history.csv").open(newline="") as file:
        found = [(row["optimizer"], int(row["step"])) for row in csv.DictReader(file)]
    assert found == [(name, step) for name in ("gd", "dd") for step in (0, 4, 8, 9)]
    config = experiment.config
    split = make_split(config)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizers"]["dd"]
    model = make_model(config, split)
    optimizer = make_optimizer(config, "dd", model, split)
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(split.train_inputs[rows]), split.train_targets[rows])

    tracked = optimizer.evaluate(torch.arange(200).split(70), loss)
    last = experiment.history.select("dd", 0)[-1]
    # Means in float32, in another order.
    assert math.isclose(float(tracked), last.train_loss, rel_tol=1e-5)


def test_both_optimizers_see_the_same_batches(tmp_path):
    # Before the first correction the two make one and the same step.
    overrides = ["data.batch_size=20", "steps=1", "tracking.record_every=1", "lr=0.5"]
    history = run(tmp_path / "mini", *overrides).history
    gd, dd = (history.select(name, 0)[-1].test_loss for name in ("gd", "dd"))
    full = run(tmp_path / "full", *overrides[1:], "optimizers=[gd]").history.select("gd", 0)[-1]
    assert math.isclose(gd, dd, rel_tol=1e-6)
    assert not math.isclose(gd, full.test_loss, rel_tol=1e-3)


def test_one_seed_gives_identical_histories(tmp_path):
    settings = ["data.batch_size=64", "optimizer.momentum=0.5"]
    run(tmp_path / "first", *settings)
    run(tmp_path / "again", *settings)
    first, again = (tmp_path / name / "history.csv" for name in ("first", "again"))
    assert first.read_bytes() == again.read_bytes()
