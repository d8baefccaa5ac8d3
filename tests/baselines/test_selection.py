"""Choosing settings on a hold-out set, by K folds, or by the tracked error."""

import copy
import csv
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dd.baselines.candidate_run import CandidateRun
from dd.baselines.selection import Candidate, Selection, stratified_folds
from dd.experiments.assembly import make_model, make_split
from dd.experiments.experiment import Experiment
from dd.tracking.console import METHOD_COLUMNS, methods
from tests.composed import composed, ran

SMALL = [
    "experiment=xor",
    "lr=0.5",
    "data.num_train=100",
    "data.num_test=80",
    "data.dimension=20",
    "steps=8",
    "tracking.record_every=4",
    "tracking.progress=false",
    "tracking.wandb.mode=disabled",
]
HOLDOUT = {"by": "holdout", "folds": 5, "lr_factors": [0.3, 1.0], "weight_decays": [0.0, 0.1]}
KFOLD = {**HOLDOUT, "by": "kfold", "folds": 4}
TRACKED = {**HOLDOUT, "by": "tracked"}


def configured(*overrides):
    return composed(*SMALL, *overrides)


def given_to(name, selection):
    inside = ",".join(f"{key}:{value}" for key, value in selection.items())
    return f"available.{name}.selection={{{inside}}}".replace(" ", "")


def ran_small(folder, *overrides):
    return ran(folder, *SMALL, *overrides)


def rows_of(folder):
    with (folder / "selection.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- Folds and candidates --------------------------------------------------------------------


@given(
    targets=st.lists(st.integers(0, 3), min_size=10, max_size=80),
    folds=st.integers(2, 10),
    seed=st.integers(0, 100),
)
@settings(deadline=None)
def test_folds_have_equal_sizes_and_equal_shares_of_every_class(targets, folds, seed):
    targets = torch.tensor(targets)
    fold = stratified_folds(targets, folds, seed)
    sizes = fold.bincount(minlength=folds)
    assert int(sizes.max() - sizes.min()) <= 1
    for label in targets.unique():
        counts = fold[targets == label].bincount(minlength=folds)
        assert int(counts.max() - counts.min()) <= 1


def test_folds_follow_the_seed_and_are_shuffled():
    targets = torch.zeros(50, dtype=torch.int64)
    first, again, other = (stratified_folds(targets, 5, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, torch.arange(50) % 5)


@pytest.mark.parametrize(("settings", "parts"), [(HOLDOUT, 1), (KFOLD, 4), (TRACKED, 1)])
def test_parts_hold_out_what_they_do_not_fit(settings, parts):
    targets = torch.arange(103) % 3
    found = Selection.of_settings(settings).parts(targets, 0)
    assert len(found) == parts
    for part in found:
        assert torch.equal(torch.cat([part.fit, part.validation]).sort().values, torch.arange(103))
    held_out = torch.cat([part.validation for part in found])
    expected = {"holdout": 21, "kfold": 103, "tracked": 0}[settings["by"]]
    assert len(held_out) == len(held_out.unique()) == expected


def test_candidates_are_all_pairs():
    found = Selection.of_settings(HOLDOUT).candidates(2.0)
    assert found == [
        Candidate(0.6, 0.0),
        Candidate(0.6, 0.1),
        Candidate(2.0, 0.0),
        Candidate(2.0, 0.1),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by": "luck"}, r"selection\.by must be one of holdout, kfold, tracked, got 'luck'"),
        ({"folds": 1}, r"selection\.folds must be"),
        ({"lr_factors": []}, r"lr_factors must list one number or more"),
        ({"lr_factors": 0.1}, r"lr_factors must be a list, got 0\.1"),
        ({"weight_decays": [-1.0]}, r"each of selection\.weight_decays"),
        ({"patience": 3}, r"must have the settings by, folds, lr_factors, weight_decays"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        Selection.of_settings({**HOLDOUT, **change})


def test_more_folds_than_samples(tmp_path):
    config = configured("optimizers=[gd_kfold]", "available.gd_kfold.selection.folds=101")
    with pytest.raises(ValueError, match=r"100 training samples cannot be cut into .*folds=101"):
        Experiment(config, tmp_path / "run").run()
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_tracked_error_of_a_plain_optimizer_chooses_nothing(tmp_path):
    config = configured("optimizers=[gd_kfold]", "available.gd_kfold.selection.by=tracked")
    with pytest.raises(ValueError, match=r"no estimate of the test error to choose by"):
        Experiment(config, tmp_path)


# --- What is chosen, against a loop written out -----------------------------------------------


def loss_and_error(model, inputs, targets):
    with torch.no_grad():
        scores = model(inputs)
    return (
        float(F.cross_entropy(scores, targets)),
        float((scores.argmax(1) != targets).double().mean()),
    )


def descend(config, split, candidate, fit, validation, steps=8):
    """Gradient descent written out: the weights and the validation at every record."""
    model = make_model(config, split)
    inputs, targets = split.train_inputs, split.train_targets
    seen = {}
    for step in range(steps + 1):
        if step % 4 == 0 or step == steps:
            found = loss_and_error(model, inputs[validation], targets[validation])
            seen[step] = (*found, copy.deepcopy(model))
        loss = F.cross_entropy(model(inputs[fit]), targets[fit])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= candidate.lr * (gradient + candidate.weight_decay * parameter)
    return seen


def by_hand(config, settings):
    """Mean validation of every candidate at every record, and the best, in plain loops."""
    split = make_split(config)
    selection = Selection.of_settings(settings)
    parts = selection.parts(split.train_targets, config.seed)
    table, best = {}, None
    for candidate in selection.candidates(config.available.gd.lr):
        runs = [descend(config, split, candidate, p.fit, p.validation) for p in parts]
        for step in (0, 4, 8):
            loss, error = (sum(run[step][i] for run in runs) / len(runs) for i in (0, 1))
            table[candidate.lr, candidate.weight_decay, step] = loss, error
            if step > 0 and (best is None or (error, loss) < best[0]):
                best = (error, loss), candidate, step, runs[0][step][2]
    return split, table, best


@pytest.mark.parametrize("settings", [HOLDOUT, KFOLD], ids=["holdout", "kfold"])
def test_choice_is_that_of_plain_loops(tmp_path, settings):
    name = f"gd_{settings['by']}"
    overrides = [f"optimizers=[{name}]", given_to(name, settings), "seed=3"]
    split, table, ((error, _), candidate, step, model) = by_hand(configured(*overrides), settings)
    ran_small(tmp_path, *overrides)
    found = rows_of(tmp_path)
    assert len(found) == len(table) == 12
    for row in found:
        key = float(row["lr"]), float(row["weight_decay"]), int(row["step"])
        loss, wrong = table[key]
        assert float(row["validation_loss"]) == pytest.approx(loss, rel=1e-4)
        assert float(row["validation_error"]) == pytest.approx(wrong, abs=1e-9)
    summary = json.loads((tmp_path / "summary.json").read_text())[name]
    assert summary["chosen_lr"] == candidate.lr
    assert summary["chosen_weight_decay"] == candidate.weight_decay
    assert summary["reported_step"] == step
    assert summary["reported_error"] == pytest.approx(error, abs=1e-9)
    if settings["by"] == "kfold":
        whole = torch.arange(100)
        model = descend(configured(*overrides), split, candidate, whole, whole[:0], step)[step][2]
    test = loss_and_error(model, split.test_inputs, split.test_targets)[1]
    assert summary["reported_test_error"] == pytest.approx(test, abs=1e-9)
    assert summary["reported_gap"] == pytest.approx(abs(test - error), abs=1e-9)


def test_the_chosen_weights_are_kept(tmp_path):
    overrides = ["optimizers=[gd_holdout]", given_to("gd_holdout", HOLDOUT)]
    _, _, (_, _, step, model) = by_hand(configured(*overrides), HOLDOUT)
    ran_small(tmp_path, *overrides)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["optimizers"]["gd_holdout"]["step"] == step
    for key, value in model.state_dict().items():
        found = kept["optimizers"]["gd_holdout"]["model"][key]
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6)


def test_passes_and_samples_are_counted(tmp_path):
    summary = ran_small(
        tmp_path,
        "optimizers=[gd,sgd,gd_holdout,gd_kfold,dd_tracked]",
        given_to("gd_holdout", HOLDOUT),
        given_to("gd_kfold", KFOLD),
        given_to("dd_tracked", TRACKED),
        "available.sgd.batch_size=25",
    ).summary
    passes = {name: found["passes"] for name, found in summary.items()}
    last = summary["gd_kfold"]["reported_step"]
    assert passes == {
        "gd": 8,
        "sgd": pytest.approx(8 * 25 / 100),
        "gd_holdout": pytest.approx(4 * 8 * 0.8),
        "gd_kfold": pytest.approx(4 * 4 * 8 * 0.75 + last),
        "dd_tracked": 4 * 8,
    }
    samples = {name: found["samples"] for name, found in summary.items()}
    assert samples == {"gd": 100, "sgd": 100, "gd_holdout": 80, "gd_kfold": 100, "dd_tracked": 100}


def test_the_tracked_choice_is_that_of_the_lowest_training_error(tmp_path):
    summary = ran_small(
        tmp_path / "chosen",
        "optimizers=[dd_tracked]",
        given_to("dd_tracked", TRACKED),
    ).summary["dd_tracked"]
    lowest = []
    for rate in (0.15, 0.5):
        for decay in (0.0, 0.1):
            found = ran_small(
                tmp_path / f"{rate}_{decay}",
                "optimizers=[dd]",
                f"optimizer.lr={rate}",
                f"optimizer.weight_decay={decay}",
            ).history.select("dd", 0)
            lowest += [(r.train_error, r.train_loss, rate, decay) for r in found if r.step > 0]
    error, _, rate, decay = min(lowest)
    assert summary["reported_error"] == error
    assert (summary["chosen_lr"], summary["chosen_weight_decay"]) == (rate, decay)


# --- Candidates that diverge ------------------------------------------------------------------


def test_candidates_that_diverge_are_left_out_and_named(tmp_path):
    settings = {**HOLDOUT, "lr_factors": [1.0, 1e30], "weight_decays": [0.0]}
    experiment = ran_small(tmp_path, "optimizers=[gd_holdout]", given_to("gd_holdout", settings))
    assert any("candidates diverged and were left out: lr=5e+29" in n for n in experiment.notes)
    assert experiment.summary["gd_holdout"]["chosen_lr"] == 0.5
    assert not experiment.failures


def test_weights_that_were_not_trained_are_never_chosen():
    model = torch.nn.Linear(2, 2)
    run = CandidateRun(model, torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    for step, error in enumerate((0.1, 0.4, 0.3, 0.5)):
        torch.nn.init.constant_(model.bias, step)
        run.record(step, {"train_loss": 1.0, "train_error": error})
    judgement, weights = run.best
    assert (judgement.step, judgement.error) == (2, 0.3)
    assert weights["bias"].tolist() == [2.0, 2.0]


def test_all_candidates_diverge(tmp_path):
    settings = {**HOLDOUT, "lr_factors": [1e30], "weight_decays": [0.0]}
    experiment = ran_small(tmp_path, "optimizers=[gd_holdout,gd]", given_to("gd_holdout", settings))
    (failure,) = experiment.failures
    assert "all 1 candidates diverged" in failure
    assert "lr=5e+29" in failure
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["gd_holdout"]["completed_trials"] == 0
    assert summary["gd_holdout"]["fit_seconds"] is None
    assert summary["gd"]["completed_trials"] == 1


# --- What a run says --------------------------------------------------------------------------


def test_plain_and_self_stopping_optimizers_report_their_training_error(tmp_path):
    experiment = ran_small(tmp_path, "optimizers=[gd,dd_auto]", "tracking.record_every_auto=1")
    gd, auto = (experiment.history.select(name, 0) for name in ("gd", "dd_auto"))
    lowest = min(gd, key=lambda r: (r.train_error, r.train_loss))
    summary = experiment.summary
    assert summary["gd"]["reported_error"] == lowest.train_error
    assert summary["gd"]["reported_test_error"] == lowest.test_error
    assert summary["dd_auto"]["reported_step"] == auto[-1].step
    assert summary["dd_auto"]["reported_error"] == auto[-1].train_error


def test_table_of_methods_has_a_row_for_each(tmp_path):
    experiment = ran_small(tmp_path, "optimizers=[gd,gd_holdout]", given_to("gd_holdout", HOLDOUT))
    table = methods(experiment.summary)
    assert [column.header for column in table.columns][1:] == [
        label for label, *_ in METHOD_COLUMNS
    ]
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["gd", "gd_holdout"]
    assert cells[1][1] == f"{experiment.summary['gd_holdout']['reported_test_error']:.4f}"
    assert cells[-1] == ["100", "80"]


def test_validation_of_the_chosen_candidate_is_drawn(tmp_path):
    experiment = ran_small(tmp_path, "optimizers=[gd_holdout,dd]", given_to("gd_holdout", HOLDOUT))
    (name,) = experiment.results.validation()
    steps, errors = experiment.results.validation()[name]["error"]
    chosen = experiment.summary[name]
    own = [
        float(row["validation_error"])
        for row in rows_of(tmp_path)
        if float(row["lr"]) == chosen["chosen_lr"]
        and float(row["weight_decay"]) == chosen["chosen_weight_decay"]
    ]
    assert steps.tolist() == [0, 4, 8]
    assert errors.tolist() == own
