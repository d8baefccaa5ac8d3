"""The programs that draw figures, in small."""

import csv
import importlib
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = {
    "bands": ["--dimension", "40", "--steps", "10", "--trials", "2", "--simulations", "1"],
    "gap_against_n": [
        *("--samples", "60", "120", "--steps", "10", "--trials", "2", "--simulations", "1"),
    ],
    "gap_against_steps": ["--samples", "60", "120", "--steps", "10", "--trials", "2"],
    "phases": [
        *("--alphas", "1", "4", "--separations", "2", "3", "--paths", "100", "--dimension", "20"),
        *("--steps", "10", "--trials", "2", "--num-test", "50", "--at", "selected"),
    ],
    "qq": ["--dimension", "40", "--steps", "5", "--paths", "400"],
}


@pytest.fixture
def script(monkeypatch):
    """Return what imports one of the programs."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return lambda name: importlib.import_module(name)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", SMALL)
def test_every_figure_is_drawn_with_its_numbers_beside_it(script, tmp_path, capsys, name):
    out = tmp_path / "new" / f"{name}.png"
    script(f"figure_{name}").main([*SMALL[name], "--out", str(out)])
    pixels = matplotlib.image.imread(out)
    # At least six inches at 200 dots an inch, and not empty.
    assert pixels.shape[1] >= 1200
    assert np.ptp(pixels[..., :3]) > 0.9
    assert len(rows_of(out.with_suffix(".csv"))) > 3
    suffixes = {path.suffix for path in out.parent.iterdir()}
    assert suffixes == {".png", ".csv"} | ({".json"} if name == "qq" else set())
    assert str(out) in capsys.readouterr().out


def test_a_figure_is_written_as_pdf_by_its_name(script, tmp_path):
    out = tmp_path / "gap.pdf"
    script("figure_gap_against_steps").main([*SMALL["gap_against_steps"], "--out", str(out)])
    assert out.read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bands", ["nowhere"], "holds no history.csv"),
        ("bands", ["--out", "bands.pdf"], "is written as .png"),
        ("gap_against_n", ["--samples", "100"], "two different sizes"),
        ("gap_against_n", ["--trials", "1"], "standard errors are over trials"),
        ("gap_against_n", ["--samples", "100", "-5"], "-5"),
        ("gap_against_steps", ["--alpha", "0"], "expected a positive number, got '0'"),
        ("gap_against_steps", ["--trials", "1"], "standard errors are over trials"),
        ("phases", ["--alphas", "nan"], "expected a positive number, got 'nan'"),
        ("phases", ["--seed", "-1"], "--seed"),
        ("phases", ["--trials", "1"], "standard errors are over trials"),
        ("qq", ["--out", "qq.gif"], "ends in .png or .pdf, got 'qq.gif'"),
        ("qq", ["--steps", "1.5"], "expected a positive integer, got '1.5'"),
        ("qq", ["--paths", "10", "--dimension", "20"], "paths must be an integer of at least 16"),
    ],
)
def test_bad_arguments_are_explained(
    script, tmp_path, monkeypatch, capsys, name, arguments, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        script(f"figure_{name}").main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SMALL)
def test_help_says_what_is_drawn(script, capsys, name):
    with pytest.raises(SystemExit) as stopped:
        script(f"figure_{name}").main(["--help"])
    assert stopped.value.code == 0
    assert "Draw " in capsys.readouterr().out


def test_nothing_is_left_of_a_picture_that_fails(script, tmp_path):
    drawing = script("_drawing")

    class Broken:
        def savefig(self, path, **_):
            path.write_bytes(b"half")
            raise OSError

    out = tmp_path / "broken.png"
    with pytest.raises(OSError):  # noqa: PT011
        drawing.save(Broken(), out, [{"a": 1}])
    assert {path.name for path in tmp_path.iterdir()} <= {"broken.csv"}


def test_floor_is_the_mean_distance_of_two_samples(script):
    """Of 40 000 simulated pairs, whose mean |difference| has a relative error of 0.4 %."""
    floor = script("figure_gap_against_n").floor
    generator = np.random.default_rng(0)
    n, n_test, shares = 400, 900, np.array([0.2, 0.45])
    train = generator.binomial(n, shares, (40_000, 2)) / n
    test = generator.binomial(n_test, shares, (40_000, 2)) / n_test
    found = floor(torch.tensor(shares * (1 - shares)), n, n_test)
    # The normal approximation is the better part of one per cent off besides.
    assert found == pytest.approx(np.abs(train - test).mean(), rel=0.02)


def test_slope_of_a_power_law(script):
    rows = [{"n": n, "gap": 3 * n**-0.5} for n in (10, 20, 80)]
    assert script("figure_gap_against_n").slope(rows) == pytest.approx(-0.5)


def test_sizes_share_one_budget_of_samples(script, tmp_path):
    out = tmp_path / "gap.png"
    script("figure_gap_against_steps").main([*SMALL["gap_against_steps"], "--out", str(out)])
    found = {(int(row["n"]), int(row["trials"])) for row in rows_of(out.with_suffix(".csv"))}
    assert found == {(60, 4), (120, 2)}


def test_order_statistics_lie_in_their_band(script):
    """In 99 % of 20 000 normal samples, up to four binomial deviations of 0.0007."""
    gaussian = script("_gaussianity")
    values = np.sort(np.random.default_rng(0).standard_normal((20_000, 50)), axis=1)
    rank = gaussian.ranks(50)
    low, high = gaussian.band(50, rank)
    chosen = values[:, rank - 1]
    inside = ((low < chosen) & (chosen < high)).mean(0)
    np.testing.assert_allclose(inside, 0.99, atol=4 * 0.0007)


@pytest.mark.parametrize("total", [1, 2, 7, 10_000])
def test_ranks_ascend_from_the_least_to_the_largest(script, total):
    rank = script("_gaussianity").ranks(total)
    assert (rank[0], rank[-1]) == (1, total)
    assert (np.diff(rank) > 0).all()


def test_whitening_by_the_right_law_and_by_a_shifted_one(script):
    """Moments of 40 000 draws, known up to 0.005, within five errors."""
    gaussian = script("_gaussianity")
    generator = torch.Generator().manual_seed(0)
    root = torch.tensor([[2.0, 0.0], [1.5, 0.3]], dtype=torch.float64)
    law = gaussian.Law(torch.tensor([[1.0, 2.0], [-3.0, 0.0]]).double(), root @ root.T)
    components = torch.arange(40_000) % 2
    noise = torch.randn(40_000, 2, generator=generator, dtype=torch.float64)
    rows = noise @ root.T + law.means[components]
    sample = gaussian.whitened(rows, components, law)
    np.testing.assert_allclose(np.cov(sample.values.T), np.eye(2), atol=0.025)
    assert max(abs(part.mean()) for part in sample.leading) < 5 * 2**0.5 * 0.005
    assert gaussian.distance(sample.values.ravel()) < 0.01

    # A shift by one deviation along the leading axis, all of it seen there.
    axis = torch.linalg.eigh(law.covariance).eigenvectors[:, 1]
    axis = axis * axis.sum().sign() * torch.linalg.eigvalsh(law.covariance)[1].sqrt()
    moved = gaussian.whitened(rows + axis, components, law)
    np.testing.assert_allclose(moved.values - sample.values, [[1.0, 0.0]] * 40_000, atol=1e-9)


def test_a_run_folder_is_drawn_again_as_it_was_recorded(script, tmp_path):
    figure = script("figure_bands")
    found = script("_xor").Xor(30, steps=10, num_test=50).trials(["gd", "dd"], range(3))
    history = figure.recorded(found)
    history.write_csv(tmp_path / "history.csv")
    lines = ["optimizer,step,loss,loss_standard_error,error,error_standard_error"]
    lines += ["dd,0,0.7,0,0.5,0", "dd,5,0.6,0,0.4,0", "dd,10,0.5,0,0.3,0"]
    (tmp_path / "state_evolution.csv").write_text("\n".join(lines))
    again, theory = figure.read(tmp_path)
    assert again.records == history.records
    np.testing.assert_array_equal(theory["dd"]["error"], [[0, 5, 10], [0.5, 0.4, 0.3]])

    figure.main([str(tmp_path), "--out", str(tmp_path / "bands.png")])
    rows = rows_of(tmp_path / "bands.csv")
    assert [row["theory_loss"] for row in rows] == ["nan"] * 3 + ["0.7", "0.6", "0.5"]
    medians = found.metrics["dd"]["test_loss"].median(0).values
    drawn = [float(row["test_loss_median"]) for row in rows if row["optimizer"] == "dd"]
    np.testing.assert_allclose(drawn, medians)


def test_the_last_step_or_that_of_lowest_training_error(script):
    chosen = script("figure_phases").chosen
    curves = {
        "train_error": torch.tensor([[0.5, 0.1, 0.2], [0.5, 0.3, 0.1], [0.0, 0.0, 0.1]]),
        "train_loss": torch.tensor([[0.7, 0.6, 0.1], [0.7, 0.6, 0.5], [0.3, 0.2, 0.1]]),
    }
    assert chosen(curves, "final").tolist() == [[2], [2], [2]]
    assert chosen(curves, "selected").tolist() == [[1], [2], [1]]
