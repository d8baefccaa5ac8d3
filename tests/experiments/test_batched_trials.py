"""Trials of an experiment computed at once, and the curves of state evolution beside them."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import dd
from dd.data import xor
from dd.experiments import batched_trials
from dd.experiments.assembly import make_model, make_split
from dd.experiments.batched_trials import batchable_groups
from dd.experiments.experiment import Experiment
from dd.experiments.models import informed_two_layer
from dd.experiments.resume import resumed
from dd.tracking import figures
from dd.tracking.history import METRICS
from tests.composed import composed, ran

SMALL = [
    "data.num_train=120",
    "data.num_test=100",
    "data.dimension=40",
    "steps=12",
    "trials=4",
    "theory_paths=2000",
    "tracking.record_every=5",
    "tracking.progress=false",
    "tracking.wandb.mode=disabled",
]


def configure(*overrides: str, experiment: str = "xor"):
    return composed(f"experiment={experiment}", *SMALL, *overrides)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(figures, "train_vs_test", lambda *arguments: None)


def run(folder: Path, *overrides: str, experiment: str = "xor") -> Experiment:
    return ran(folder, f"experiment={experiment}", *SMALL, *overrides)


def numbers(experiment: Experiment):
    """Every record by its optimizer, trial and step."""
    return {
        (r.optimizer, r.trial, r.step): [getattr(r, metric) for metric in METRICS]
        for r in experiment.history.records
    }


def assert_same(first: Experiment, second: Experiment):
    left, right = numbers(first), numbers(second)
    assert left.keys() == right.keys()
    for key, row in left.items():
        # Losses and errors of order one in float32; twelve steps amplify rounding little.
        assert row == pytest.approx(right[key], abs=1e-5, nan_ok=True), key


@pytest.mark.parametrize(
    "overrides",
    [
        ["steps=3"],
        ["optimizers=[gd,dd]", "components=known", "optimizer.momentum=0.5"],
        ["optimizers=[gd,dd]", "optimizer.curvature=stein"],
        ["optimizers=[gd,dd]", "optimizer.seed=3"],
        ["optimizers=[gd]"],
    ],
)
def test_histories_are_those_of_trials_one_by_one(tmp_path, overrides):
    at_once = run(tmp_path / "a", *overrides)
    assert_same(at_once, run(tmp_path / "b", "together=false", *overrides))
    figures_of = at_once.summary["gd"]
    assert figures_of["completed_trials"] == 4
    assert figures_of["seconds"] > 0
    assert all(math.isnan(t["seconds"]) for t in figures_of["per_trial"][1:])
    assert any("trials 2 to 4 were computed at once" in note for note in at_once.notes)


def test_damped_trials_of_the_paper_figure_too(tmp_path):
    settings = ["theory=false", "trials=3"]
    at_once = run(tmp_path / "a", *settings, experiment="xor_paper")
    one_by_one = run(tmp_path / "b", *settings, "together=false", experiment="xor_paper")
    assert at_once.history.optimizers == ["gd", "dd", "dd_half", "dd_pure"]
    assert_same(at_once, one_by_one)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], [("gd", "dd")]),
        (["trials=1"], []),
        (["together=false"], []),
        (["data.batch_size=50", "optimizers=[gd,dd]"], []),
        (["correct_head=true"], [("gd",)]),
        (["optimizer.curvature=probe_create_graph"], [("gd",)]),
    ],
)
def test_what_cannot_run_at_once_runs_one_by_one(overrides, wanted):
    config = configure("optimizers=[gd,dd,dd_auto]", *overrides)
    assert [group.names for group in batchable_groups(config, 1)] == wanted
    assert batchable_groups(config, 2) == []


def test_optimizers_of_other_noise_models_are_groups_of_their_own():
    config = configure("components=none", "optimizer.curvature=stein", experiment="xor_paper")
    found = {group.names for group in batchable_groups(config, 1)}
    assert found == {("gd", "dd"), ("dd_half", "dd_pure")}


def test_a_trial_that_fails_leaves_the_others_alone(tmp_path, monkeypatch):
    make = batched_trials.make_model

    def damaged(config, split):
        model = make(config, split)
        if config.seed == 2:
            model[2].weight.data *= 1e38
        return model

    monkeypatch.setattr(batched_trials, "make_model", damaged)
    found = run(tmp_path, "optimizers=[gd,dd]", "components=known")
    assert [failure.split(":")[0] for failure in found.failures] == ["gd 3/4", "dd 3/4"]
    assert "not finite at step" in found.failures[0]
    assert found.summary["gd"]["completed_trials"] == 3
    assert len(found.history.select("dd", 3)) == 4


def test_an_interrupted_batch_goes_on_with_what_is_left(tmp_path, monkeypatch):
    settings = ["optimizers=[gd,dd]"]
    whole = run(tmp_path / "whole", *settings)
    folder, chunks, seen = tmp_path / "run", batched_trials.BatchedTrials.chunks, []

    def interrupted(self, trials, device):
        seen.append(list(trials))
        for count, chunk in enumerate(chunks(self, trials, device)):
            yield chunk
            if len(seen) == 1 and count == 0:
                shutil.copytree(folder, tmp_path / "copy")
                raise KeyboardInterrupt

    # One trial at a time.
    monkeypatch.setattr("dd.trials.run._AT_ONCE", 1)
    monkeypatch.setattr(batched_trials.BatchedTrials, "chunks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, *settings)
    for place in (folder, tmp_path / "copy"):
        assert len({row["trial"] for row in _rows(place)}) == 2
        experiment = resumed(place, [f"resume={place}"])
        experiment.run()
        assert_same(experiment, whole)
        assert json.loads((place / "summary.json").read_text())["finished"]
    assert seen == [[1, 2, 3], [2, 3], [2, 3]]


def _rows(folder: Path):
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_theory_is_drawn_written_and_compared(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "train_vs_test", lambda *arguments: drawn.append(arguments[3]))
    found = run(tmp_path, "trials=3", experiment="xor_paper")
    assert list(drawn[0]) == ["dd", "dd_half", "dd_pure"]
    steps, values = drawn[0]["dd"]["loss"]
    assert steps.tolist() == [0, 5, 10, 12]
    with (tmp_path / "state_evolution.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["optimizer"] == "dd"]
    assert [float(row["loss"]) for row in rows] == values.tolist()
    (note,) = [note for note in found.notes if note.startswith("dd: state evolution")]
    medians = np.median(found.history.curves("dd", "test_loss")[1], axis=0)
    furthest = np.abs(medians - values).max()
    error = float(found.theory["dd"].loss.standard_error.max())
    assert f"{furthest:.4f} (Monte-Carlo error up to {error:.4f}) of the median test loss" in note


def test_theory_knows_the_rule_of_every_optimizer(tmp_path):
    rule = {"momentum": 0.6, "weight_decay": 0.1, "damping": 0.7}
    settings = [f"optimizer.{key}={value}" for key, value in rule.items()]
    settings += ["+optimizer.dampening=0.2", "optimizer.lr=0.3", "lr=0.1"]
    config = configure("theory=true", "trials=1", "optimizers=[gd,dd]", *settings)
    found = Experiment(config, tmp_path)
    found.run()
    split = make_split(config)
    wanted = dd.state_evolution(
        make_model(config, split),
        split.mixture,
        alpha=120 / 40,
        steps=12,
        lr=0.3,
        dampening=0.2,
        record_every=5,
        paths=2000,
        **rule,
    )
    assert list(found.theory) == ["dd"]
    assert torch.equal(found.theory["dd"].loss.values, wanted.loss.values)
    assert torch.equal(found.theory["dd"].error.values, wanted.error.values)


def test_a_rule_that_theory_does_not_know_has_no_prediction(tmp_path):
    found = run(
        tmp_path,
        *("theory=true", "trials=1", "optimizers=[dd]"),
        *("optimizer.weight_decay=0.1", "+optimizer.decoupled_weight_decay=true"),
    )
    assert not found.theory
    assert any("does not know decoupled_weight_decay" in note for note in found.notes)


def test_what_the_batch_refuses_runs_one_by_one(tmp_path):
    found = run(tmp_path, "optimizers=[gd,dd]", "model.width=121", "trials=2")
    assert any("ran one trial at a time" in note for note in found.notes)
    assert found.history.trials("dd") == [0, 1]
    assert found.summary["gd"]["completed_trials"] == 2


def test_a_setting_left_out_is_its_default_in_every_trial(tmp_path):
    settings = ["~optimizer.seed", "optimizers=[dd]", "trials=2", "steps=5"]
    assert_same(run(tmp_path / "a", *settings), run(tmp_path / "b", "together=false", *settings))


def test_one_optimizer_may_fail_alone(tmp_path):
    settings = ["optimizers=[gd,dd]", "available.gd.lr=1e38", "components=known"]
    found = run(tmp_path, *settings)
    assert {failure.split(" ")[0] for failure in found.failures} == {"gd"}
    assert found.summary["dd"]["completed_trials"] == 4
    assert found.summary["gd"]["completed_trials"] == 0


def test_theory_of_one_trial_starts_from_its_weights(tmp_path):
    found = run(
        tmp_path,
        "theory=true",
        "trials=1",
        "optimizers=[dd]",
        "data.num_test=20000",
        "theory_paths=20000",
    )
    start = found.history.records[0]
    predicted = found.theory["dd"].loss
    # The test set's and the paths' own errors, of losses that vary by some 0.2 from sample to
    # sample: five standard deviations.
    assert abs(float(predicted.mean[0]) - start.test_loss) < 5 * 0.2 * math.sqrt(2 / 20000)


def test_a_prediction_that_overflows_costs_no_result(tmp_path, monkeypatch):
    def overflowing(*arguments, **settings):
        raise FloatingPointError("state_evolution: the loss is not finite at step 3")

    monkeypatch.setattr("dd.experiments.prediction.state_evolution", overflowing)
    found = run(tmp_path, "theory=true", "trials=1", "optimizers=[gd,dd]")
    note = "dd has no prediction: state_evolution: the loss is not finite at step 3"
    assert note in found.notes
    assert json.loads((tmp_path / "summary.json").read_text())["finished"]
    assert not (tmp_path / "state_evolution.csv").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["theory=true", "data.batch_size=50", "optimizers=[dd]"], "predicts full-batch training"),
        (["theory=true", "optimizers=[gd]"], "none of optimizers=.* is; add dd"),
        (["theory=maybe"], "theory must be true or false, got 'maybe'"),
        (["together=3"], "together must be true or false, got 3"),
        (["theory_paths=10"], "theory_paths must be an integer of at least 1000"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, overrides, words):
    with pytest.raises(ValueError, match=words):
        run(tmp_path, *overrides)


def test_theory_and_overlap_need_data_of_a_known_law(tmp_path, monkeypatch):
    def unknown(**settings):
        split = xor(**settings)
        object.__setattr__(split, "mixture", None)
        return split

    monkeypatch.setattr("dd.data.xor", unknown)
    with pytest.raises(ValueError, match="theory=true needs inputs of a known Gaussian mixture"):
        run(tmp_path / "a", "theory=true")
    with pytest.raises(ValueError, match=r"model\.overlap needs data of known"):
        run(tmp_path / "b", "model=informed")


def test_informed_starts_know_the_same_of_other_means():
    def start(seed):
        split = xor(dimension=300, num_train=1, num_test=1, seed=seed)
        model = informed_two_layer(
            300,
            5,
            2,
            mixture=split.mixture,
            overlap=0.7,
            hidden_scale=0.5,
            generator=torch.Generator().manual_seed(seed),
        )
        overlaps = split.mixture.means @ model[0].weight.detach().T
        return model, overlaps

    (first, one), (second, other) = start(0), start(1)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert torch.equal(first[2].weight, second[2].weight)
    assert not torch.equal(first[0].weight, second[0].weight)
    # What lies beside the means has the scale that was asked for: 1500 entries, 5 deviations.
    means = xor(dimension=300, num_train=1, num_test=1, seed=0).mixture.means
    axes = means[::2] / means[::2].norm(dim=1, keepdim=True)
    rest = first[0].weight.detach()
    rest = rest - rest @ axes.T @ axes
    assert abs(float(rest.std()) * 300**0.5 / 0.5 - 1) < 5 / math.sqrt(2 * 1500)


def test_overlaps_of_informed_starts_have_the_deviation_asked_for():
    split = xor(dimension=20, num_train=1, num_test=1)
    found = torch.stack(
        [
            split.mixture.means
            @ informed_two_layer(20, 10, 2, mixture=split.mixture, overlap=0.7, start_seed=seed)[0]
            .weight.detach()
            .T
            for seed in range(200)
        ]
    )
    # 200 · 10 · 2 independent numbers: five standard deviations.
    assert abs(float(found.square().mean().sqrt()) / 0.7 - 1) < 5 / math.sqrt(2 * 4000)
    with pytest.raises(ValueError, match="have 20 coordinates, the network 19"):
        informed_two_layer(19, 10, 2, mixture=split.mixture, overlap=0.7)
    with pytest.raises(ValueError, match="overlap must be a number"):
        informed_two_layer(20, 10, 2, mixture=split.mixture, overlap=math.inf)
