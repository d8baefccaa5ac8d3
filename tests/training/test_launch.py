"""Several processes of one run."""

import csv
import subprocess
import sys

import pytest
import torch

from dd.training.launch import Processes


@pytest.fixture
def processes(monkeypatch):
    def make(rank, size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))
        return Processes()

    return make


@pytest.mark.parametrize("rows", [None, torch.tensor([4, 1, 7, 2, 9, 3, 8])])
def test_parts_are_all_rows_and_their_losses_mean_to_the_mean(processes, rows):
    values = torch.arange(10.0).square()
    everything = torch.arange(10) if rows is None else rows
    parts = [processes(rank, 3).part(rows, 10) for rank in range(3)]
    assert torch.equal(torch.cat([own for own, _ in parts]), everything)
    mean = sum(weight * values[own].mean() for own, weight in parts) / 3
    torch.testing.assert_close(mean, values[everything].mean())


def test_a_process_alone_takes_what_there_is():
    rows = torch.tensor([3, 1])
    assert Processes().leads
    assert Processes().part(rows, 10) == (rows, 1.0)
    assert Processes().part(None, 10) == (None, 1.0)
    model = torch.nn.Linear(2, 2)
    assert Processes().wrapped(model) is model
    assert Processes().device("cpu") == "cpu"


def test_fewer_rows_than_processes(processes):
    with pytest.raises(ValueError, match=r"2 samples leaves some of 3 processes.*batch_size"):
        processes(1, 3).part(torch.tensor([3, 1]), 10)


SETTINGS = [
    "experiment=xor",
    "optimizers=[gd,dd]",
    "steps=20",
    "data.num_train=211",
    "data.num_test=200",
    "data.dimension=60",
    "components=known",
    # Probes are drawn anew in every process.
    "optimizer.curvature=stein",
    "optimizer.momentum=0.5",
    "tracking.wandb.mode=disabled",
    "tracking.progress=false",
    "tracking.checkpoint_every=10",
]


def history(folder):
    with (folder / "history.csv").open(encoding="utf-8") as file:
        return [[float(value) for value in list(row.values())[2:]] for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", ["null", "40"])
def test_two_processes_of_torchrun_are_one(tmp_path, batch_size):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launches = {"one": [sys.executable, "-m", "dd"], "two": [*torchrun, "-m", "dd"]}
    for name, launch in launches.items():
        settings = [*SETTINGS, f"data.batch_size={batch_size}", f"hydra.run.dir={tmp_path / name}"]
        subprocess.run([*launch, *settings], check=True, capture_output=True)  # noqa: S603
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    # Single precision, summed in another order, through 20 steps of growth below 2 a step.
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=1e-4, atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    assert all((tmp_path / name / "report.html").is_file() for name in launches)
