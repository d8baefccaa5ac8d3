"""The pictures: that they are drawn, of what, and that odd histories do not break them."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

import dd.tracking.figures
from dd.tracking.figures import train_vs_test
from dd.tracking.history import History, Record

NAN = float("nan")


def make(optimizers=("gd", "dd"), trials=1, steps=(0, 5, 10), loss=lambda step, trial: 0.5):
    history = History()
    for name in optimizers:
        for trial in range(trials):
            for step in steps:
                train = loss(step, trial)
                history.append(Record(name, trial, step, train, 0.75, 0.1, 0.25, train, 0.1))
    return history


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw a history; return the figure that was saved."""
    kept = []
    save = Figure.savefig

    def keep(figure, *arguments, **options):
        kept.append(figure)
        return save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(history, theory=None):
        train_vs_test(history, tmp_path / "train_vs_test.png", "a title", theory)
        return kept[-1]

    return draw


def text_of(figure):
    titles = [axes.get_title(where) for axes in figure.axes for where in ("left", "right")]
    return "\n".join([figure.get_suptitle(), *titles])


def line(axes, label):
    (found,) = [one for one in axes.get_lines() if one.get_label() == label]
    return found


def test_picture_is_a_png_fit_for_print(drawn, tmp_path):
    drawn(make())
    assert [path.name for path in tmp_path.iterdir()] == ["train_vs_test.png"]
    pixels = matplotlib.image.imread(tmp_path / "train_vs_test.png")
    assert pixels.shape[1] >= 150 * 7
    assert np.ptp(pixels[..., :3]) > 0.9


def test_panels_hold_the_recorded_curves(drawn):
    figure = drawn(make(loss=lambda step, trial: 1 / (1 + step)))
    error_gd, error_dd, loss_gd, loss_dd = figure.axes
    np.testing.assert_allclose(line(loss_gd, "train").get_ydata(), [1, 1 / 6, 1 / 11])
    np.testing.assert_allclose(line(loss_dd, "test").get_ydata(), [0.75] * 3)
    np.testing.assert_allclose(line(error_gd, "train").get_ydata(), [0.1] * 3)
    np.testing.assert_allclose(line(error_dd, "test").get_ydata(), [0.25] * 3)
    assert error_gd.get_ylim() == error_dd.get_ylim()
    assert loss_gd.get_ylim() == loss_dd.get_ylim()
    assert line(loss_gd, "train").get_linestyle() != line(loss_gd, "test").get_linestyle()


def test_train_is_drawn_above_test(drawn):
    for axes in drawn(make()).axes:
        labels = [one.get_label() for one in axes.get_lines()]
        assert labels.index("test") < labels.index("train")


def test_mean_gaps_and_names_are_printed(drawn):
    words = text_of(drawn(make()))
    assert words.count("0.150") == 2
    assert words.count("0.250") == 2
    for name in ("a title", "Gradient descent", "Decoupled descent"):
        assert name in words
    assert "trials" not in words


def test_many_trials_are_a_median_in_its_band(drawn):
    figure = drawn(make(trials=5, loss=lambda step, trial: [0.1, 0.2, 0.3, 0.4, 0.9][trial]))
    loss = figure.axes[2]
    np.testing.assert_allclose(line(loss, "train").get_ydata(), [0.3] * 3)
    bands = [band.get_paths()[0].vertices[:, 1] for band in loss.collections]
    assert any((min(b), max(b)) == pytest.approx((0.2, 0.4)) for b in bands)
    assert "25–75 % of 5 trials" in text_of(figure)


@pytest.mark.parametrize(
    "history",
    [
        pytest.param(make(("dd",)), id="one optimizer"),
        pytest.param(make(("gd", "dd", "other")), id="three optimizers"),
        pytest.param(make(steps=(0,)), id="one record"),
        pytest.param(make(loss=lambda step, trial: NAN if step else 0.5), id="turned NaN"),
        pytest.param(make(loss=lambda step, trial: NAN), id="NaN throughout"),
        pytest.param(make(loss=lambda step, trial: np.inf if step else 0.5), id="infinite"),
        pytest.param(make(trials=3, loss=lambda s, t: NAN if t else 0.5), id="NaN in some trials"),
        pytest.param(make(loss=lambda step, trial: 0.0), id="zero"),
    ],
)
def test_odd_histories_are_drawn(drawn, tmp_path, history):
    drawn(history)
    assert (tmp_path / "train_vs_test.png").stat().st_size > 10_000


def test_run_that_stopped_early_keeps_the_common_axis(drawn):
    history = make(("gd",), steps=(0, 5, 10))
    history.records.extend(make(("dd",), steps=(0, 5)).records)
    figure = drawn(history)
    assert line(figure.axes[3], "train").get_xdata().max() == 5
    assert figure.axes[3].get_xlim()[1] >= 10


def test_gap_of_a_diverged_run_is_called_undefined(drawn):
    words = text_of(drawn(make(("dd",), loss=lambda step, trial: NAN if step else 0.5)))
    assert "undefined" in words
    assert "nan" not in words


def test_late_explosion_does_not_flatten_the_rest(drawn):
    figure = drawn(make(loss=lambda step, trial: 1e6 if step == 10 else 0.5))
    assert figure.axes[2].get_ylim()[1] < 10


def test_empty_history_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no records"):
        train_vs_test(History(), tmp_path / "x.png", "")


def test_no_global_state_is_touched():
    assert "pyplot" not in Path(dd.tracking.figures.__file__).read_text(encoding="utf-8")


def test_failure_leaves_no_file(monkeypatch, tmp_path):
    def fail(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        train_vs_test(make(), tmp_path / "x.png", "")
    assert list(tmp_path.iterdir()) == []


def test_theory_is_drawn_over_the_optimizers_it_predicts(drawn):
    steps = np.array([0.0, 5.0, 10.0])
    theory = {"dd": {"error": (steps, steps / 50), "loss": (steps, steps / 20)}}
    gd_error, dd_error, gd_loss, dd_loss = drawn(make(), theory).axes[:4]
    np.testing.assert_array_equal(line(dd_error, "theory").get_ydata(), steps / 50)
    np.testing.assert_array_equal(line(dd_loss, "theory").get_ydata(), steps / 20)
    for axes in (gd_error, gd_loss):
        assert "theory" not in [drawn.get_label() for drawn in axes.lines]
