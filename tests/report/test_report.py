"""Reports: what they say, that they are whole, and that they cost a run nothing."""

import json
import math
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pytest

import dd.report.page
from dd.experiments.experiment import Experiment
from dd.report.charts import MOST_POINTS, Look, Series, chart, curves_of, styles_of_optimizers
from dd.report.command import main, report
from dd.report.comparison import MOST_RUNS, write_comparison
from dd.report.page import FILE, write_report
from dd.report.settings import differing_settings
from dd.report.words import best, labels_of, verdicts
from dd.runs.folder import read_run
from dd.sweep.job import SweepJob
from tests.experiments.test_experiment import configure
from tests.run_folders import STEPS, error_at, results_of, write_run

NAN = math.nan
HOSTILE = "<img src=x onerror=alert(1)></script>%{y}&amp;"
LOOK = Look("#D55E00", "circle")


class Page(HTMLParser):
    """A page taken apart: its tags, the text of each, and the figures of its charts."""

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.tags, self.words, self.figures = [], [], []
        self.code = None
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.code = dict(attributes).get("type", tag)

    def handle_endtag(self, tag):
        self.code = None

    def handle_data(self, content):
        if self.code == "application/json":
            self.figures.append(json.loads(content))
        elif self.code is None:
            self.words.append(content)

    @property
    def said(self):
        return " ".join(" ".join(self.words).split())


def page_of(folder, **options):
    return Page(write_report(write_run(folder, **options)))


def series(values, steps=None, kind="test"):
    values = np.asarray(values, dtype=np.float64)
    steps = np.arange(values.shape[1], dtype=np.float64) if steps is None else steps
    return Series("gd", kind, dict.fromkeys(("error", "loss"), (steps, values)))


# --- Charts ----------------------------------------------------------------------------------


def test_lines_are_medians_and_bands_quartiles():
    values = [[0.1, 0.9], [0.2, 0.8], [0.3, 0.1], [0.4, 0.3], [0.9, 0.2]]
    drawn = chart([series(values)], {"gd": LOOK})
    band, line = drawn.figure["data"][:2]
    assert line["x"] == [0, 1]
    assert line["y"] == [0.3, 0.3]
    assert line["customdata"] == [(0.2, 0.4), (0.2, 0.8)]
    assert band["x"] == [0, 1, 1, 0]
    assert band["y"] == [0.2, 0.2, 0.8, 0.4]


def test_what_is_no_number_is_a_gap():
    drawn = chart([series([[0.5, NAN, np.inf, 0.4]])], {"gd": LOOK})
    assert drawn.figure["data"][0]["y"] == [0.5, None, None, 0.4]
    assert "NaN" not in json.dumps(drawn.figure)


def test_long_curves_are_thinned_with_both_ends_kept():
    values = np.linspace(1, 0, 5000)[None]
    drawn = chart([series(values)], {"gd": LOOK})
    line = drawn.figure["data"][0]
    assert drawn.thinned
    assert len(line["x"]) == MOST_POINTS
    assert (line["x"][0], line["x"][-1]) == (0, 4999)
    assert not chart([series(values[:, :MOST_POINTS])], {"gd": LOOK}).thinned


def test_late_explosion_and_hidden_curves_do_not_set_the_scale():
    curves = [series([[0.5, 0.4, 1e6]]), series([[80.0, 90.0, 70.0]], kind="uncorrected")]
    drawn = chart(curves, {"gd": LOOK})
    assert drawn.figure["layout"]["yaxis"]["range"][1] == pytest.approx(1.05 * 4 * 0.5)


def test_all_curves_that_a_run_has_are_drawn(tmp_path):
    results = results_of(("gd", "gd_holdout", "dd"), trials=3)
    run = read_run(write_run(tmp_path, results, theory=("dd",)))
    kinds = {name: [each.kind for each in curves_of(run, name, name)] for name in run.optimizers}
    assert kinds == {
        "gd": ["test", "train"],
        "gd_holdout": ["test", "train", "validation"],
        "dd": ["test", "train", "uncorrected", "theory"],
    }
    found = curves_of(run, "dd", "dd")
    steps, values = found[0].curves["error"]
    np.testing.assert_array_equal(steps, STEPS)
    expected = [[error_at(2, trial, step, "test") for step in STEPS] for trial in range(3)]
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    np.testing.assert_array_equal(found[3].curves["loss"][1], [[0.7] * 4])


def test_figures_are_what_plotly_knows_and_the_uncorrected_curve_is_hidden(tmp_path):
    page = page_of(tmp_path, results=results_of(("gd", "dd"), trials=2))
    (figure,) = page.figures
    go.Figure(figure)
    # Two optimizers' test and train and one uncorrected, a line and a band each, in two panels.
    assert len(figure["data"]) == 5 * 2 * 2
    hidden = [trace["meta"] for trace in figure["data"] if not trace["visible"]]
    assert hidden == [[1, "uncorrected"]] * 4
    with pytest.raises(ValueError, match="bogus"):
        go.Figure({"data": [{"type": "scatter", "bogus": 1}]})


def test_well_known_optimizers_have_the_same_colour_everywhere():
    alone = styles_of_optimizers(["dd"])["dd"].colour
    names = ["gd", "gd_holdout", "adamw_holdout", "lbfgs_holdout", "gd_kfold", "dd", "dd_auto"]
    looks = styles_of_optimizers(names)
    assert looks["dd"].colour == alone == "#D55E00"
    assert len({look.colour for look in looks.values()}) == 7
    assert len({look.symbol for look in looks.values()}) == 7


# --- Words -----------------------------------------------------------------------------------


def test_every_method_is_told_how_true_it_is(tmp_path):
    names = ("gd", "gd_holdout", "gd_kfold", "dd")
    run = read_run(write_run(tmp_path, results_of(names, failed=("dd",))))
    said = {verdict.name: verdict.sentence for verdict in verdicts(run)}
    train, test = (error_at(0, 0, 15, side) for side in ("train", "test"))
    assert said["gd"] == (
        f"reports {train:.3f}, its training error, which is no estimate of the error on new data. "
        f"The test error is {test:.3f}, off by {test - train:.3f}."
    )
    assert said["gd_holdout"].startswith("reports 0.210, its error on training samples held out")
    assert "in turn" in said["gd_kfold"]
    assert "its tracked error" in said["dd"]
    assert said["dd"].endswith("It did not come to its end.")


def test_a_decoupled_optimizer_is_known_before_its_noise_model_is(tmp_path):
    results = results_of(("dd",))
    results.noise.clear()
    (verdict,) = verdicts(read_run(write_run(tmp_path, results)))
    assert "its tracked error" in verdict.sentence


def test_trials_that_failed_are_counted(tmp_path):
    results = results_of(("gd",), trials=3)
    del results.fits["gd", 1]
    (verdict,) = verdicts(read_run(write_run(tmp_path, results)))
    assert verdict.sentence.endswith("Only 2 of 3 trials came to their end.")


def test_the_best_is_one_that_came_to_its_end():
    figures = {"a": {"x": 0.1, "samples": None}, "b": {"x": 0.3, "samples": 9}, "c": {"x": None}}
    assert best(figures, ["x", "y"]) == {"x": "b"}


def test_optimizers_that_are_called_the_same_keep_their_names(tmp_path):
    assert labels_of(["gd", "sgd", "SGD"]) == {"gd": "Gradient descent", "sgd": "sgd", "SGD": "SGD"}
    page = page_of(tmp_path, results=results_of(("sgd", "SGD")))
    assert {trace["meta"][0] for trace in page.figures[0]["data"]} == {0, 1}


# --- The page of a run -----------------------------------------------------------------------


def test_page_has_the_table_the_settings_the_warnings_and_what_they_mean(tmp_path):
    results = results_of()
    results.note(["dd: the learning rate is past the edge"])
    page = page_of(tmp_path, results=results)
    reported = results.summary()["dd"]["reported_error"]
    test_error = results.summary()["dd"]["reported_test_error"]
    for words in (
        f"{reported:.4f}",
        f"{test_error:.4f}",
        "record_every: 5",
        "dd: the learning rate is past the edge",
        "dd: noise model: 1 bin",
        "What each number means",
        "torch 2.8",
    ):
        assert words in page.said
    headings = [tag for tag, _ in page.tags if tag in ("h1", "h2")]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert all(attributes["aria-label"] for _, attributes in page.tags if attributes.get("role"))


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_page_loads_nothing(tmp_path, kind):
    folders = [write_run(tmp_path / name, lr=rate) for name, rate in (("a", 0.1), ("b", 0.2))]
    path = report(folders if kind == "comparison" else folders[:1])
    page = Page(path)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster", "background"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    (policy,) = [a["content"] for _, a in page.tags if "http-equiv" in a]
    # The browser itself would refuse to load anything.
    assert policy.startswith("default-src 'none';")
    assert "url(" not in policy
    assert any(a.get("name") == "viewport" for _, a in page.tags)


def test_what_comes_from_the_user_is_text(tmp_path):
    results = results_of((HOSTILE, "dd"))
    results.note([f"note {HOSTILE}"])
    results.fail(f"failure {HOSTILE}")
    run = write_run(tmp_path / "a<b>", results, name=HOSTILE, extra=HOSTILE)
    for path in (write_report(run), report([run, write_run(tmp_path / "other")])):
        page = Page(path)
        assert not [tag for tag, attributes in page.tags if tag == "img" or "onerror" in attributes]
        assert page.said.count(HOSTILE) >= 4
        names = {
            trace["name"] for figure in page.figures for trace in figure["data"] if "name" in trace
        }
        assert not any("<" in name for name in names)


def test_a_run_without_test_samples_says_so(tmp_path):
    page = page_of(tmp_path, results=results_of(("gd", "dd"), tested=False))
    assert "There are no test samples, so nothing that is reported can be checked." in page.said
    assert "so there are no test curves" in page.said
    assert {trace["meta"][1] for trace in page.figures[0]["data"]} == {"train", "uncorrected"}


def test_a_run_that_broke_off_says_so(tmp_path):
    page = page_of(tmp_path, results=results_of(failed=("dd",)), finished=False)
    assert "This run did not come to its end." in page.said
    assert "dd: the training loss is nan at step 16" in page.said


def test_a_run_without_any_number_has_a_page_without_curves(tmp_path):
    results = results_of(("gd",))
    results.history.records = [
        type(record)(record.optimizer, record.trial, record.step, *[NAN] * 6)
        for record in results.history.records
    ]
    page = page_of(tmp_path, results=results)
    assert "nothing to draw" in page.said
    assert "Plotly" not in page.text


# --- Reports of real runs --------------------------------------------------------------------

TINY = [
    "data.dimension=20",
    "data.num_train=100",
    "data.num_test=50",
    "steps=6",
    "tracking.record_every=2",
    "tracking.progress=false",
    "tracking.wandb.mode=disabled",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with everything that a folder can hold."""
    config = configure(
        *TINY,
        "theory_paths=1000",
        "trials=2",
        "optimizers=[gd_holdout,dd]",
        "available.gd_holdout.selection.lr_factors=[0.3,1.0]",
        "available.gd_holdout.selection.weight_decays=[0.0]",
        experiment="xor_paper",
    )
    experiment = Experiment(config, tmp_path_factory.mktemp("run"))
    experiment.run()
    return experiment


def test_a_folder_is_read_back_as_the_run_found_it(finished):
    run = read_run(finished.folder)
    for name, trial in finished.results.fits:
        found = run.results.figures(name, trial)
        expected = finished.results.figures(name, trial)
        # The folder does not tell the number of training samples that the interval takes.
        interval = {"final_error_lower", "final_error_upper"}
        assert found == pytest.approx(
            {k: expected[k] for k in expected.keys() - interval}, nan_ok=True
        )
    assert run.results.selection == finished.results.selection
    assert run.history.completed == finished.history.completed
    for name, curves in finished.results.validation().items():
        for metric in ("error", "loss"):
            np.testing.assert_array_equal(run.results.validation()[name][metric], curves[metric])
    predicted = finished.theory["dd"].error.mean.numpy()
    np.testing.assert_array_equal(run.theory["dd"]["error"][1], predicted)


def test_every_run_writes_the_report_that_the_command_writes(finished, capsys):
    assert finished.report == finished.folder / FILE
    before = finished.report.read_text(encoding="utf-8")
    main([str(finished.folder)])
    assert capsys.readouterr().out == f"report: {finished.report}\n"
    assert finished.report.read_text(encoding="utf-8") == before


def test_no_report_where_none_is_wanted(tmp_path):
    config = configure(*TINY, "optimizers=[gd]", "tracking.report=false")
    experiment = Experiment(config, tmp_path)
    experiment.run()
    assert experiment.report is None
    assert not (tmp_path / FILE).exists()


def test_a_report_that_fails_costs_the_run_nothing(tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(dd.report.page, "write_report", broken)
    experiment = Experiment(configure(*TINY, "optimizers=[gd]"), tmp_path)
    experiment.run()
    assert json.loads((tmp_path / "summary.json").read_text())["finished"]
    assert "report.html could not be written: no such luck" in experiment.notes
    assert experiment.report is None


# --- Several runs ----------------------------------------------------------------------------


def test_settings_that_differ_are_columns_once(tmp_path):
    runs = []
    for name, rate in (("a", 0.1), ("b", 0.2)):
        own = {"name": "dd", "_target_": "dd.DecoupledDescent", "lr": rate}
        settings = {"lr": rate, "optimizer": own, "tracking": {"progress": rate > 0.1}}
        runs.append(read_run(write_run(tmp_path / name, **settings)))
    keys, values = differing_settings(runs)
    assert keys == ["lr"]
    assert [own["lr"] for own in values] == ["0.1", "0.2"]


def test_settings_of_optimizers_that_are_not_trained_are_no_columns(tmp_path):
    first = write_run(tmp_path / "a", results_of(("dd",)), available={"sgd": {"lr": 1}}, steps=5)
    other = write_run(tmp_path / "b", results_of(("dd",)), available={"sgd": {"lr": 2}}, steps=6)
    assert differing_settings([read_run(first), read_run(other)])[0] == ["steps"]


def test_jobs_of_a_multirun_stand_for_it(tmp_path):
    for number, rate in enumerate(("0.1", "0.2")):
        folder = write_run(tmp_path / "sweep" / f"{number}_0", steps=number)
        SweepJob(number, {"lr": rate}).write(folder)
    SweepJob(2, {"lr": "-1"}, "error: lr must not be negative").write(tmp_path / "sweep" / "2_0")
    page = Page(report([tmp_path / "sweep"]))
    assert (tmp_path / "sweep" / FILE).is_file()
    # What the command line varied, as in the table of the multirun, names the runs.
    assert "lr=0.1 gd" in page.said
    assert "job 2: error: lr must not be negative" in page.said
    assert len(page.figures) == 2
    beside = Page(report([tmp_path / "sweep", write_run(tmp_path / "alone")]))
    assert "sweep, job 2: error" in beside.said
    assert "3 runs" in beside.said


def test_a_comparison_has_a_chart_for_every_optimizer_and_a_row_for_every_run(tmp_path):
    first = write_run(tmp_path / "a", results_of(("gd", "dd")), seed=1)
    other = write_run(tmp_path / "b", results_of(("dd",)), seed=2)
    page = Page(report([first, other]))
    gd, dd_ = page.figures
    go.Figure(gd)
    # Test and train in two panels, of one run and of two.
    assert [len(gd["data"]), len(dd_["data"])] == [4, 8]
    rows = [(tag, a) for tag, a in page.tags if tag == "th" and a["scope"] == "row"]
    assert len(rows) == 3 + 2
    assert "seed=1" in page.said


def test_of_many_runs_those_of_the_lowest_reported_error_are_drawn(tmp_path):
    runs = []
    for number in range(MOST_RUNS + 2):
        run = read_run(write_run(tmp_path / f"run{number}", results_of(("dd",)), seed=number))
        run.optimizers["dd"]["reported_error"] = 0.9 if number in (0, 5) else 0.1
        runs.append(run)
    page = Page(write_comparison(runs, tmp_path / FILE, "many"))
    (figure,) = page.figures
    names = {trace["name"].split(",")[0] for trace in figure["data"]}
    assert len(names) == MOST_RUNS
    assert names.isdisjoint({"seed=0", "seed=5"})
    assert f"Of {MOST_RUNS + 2} runs, those {MOST_RUNS} of the lowest" in page.said


def test_different_experiments_are_compared_with_a_warning(tmp_path):
    first, other = write_run(tmp_path / "a"), write_run(tmp_path / "b", name="probe")
    page = Page(report([first, other]))
    assert "These runs are of different experiments (xor, probe)." in page.said
    assert "strong" not in [tag for tag, _ in page.tags]
    alike = Page(report([first, write_run(tmp_path / "c")]))
    assert "different experiments" not in alike.said
    assert "strong" in [tag for tag, _ in alike.tags]


# --- The command -----------------------------------------------------------------------------


def test_where_a_comparison_goes(tmp_path, monkeypatch):
    first, other = write_run(tmp_path / "x" / "a"), write_run(tmp_path / "x" / "b")
    far = write_run(tmp_path / "y" / "c")
    monkeypatch.chdir(tmp_path)
    assert report([first, other]) == (tmp_path / "x" / FILE).resolve()
    assert report([first, far]).resolve() == tmp_path / FILE
    assert report([first], tmp_path / "z.html") == tmp_path / "z.html"
    assert not (first / FILE).exists()


def test_a_file_that_is_no_report_is_not_overwritten(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / FILE).write_text("<html>mine</html>")
    with pytest.raises(FileExistsError, match="no report of this program"):
        report([folder])
    assert (folder / FILE).read_text() == "<html>mine</html>"
    (folder / FILE).unlink()
    assert report([folder]) == report([folder])


def test_wrong_folders_are_said_in_a_sentence(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["gone"], "error: gone: there is no such folder"),
        (["empty"], "error: empty has no config.yaml"),
        ([str(folder), "a"], "error: a is named twice"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert str(stopped.value).startswith(message)
    with pytest.raises(SystemExit):
        main([])
    assert "folders" in capsys.readouterr().err


def test_a_multirun_without_results_is_said(tmp_path):
    SweepJob(0, {"lr": "-1"}, "error: no").write(tmp_path / "0_0")
    with pytest.raises(ValueError, match=r"no runs with results to compare: job 0: error: no"):
        report([tmp_path])
