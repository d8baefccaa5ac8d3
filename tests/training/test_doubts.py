"""What is not to be believed is marked wherever it is shown."""

import csv
import io
import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import dd
from dd.baselines import hyperparameter_search
from dd.experiments.experiment import Experiment
from dd.report.comparison import write_comparison
from dd.report.page import write_report
from dd.report.words import verdicts
from dd.runs.folder import read_run
from dd.runs.results import Results
from dd.sweep.job import SweepJob, described
from dd.sweep.table import Sweep, gather
from dd.tracking import figures
from dd.tracking.console import METHOD_COLUMNS, print_report
from dd.tracking.mark import mark
from dd.tracking.wandb_comparison import _table, comparison_figures
from dd.training import loop as training
from dd.training.doubts import doubts_of
from dd.watch import shadow_size
from tests.baselines.test_selection import TRACKED, given_to
from tests.experiments.test_batched_trials import configure
from tests.experiments.test_resume import assert_same_run, go_on, run_with_snapshots
from tests.report.test_report import Page
from tests.run_folders import results_of, write_run
from tests.trials.test_trials import (
    DD,
    SGD,
    bins_by_seed,
    isotropic,
    make_model,
    make_split,
    with_components,
    with_masses,
)

REASON = "The shadows grew to 0.95 of the pre-activations, more than the theory can explain."
OTHER = "Stein's curvature is not that of the loss."


def doubted(trials=1, of=(0,), names=("gd", "dd"), **options):
    """Results in which some trials of dd are doubted."""
    found = results_of(names, trials=trials, **options)
    for trial in of:
        found.doubt("dd", trial, [REASON] if trial else [REASON, OTHER])
    return found


@pytest.fixture
def tight(monkeypatch):
    """Limits that every run passes soon."""
    monkeypatch.setattr(shadow_size, "MARGIN", 0.05)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(figures, "train_vs_test", lambda history, path, *rest: path.touch())


# --- What a run keeps -------------------------------------------------------------------------


def test_the_summary_has_doubts_where_there_are_some():
    summary = doubted(trials=3, of=(0, 2)).summary()
    assert summary["dd"]["doubts"] == [REASON, OTHER]
    assert [own.get("doubts") for own in summary["dd"]["per_trial"]] == [
        [REASON, OTHER],
        None,
        [REASON],
    ]
    assert "doubts" not in summary["gd"]
    assert "doubts" not in results_of().summary()["dd"]
    assert "doubts" not in doubted().figures("dd", 0)
    assert doubted().findings("dd", 0)["doubts"] == [REASON, OTHER]


def test_the_mark_counts_trials():
    assert mark(doubted().summary()["dd"]) == "not to be believed"
    assert (
        mark(doubted(trials=5, of=(1, 3)).summary()["dd"]) == "not to be believed in 2 of 5 trials"
    )
    assert mark(doubted().summary()["gd"]) == ""


def test_the_state_of_a_run_keeps_them_and_that_of_an_earlier_version_has_none():
    found = doubted(trials=2, of=(1,))
    state = found.state_dict()
    assert Results.restored(state).doubts == found.doubts == {("dd", 1): (REASON,)}
    del state["doubts"]
    assert Results.restored(state).doubts == {}


def test_a_folder_gives_them_back(tmp_path):
    found = doubted(trials=3, of=(0, 2))
    assert read_run(write_run(tmp_path / "a", found)).results.doubts == found.doubts
    assert read_run(write_run(tmp_path / "b", doubted())).results.doubts == doubted().doubts


def test_a_plain_optimizer_has_none():
    assert doubts_of(torch.optim.SGD([torch.zeros(1)], lr=0.1)) == ()
    assert doubts_of(dd.DecoupledDescent([torch.zeros(1)], lr=0.1)) == ()


# --- Where it is shown ------------------------------------------------------------------------


def printed(summaries):
    stream = io.StringIO()
    print_report(summaries, console=Console(file=stream, width=80))
    return stream.getvalue()


@pytest.mark.parametrize(("trials", "of"), [(1, (0,)), (5, (1, 3))])
def test_the_table_marks_the_interval_and_what_is_reported(trials, of):
    names = ("gd", "dd_auto", "dd")
    summary = doubted(trials, of, names).summary()
    text = printed(summary)
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    more = "" if trials == 1 else " in 2 of 5 trials"
    assert words.count("not to be believed") == 2, text
    assert words.count(f"believed{more}") == 2
    sure = printed(results_of(names, trials).summary())
    assert "believed" not in sure


def test_a_mark_stands_below_its_own_figure():
    lines = printed(doubted().summary()).splitlines()
    (row,) = [i for i, line in enumerate(lines) if line.startswith("90% interval")]
    assert lines[row].rstrip().endswith(lines[row].split()[-1])
    assert lines[row + 1].split() == ["not", "to", "be"]
    assert lines[row + 2].split() == ["believed"]
    # dd is the last column.
    assert len(lines[row].rstrip()) == len(lines[row + 2].rstrip())
    (row,) = [i for i, line in enumerate(lines) if line.startswith("dd ")]
    reported = f"{doubted().summary()['dd']['reported_error']:.4f}"
    assert lines[row + 1].rstrip().endswith("not to be")
    assert lines[row].index(reported) + len(reported) == len(lines[row + 1].rstrip())


def test_the_page_of_a_run_says_why(tmp_path):
    folder = write_run(tmp_path, doubted())
    said = {verdict.name: verdict.sentence for verdict in verdicts(read_run(folder))}
    assert said["dd"].endswith(f"What it reports is not to be believed: {REASON} {OTHER}")
    assert "believed" not in said["gd"]
    page = Page(write_report(folder))
    reported = f"{doubted().summary()['dd']['reported_error']:.4f}"
    assert f"{reported} not to be believed" in page.said
    lower, upper = (doubted().summary()["dd"][f"final_error_{end}"] for end in ("lower", "upper"))
    assert f"{lower:.3f} to {upper:.3f} not to be believed" in page.said


def test_the_page_of_many_trials_names_some_reasons(tmp_path):
    found = results_of(trials=6)
    for trial in range(5):
        found.doubt("dd", trial, [REASON.replace("0.95", f"0.9{trial}")])
    (_, verdict) = verdicts(read_run(write_run(tmp_path, found)))
    assert "is not to be believed in 5 of 6 trials: The shadows grew to 0.90" in verdict.sentence
    assert verdict.sentence.count("The shadows") == 3
    assert verdict.sentence.endswith("(And 2 more.)")


def test_a_comparison_of_runs_marks_the_doubted_one(tmp_path):
    runs = [
        read_run(write_run(tmp_path / "a", doubted(), lr=0.1)),
        read_run(write_run(tmp_path / "b")),
    ]
    page = Page(write_comparison(runs, tmp_path / "both.html", "both"))
    before, _, _ = page.said.partition("What each number means")
    assert before.count("not to be believed") == 1


def test_weights_and_biases_has_them():
    wandb = SimpleNamespace(Table=lambda columns, data: (columns, data))
    columns, rows = _table(wandb, doubted().summary())
    assert columns[-1] == "doubts"
    assert [row[-1] for row in rows] == [None, "not to be believed"]
    assert all(len(row) == len(columns) for row in rows)
    columns, rows = _table(wandb, results_of().summary())
    assert columns == ["optimizer", *(label for label, _, _ in METHOD_COLUMNS)]
    assert comparison_figures(doubted().summary())["dd/doubts"] == [REASON, OTHER]
    assert not any("doubts" in key for key in comparison_figures(results_of().summary()))


def test_a_multirun_marks_its_jobs(tmp_path):
    for number, found in enumerate((doubted(), results_of())):
        folder = write_run(tmp_path / str(number), found)
        SweepJob.of_overrides(number, [f"lr=0.{number}"]).write(folder)
    sweep: Sweep = gather(tmp_path)
    assert [row.doubts for row in sweep.rows] == ["", "not to be believed", "", ""]
    with sweep.write_csv().open() as file:
        assert [row["doubts"] for row in csv.DictReader(file)] == [row.doubts for row in sweep.rows]
    stream = io.StringIO()
    Console(file=stream, width=120).print(sweep.table())
    assert stream.getvalue().count("dd (not to be believed)") == 1
    assert described(doubted().summary()["dd"]).endswith(", not to be believed")


# --- Runs -------------------------------------------------------------------------------------


def ran(folder, *overrides):
    experiment = Experiment(configure("theory=false", *overrides), folder)
    experiment.run()
    return experiment


def test_every_decoupled_optimizer_of_a_run_is_marked(tmp_path, tight):
    names = "optimizers=[gd,dd,dd_auto,dd_tracked]"
    experiment = ran(tmp_path, names, "trials=1", given_to("dd_tracked", TRACKED))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "doubts" not in summary["gd"]
    for name in ("dd", "dd_auto", "dd_tracked"):
        (said,) = summary[name]["doubts"]
        assert said.startswith("The shadows grew to")
        assert any(note.startswith(f"{name}: at training forward") for note in summary["notes"])
    assert "not to be believed" in (tmp_path / "report.html").read_text()
    assert experiment.results.doubts.keys() == {(n, 0) for n in ("dd", "dd_auto", "dd_tracked")}


def test_a_run_that_goes_well_is_not_marked(tmp_path):
    experiment = ran(tmp_path, "optimizers=[gd,dd]", "trials=2", "data.num_train=200")
    assert experiment.results.doubts == {}
    assert "doubts" not in (tmp_path / "summary.json").read_text()


def test_trials_computed_at_once_are_marked_as_those_one_by_one(tmp_path, tight):
    settings = ("optimizers=[gd,dd]", "tracking.record_every=1")
    at_once = ran(tmp_path / "a", *settings)
    assert any("computed at once" in note for note in at_once.notes)
    one_by_one = ran(tmp_path / "b", *settings, "together=false")
    assert at_once.results.doubts == one_by_one.results.doubts
    assert at_once.results.doubts.keys() == {("dd", trial) for trial in range(4)}
    assert any("run_trials: dd, seed" in note for note in at_once.notes)


def test_a_trial_that_fails_keeps_its_doubts(tmp_path, monkeypatch, tight):
    """Records are every five steps, and the last forward before the failure shows it, too."""
    update = training._update

    def failing(model, optimizer, *rest):
        found = update(model, optimizer, *rest)
        if isinstance(optimizer, dd.DecoupledDescent) and rest[-1] == 3:
            raise training.TrainingStopped("the training loss is nan at step 4.")
        return found

    monkeypatch.setattr(training, "_update", failing)
    experiment = ran(tmp_path, "optimizers=[gd,dd]", "trials=1")
    assert [failure.split(":")[0] for failure in experiment.failures] == ["dd"]
    assert mark(experiment.summary["dd"]) == "not to be believed"


def test_a_resumed_run_is_marked_as_the_uninterrupted_one(tmp_path, tight):
    whole = run_with_snapshots(tmp_path / "run", {24, 33, 40})
    assert ("dd", 0) in whole.results.doubts
    for update in (24, 33, 40):
        again = go_on(tmp_path / f"at_{update}")
        assert again.results.doubts == whole.results.doubts
        assert_same_run(tmp_path / "run", tmp_path / f"at_{update}")


@pytest.mark.parametrize("all_are", [False, True])
def test_a_doubted_candidate_is_chosen_only_where_all_are(tmp_path, monkeypatch, all_are):
    settings = ["optimizers=[dd_tracked]", "trials=1", given_to("dd_tracked", TRACKED)]
    best = ran(tmp_path / "sure", *settings).summary["dd_tracked"]["chosen_lr"]

    def doubt(optimizer):
        return (REASON,) if all_are or optimizer.param_groups[0]["lr"] == best else ()

    monkeypatch.setattr(hyperparameter_search, "doubts_of", doubt)
    found = ran(tmp_path / "doubted", *settings)
    assert (found.summary["dd_tracked"]["chosen_lr"] == best) == all_are
    left_out = [note for note in found.notes if "is not to be believed were left out" in note]
    assert len(left_out) == (not all_are)
    assert all(f"lr={best:g}" in note for note in left_out)


# --- Many trials ------------------------------------------------------------------------------


def first_doubt(make, seed, noise, steps):
    """Step and share at which a trial by itself is first doubted, looked at in every forward."""
    split = make_split(seed)
    model = make_model(seed, split)
    optimizer = make(model, noise=noise)
    for step in range(steps + 1):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(split.train_inputs), split.train_targets)
        if doubts_of(optimizer):
            return step, optimizer._attachment.oversight._size.found
        loss.backward()
        optimizer.step()
    return None


def with_wide_masses(split):
    """Masses in some trials that raise their limits by a third."""
    noise = with_masses(split)
    if noise.relative_mass is None:
        return noise
    return replace(noise, relative_mass=torch.tensor([1.9, 0.1]).double().repeat(100))


@pytest.mark.filterwarnings("ignore::dd.ShadowWarning")
@pytest.mark.parametrize("noise", [isotropic, bins_by_seed, with_components, with_wide_masses])
def test_batched_and_looped_trials_are_doubted_alike(monkeypatch, noise):
    """At limits among the shares that are reached, so that steps differ."""
    monkeypatch.setattr(shadow_size, "MARGIN", 0.33)
    make = partial(DD, head=False)
    seeds, steps = [0, 4, 7, 9], 25
    found = dd.run_trials(
        make_split, make_model, {"gd": SGD, "dd": make}, seeds=seeds, steps=steps, noise=noise
    )
    assert {doubt.name for doubt in found.doubts} <= {"dd"}
    by_seed = {doubt.seed: (doubt.step, doubt.share) for doubt in found.doubts}
    for seed in seeds:
        expected = first_doubt(make, seed, noise(make_split(seed)), steps)
        assert (by_seed.get(seed) is None) == (expected is None)
        if expected is not None:
            step, share = by_seed[seed]
            assert step == expected[0]
            assert share == pytest.approx(expected[1], rel=1e-9)
    assert found.doubts


def test_doubted_trials_are_told_in_a_warning_and_in_print(tight):
    with pytest.warns(dd.ShadowWarning, match=r"run_trials: dd, seed 0: after \d+ updates") as said:
        found = dd.run_trials(
            make_split,
            make_model,
            {"gd": SGD, "dd": partial(DD, head=False)},
            seeds=[0, 1],
            steps=7,
            record_every=3,
            noise=isotropic,
            memory=1,
        )
    # Once, though each trial was a chunk of its own.
    assert len(said) == 1
    assert said[0].filename == __file__
    assert [(doubt.name, doubt.seed) for doubt in found.doubts] == [("dd", 0), ("dd", 1)]
    assert {doubt.step for doubt in found.doubts} <= {3, 6, 7}
    assert "; 2 not to be believed;" in repr(found)


def test_trials_that_go_well_have_no_doubts():
    """Warnings are errors here."""
    found = dd.run_trials(
        make_split, make_model, {"gd": SGD, "dd": partial(DD, head=False)}, seeds=[0, 1], steps=9
    )
    assert found.doubts == ()
    assert "believed" not in repr(found)
    assert math.isfinite(found.seconds)
