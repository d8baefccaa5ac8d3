"""Experiments from the command line's configuration to the run folder."""

import csv
import dataclasses
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import dd
from dd.experiments.assembly import (
    make_model,
    make_optimizer,
    make_split,
    refuse_idle_overrides,
    with_seed,
)
from dd.experiments.checkpoint import Checkpoint
from dd.experiments.collected_warnings import collected_warnings_of
from dd.experiments.experiment import Experiment
from dd.runs.optimizer_list import resolve_optimizers
from dd.tracking.history import COLUMNS
from dd.training import loop as training
from dd.training.loop import Schedule
from tests.composed import CONFIGS, composed, ran

REPOSITORY = Path(__file__).parents[2]
SMALL = [
    "data.num_train=200",
    "data.num_test=300",
    "data.dimension=50",
    "steps=12",
    "tracking.record_every=5",
    "tracking.progress=false",
    "tracking.wandb.mode=disabled",
]
SUMMARY_KEYS = {
    "final_train_error",
    "final_test_error",
    "final_train_loss",
    "final_test_loss",
    "steps",
    "best_test_error",
    "best_test_step",
    "selected_step",
    "selected_test_error",
    "mean_error_gap",
    "mean_loss_gap",
    "seconds",
    "steps_per_second",
    "fit_seconds",
    "passes",
    "samples",
    "reported_step",
    "reported_error",
    "reported_test_error",
    "reported_gap",
    "completed_trials",
}

pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


def configure(*overrides: str, experiment: str = "xor"):
    return composed(f"experiment={experiment}", *overrides)


def run(folder: Path, *overrides: str) -> Experiment:
    return ran(folder, "experiment=xor", *SMALL, *overrides)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- Configuration ---------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", [p.stem for p in (CONFIGS / "experiment").glob("*.yaml")])
def test_every_experiment_composes(experiment):
    config = configure(experiment=experiment)
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert config.name == experiment
    if experiment not in {"probe", "xor_paper"}:
        assert config.optimizers == "auto"
        assert resolve_optimizers(config, 1)[0].optimizers == ["gd", "dd", "dd_auto"]


@pytest.mark.parametrize("group", ["data", "model", "optimizer", "selection", "tracking"])
def test_every_group_member_composes(group):
    members = list((CONFIGS / group).glob("*.yaml"))
    assert members
    for path in members:
        config = configure(f"{'+' if group == 'selection' else ''}{group}={path.stem}")
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def test_defaults_are_those_of_the_published_figures():
    xor = configure()
    assert (xor.data.dimension, xor.data.num_train, xor.data.separation) == (1000, 4000, 2.5)
    assert (xor.lr, xor.steps, xor.model.width, xor.model.activation) == (0.2, 150, 8, "gelu")
    assert xor.optimizer.curvature == "auto"
    assert xor.components == "none"
    mnist = configure(experiment="noisy_mnist")
    assert (mnist.data.num_train, mnist.data.noise, mnist.model.width) == (2000, 0.5, 64)
    assert (mnist.lr, mnist.steps, mnist.model.activation) == (0.2, 300, "relu")


def test_learning_rate_reaches_both_optimizers_and_optimizer_lr_only_one():
    config = configure("lr=0.3", "optimizer.lr=0.1")
    assert config.available.gd.lr == 0.3
    assert config.optimizer.lr == 0.1


@pytest.mark.parametrize(
    ("overrides", "estimator", "known"),
    [
        ([], "Probe", False),
        (["optimizer.curvature=stein"], "Stein", True),
        (["components=known"], "Probe", True),
    ],
)
def test_cluster_ids_are_used_only_when_asked_for(overrides, estimator, known):
    config = configure(*SMALL, *overrides)
    split = make_split(config)
    optimizer = make_optimizer(config, "dd", make_model(config, split), split)
    assert type(optimizer._attachment.estimator).__name__ == estimator
    assert (optimizer.noise.components is not None) == known


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizers=[dd,adam]",
            r"optimizers must list some of gd, sgd, .* dd_auto, .* or be auto",
        ),
        ("optimizers=[]", r"optimizers must list"),
        ("optimizers=[dd,dd]", r"each once"),
        ("optimizers=dd", r"for example optimizers=\[dd\]"),
        ("components=some", "components must be one of none, known, labels, found, got 'some'"),
        ("noise_bins=0", "noise_bins must be a positive integer"),
        ("trials=0", "trials must be a positive integer, got 0"),
        ("trials=1.5", "trials must be a positive integer"),
        ("seed=-1", "seed must be a non-negative integer"),
        ("steps=0", "steps must be a positive integer, got 0"),
        ("tracking.record_every=0", "record_every must be a positive integer"),
        ("tracking.wandb.mode=dryrun", "mode must be one of online, offline, disabled"),
        ("lr=-1", "lr of optimizer gd must be a number, finite and not negative, got -1"),
        ("lr=abc", "lr of optimizer gd must be a number, finite and not negative, got 'abc'"),
        ("optimizer.lr=null", "lr of optimizer dd must be"),
        ("optimizer.damping=abc", "damping of optimizer dd must be"),
        ("available.gd.momentum=-1", "momentum of optimizer gd must be"),
        ("optimizer.name=foo", "optimizer.name must be one of gd, sgd, .* got 'foo'"),
        ("device=quantum", r"device=quantum cannot be used .*device=auto"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        Experiment(configure(*SMALL, override), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.curvature=hutch", "curvature must be one of"),
        ("optimizer.damping=2", "damping must lie"),
        ("+optimizer.foo=1", "the settings of optimizer dd do not fit.*'foo'"),
        ("data.noise=abc", "noise must be a number, finite and not negative, got 'abc'"),
        ("data.separation=null", "separation must be a number"),
        ("model.hidden_scale=abc", "hidden_scale must be a number"),
        ("model.activation=elu", "activation must be one of"),
        (
            "model._target_=dd.models.two_layer",
            "dd.models.two_layer has moved; write _target_: dd.experiments.models.two_layer",
        ),
        (
            "optimizer._target_=dd.penalised_lbfgs.LBFGS",
            "has moved; write _target_: dd.baselines.penalised_lbfgs.LBFGS",
        ),
        ("data.num_train=0", "num_train must be"),
    ],
)
def test_bad_parts_are_refused_before_anything_is_trained(tmp_path, override, message):
    experiment = Experiment(configure(*SMALL, override), tmp_path)
    with pytest.raises(ValueError, match=message):
        experiment.run()
    assert not (tmp_path / "history.csv").exists()
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizers=[gd]", "optimizer.lr=5"], "optimizer.lr=5 sets dd, which is not trained"),
        (["available.dd.lr=5"], r"available.dd.lr=5 has no effect: set dd with optimizer.\*"),
    ],
)
def test_settings_that_would_reach_no_optimizer_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        refuse_idle_overrides(configure(*overrides), overrides)


# --- The run folder --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Experiment:
    """A small run of all optimizers, each to the last step."""
    return run(tmp_path_factory.mktemp("finished"), "available.dd_auto.stop=null")


def test_history_has_every_record_of_all_optimizers(finished):
    found = rows(finished.folder)
    assert tuple(found[0]) == COLUMNS
    assert [(r["optimizer"], int(r["step"])) for r in found] == [
        *((name, step) for name in ("gd", "dd") for step in (0, 5, 10, 12)),
        *(("dd_auto", step) for step in range(13)),
    ]


def test_all_optimizers_start_from_one_network_on_one_data_set(finished):
    first = [r for r in rows(finished.folder) if r["step"] == "0"]
    for column in COLUMNS[3:]:
        assert first[0][column] == first[1][column] == first[2][column]


def test_corrected_loss_stands_beside_the_uncorrected_one(finished):
    last = {r["optimizer"]: r for r in rows(finished.folder) if r["step"] == "12"}
    assert last["gd"]["train_loss"] == last["gd"]["uncorrected_train_loss"]
    assert float(last["dd"]["train_loss"]) > float(last["dd"]["uncorrected_train_loss"])


def test_summary_maps_optimizers_to_figures_and_says_where_they_come_from(finished):
    summary = json.loads((finished.folder / "summary.json").read_text())
    assert [key for key in summary if key.startswith(("gd", "dd"))][:3] == ["gd", "dd", "dd_auto"]
    for name in ("gd", "dd", "dd_auto"):
        interval = set() if name == "gd" else {"final_error_lower", "final_error_upper"}
        assert summary[name].keys() == SUMMARY_KEYS | interval
        assert summary[name]["completed_trials"] == 1
        assert summary[name]["steps"] == 12
    assert summary["dd"]["seconds"] > 0
    # Half of the 12 updates take at least the median time.
    assert summary["dd"]["steps_per_second"] >= 6 / summary["dd"]["seconds"]
    tracked = summary["dd"]
    lower, upper = tracked["final_error_lower"], tracked["final_error_upper"]
    assert lower < tracked["final_train_error"] < upper
    assert summary["experiment"] == "xor"
    assert summary["seed"] == 0
    assert summary["torch"] == torch.__version__
    assert summary["dd_version"] == dd.__version__
    assert summary["device"].startswith(("cpu", "cuda"))
    last = [r for r in rows(finished.folder) if r["optimizer"] == "dd"][-1]
    assert summary["dd"]["final_test_error"] == float(last["test_error"])


def test_picture_and_resolved_configuration_are_there(finished):
    assert finished.figure.read_bytes().startswith(b"\x89PNG")
    config = OmegaConf.load(finished.folder / "config.yaml")
    assert config.optimizer.lr == 0.2
    assert config.data.dimension == 50


def test_checkpoint_restores_the_last_state(finished):
    content = torch.load(finished.folder / "checkpoint.pt", weights_only=True)
    config = finished.config
    split = make_split(config)
    model = make_model(config, split)
    kept = content["optimizers"]["dd"]
    assert kept["step"] == 12
    model.load_state_dict(kept["model"])
    optimizer = make_optimizer(config, "dd", model, split)
    optimizer.load_state_dict(kept["optimizer"])
    with torch.no_grad():
        error = (model(split.train_inputs).argmax(1) != split.train_targets).double().mean()
    assert float(error) == finished.history.select("dd", 0)[-1].train_error


def test_one_seed_gives_identical_histories_and_another_seed_another(tmp_path, finished):
    run(tmp_path / "again", "available.dd_auto.stop=null")
    run(tmp_path / "other", "available.dd_auto.stop=null", "seed=1")
    first, again, other = (
        (folder / "history.csv").read_bytes()
        for folder in (finished.folder, tmp_path / "again", tmp_path / "other")
    )
    assert first == again
    assert first != other


def test_a_single_optimizer_gives_the_same_figures(tmp_path, finished):
    alone = run(tmp_path, "optimizers=[dd]")
    assert alone.history.records == finished.history.select("dd", 0)
    assert set(alone.summary) == {"dd"}


def test_trials_are_runs_of_consecutive_seeds(tmp_path, finished):
    trials = run(tmp_path / "trials", "trials=2")
    second = run(tmp_path / "second", "seed=1")
    assert [r.test_loss for r in trials.history.select("dd", 0)] == [
        r.test_loss for r in finished.history.select("dd", 0)
    ]
    # Computed at once with other trials, which rounds otherwise.
    assert [r.test_loss for r in trials.history.select("dd", 1)] == pytest.approx(
        [r.test_loss for r in second.history.select("dd", 0)], abs=1e-5
    )
    summary = json.loads((tmp_path / "trials" / "summary.json").read_text())
    assert summary["trials"] == 2
    gaps = [trial["mean_loss_gap"] for trial in summary["dd"]["per_trial"]]
    assert math.isclose(summary["dd"]["mean_loss_gap"], sum(gaps) / 2)


def test_a_folder_with_a_run_is_not_overwritten(finished):
    before = (finished.folder / "history.csv").read_bytes()
    with pytest.raises(FileExistsError, match="holds another run"):
        Experiment(finished.config, finished.folder).run()
    assert (finished.folder / "history.csv").read_bytes() == before


@pytest.mark.parametrize("curvature", ["probe_create_graph", "exact"])
def test_curvatures_that_need_a_graph_get_one(tmp_path, curvature):
    experiment = run(tmp_path, f"optimizer.curvature={curvature}", "model.activation=silu")
    assert experiment.history.select("dd", 0)[-1].step == 12


def test_a_checkpoint_is_a_copy(tmp_path):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt", trial=0, origin={})
    kept = model.weight.detach().clone()
    checkpoint.keep("gd", 0, model, optimizer)
    model.weight.data.add_(1)
    checkpoint.keep("dd", 0, model, optimizer)
    content = torch.load(checkpoint.path, weights_only=True)["optimizers"]
    assert torch.equal(content["gd"]["model"]["weight"], kept)
    assert torch.equal(content["dd"]["model"]["weight"], model.weight)


# --- When training fails ---------------------------------------------------------------------


def test_divergence_keeps_the_other_optimizer_and_the_last_good_checkpoint(tmp_path):
    experiment = run(tmp_path, "available.gd.lr=1e30", "tracking.record_every=1")
    assert len(experiment.failures) == 1
    assert "gd: the training loss is" in experiment.failures[0]
    assert "at step" in experiment.failures[0]
    assert "lr=1e+30" in experiment.failures[0]
    assert experiment.history.select("dd", 0)[-1].step == 12
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["failures"] == experiment.failures
    assert summary["gd"]["completed_trials"] == 0
    assert summary["gd"]["seconds"] is None
    assert summary["dd"]["completed_trials"] == 1
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizers"]["gd"]
    assert kept["step"] == 0
    assert all(value.isfinite().all() for value in kept["model"].values())
    assert experiment.figure.exists()


def test_an_error_in_the_loop_leaves_what_was_recorded(tmp_path, monkeypatch):
    update, calls = training._update, []

    def broken(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(training, "_update", broken)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert [int(r["step"]) for r in rows(tmp_path)] == [0, 5]
    assert (tmp_path / "train_vs_test.png").exists()
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "This run did not come to its end." in report


def test_a_step_past_the_stability_edge_is_reported(tmp_path):
    calm = run(tmp_path / "calm")
    wild = run(tmp_path / "wild", "lr=30")
    assert calm.notes == []
    assert any("past the head's stability edge" in note for note in wild.notes)
    assert json.loads((tmp_path / "wild" / "summary.json").read_text())["notes"] == wild.notes


def test_labels_in_place_of_clusters_are_noted_and_found_ones_are_not(tmp_path):
    sizes = ["data.num_train=1000", "data.dimension=250", "steps=50", "optimizers=[dd]"]
    sizes += ["optimizer.curvature=stein"]
    labels = run(tmp_path / "labels", *sizes, "components=labels")
    assert len(labels.notes) == 1
    assert labels.notes[0].startswith("dd: at training forward")
    assert 'Remedy: curvature="probe"' in labels.notes[0]
    summary = json.loads((tmp_path / "labels" / "summary.json").read_text())
    assert summary["notes"] == labels.notes
    assert summary["noise"]["dd"].endswith("2 components")
    found = run(tmp_path / "found", *sizes, "components=found")
    assert found.notes == []
    assert found.noise["dd"].endswith("4 components")


def test_strained_sizes_are_noted_once_over_all_trials(tmp_path):
    settings = ["data.num_train=20", "optimizers=[dd]", "trials=2", "model.width=4"]
    strained = run(tmp_path, *settings, "together=false")
    few, large, *others = strained.notes
    assert "20 samples of dimension 50" in few
    assert "parameters that all samples share" in large
    # Of so few samples the shadows are as large as the pre-activations, too.
    assert [note for note in others if "shadows are" not in note] == []
    assert len(set(strained.notes)) == len(strained.notes)


def test_other_warnings_keep_their_way():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with collected_warnings_of() as sentences:
            warnings.warn("of someone else", UserWarning, stacklevel=1)
            warnings.warn("DecoupledDescent: of ours", dd.StrainWarning, stacklevel=1)
    assert [str(w.message) for w in caught] == ["of someone else"]
    assert sentences == ["of ours"]


def test_known_components_must_be_known():
    config = configure(*SMALL, "components=known")
    split = dataclasses.replace(make_split(config), train_components=None)
    with pytest.raises(ValueError, match="components=known, but the data of xor has no"):
        make_optimizer(config, "dd", make_model(config, split), split)


def test_schedule_looks_at_the_first_and_last_state():
    schedule = Schedule(steps=7, record_every=3, checkpoint_every=4)
    assert [s for s in range(8) if schedule.records(s)] == [0, 3, 6, 7]
    assert [s for s in range(8) if schedule.keeps(s)] == [0, 4, 7]


def test_seed_reaches_data_and_probe():
    config = with_seed(configure(*SMALL), 5)
    assert config.data.seed == config.optimizer.seed == config.available.dd.seed == 5


# --- The command -----------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603
        [sys.executable, "-m", "dd", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_command_writes_the_folder_and_prints_the_table(tmp_path):
    done = command("experiment=xor", *SMALL[:-1], f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "GD" in done.stdout
    assert "DD AUTO" in done.stdout
    assert "dd: noise model: 1 bin" in done.stdout
    assert str(tmp_path / "train_vs_test.png") in done.stdout.replace("\n", "")
    assert done.stdout.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"
    assert "Warning" not in done.stdout + done.stderr
    # One an optimizer, and one that compares them.
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 4


def test_command_says_in_one_sentence_what_is_wrong():
    done = command("experiment=noisy_mnist", "data.root=/nowhere", "data.download=false")
    assert done.returncode == 1
    assert "MNIST is not in /nowhere" in done.stderr
    assert "Traceback" not in done.stderr
