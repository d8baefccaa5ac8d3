"""The peers of decoupled descent in ``benchmarks/``, and the program that compares them."""

import importlib
import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

import dd

REPOSITORY = Path(__file__).parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"
LR, DECAY, STEPS = 0.2, 0.05, 30


@pytest.fixture
def module(monkeypatch):
    """Return what imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def data(n, d, seed=0):
    """Inputs of unequal variances and linear targets with noise, float64."""
    source = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, d, generator=source, dtype=torch.float64)
    inputs *= torch.linspace(0.5, 1.5, d, dtype=torch.float64)
    beta = torch.randn(d, generator=source, dtype=torch.float64) / math.sqrt(d)
    return inputs, inputs @ beta + 0.5 * torch.randn(n, generator=source, dtype=torch.float64)


def residuals_of_descent(inputs, targets):
    """Residuals of plain gradient descent from zero, shape (STEPS + 1, n)."""
    weight, found = torch.zeros(inputs.shape[1], dtype=inputs.dtype), []
    for _ in range(STEPS + 1):
        found.append(targets - inputs @ weight)
        weight = (1 - LR * DECAY) * weight + LR / len(inputs) * inputs.T @ found[-1]
    return torch.stack(found)


def residuals_left_out(inputs, targets):
    """Residual of every sample in a descent in which it weighs nothing, shape (STEPS + 1, n)."""
    n, d = inputs.shape
    weights, found = torch.zeros(n, d, dtype=inputs.dtype), []
    for _ in range(STEPS + 1):
        residuals = targets - weights @ inputs.T
        found.append(residuals.diagonal().clone())
        residuals.diagonal().zero_()
        weights = (1 - LR * DECAY) * weights + LR / n * residuals @ inputs
    return torch.stack(found)


def test_a_sample_left_out_obeys_the_recursion_of_the_derivation():
    inputs, targets = data(12, 8)
    n, d = inputs.shape
    decayed = (1 - LR * DECAY) * torch.eye(d) - LR / n * inputs.T @ inputs
    powers = torch.stack([torch.linalg.matrix_power(decayed, k) for k in range(STEPS)])
    pushes = LR / n * torch.einsum("id,kde,ie->ik", inputs, powers, inputs)
    found = residuals_of_descent(inputs, targets)
    for step in range(1, STEPS + 1):
        # Each row is final once those before it are.
        found[step] += torch.einsum("ik,ki->i", pushes[:, :step], found[:step].flip(0))
    torch.testing.assert_close(found, residuals_left_out(inputs, targets))


def test_traces_are_derivatives_of_the_path(module):
    inputs, targets = data(12, 8)

    def last_prediction(added):
        weight = torch.zeros(8, dtype=torch.float64)
        for step in range(5):
            pushed = targets - inputs @ weight + added[step]
            weight = (1 - LR * DECAY) * weight + LR / 12 * inputs.T @ pushed
        return inputs @ weight

    jacobian = torch.autograd.functional.jacobian(last_prediction, torch.zeros(5, 12).double())
    # What a push at step s does to the prediction of the same sample at step 5, over the samples.
    expected = jacobian.diagonal(dim1=0, dim2=2).sum(-1).flip(0) / 12
    found = module("_path_risk").traces(inputs, LR, 5, DECAY)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("steps", [6, 7])
def test_probed_traces_are_right_in_the_mean(module, steps):
    path_risk = module("_path_risk")
    inputs, _ = data(40, 20)
    draws = torch.stack(
        [
            path_risk.probed_traces(
                inputs, LR, steps, DECAY, probes=2, generator=torch.Generator().manual_seed(seed)
            )
            for seed in range(400)
        ]
    )
    # Five standard errors.
    within = 5 * draws.std(0) / math.sqrt(len(draws))
    exact = path_risk.traces(inputs, LR, steps, DECAY)
    assert draws.shape == (400, steps)
    assert ((draws.mean(0) - exact).abs() < within).all()
    assert (within < 0.1 * exact).all()


def test_path_risk_is_leave_one_out(module):
    path_risk = module("_path_risk")
    inputs, targets = data(400, 200)
    found = path_risk.path_risk(
        residuals_of_descent(inputs, targets), path_risk.traces(inputs, LR, STEPS, DECAY)
    )
    exact = residuals_left_out(inputs, targets).square().mean(1)
    # The push of one sample is off by √(2/d) of itself, its residual by no more; in the mean of n
    # squares that is √(2/d) √3 · 2/√n = 0.017, here times three.
    assert ((found - exact) / exact).abs().max() < 0.05
    assert found[0] == pytest.approx(float(targets.square().mean()))


def test_decoupled_descent_ends_in_the_ridge_and_in_its_cross_validation(module):
    methods, problems = module("_peer_methods"), module("_peer_problems")
    settings = {"weight_decay": 0.5, "spread": 3.0, "at_end": True, "lr": 0.3, "steps": 100}
    problem, models = problems.linear(60, 0, **settings), []
    tracked = methods.decoupled_ridge(problem, models.append)
    X, y, n = problem.inputs, problem.targets, len(problem.inputs)
    gram = X.T @ X / n + 0.5 * torch.eye(60)
    weight = torch.linalg.solve(gram, X.T @ y / n)
    torch.testing.assert_close(models[0][0].weight.detach().T, weight, rtol=1e-3, atol=1e-4)
    noise = dd.NoiseModel.fit(X)
    decay = methods.decay_of_ridge(0.5, noise, n)
    shares = noise.multiplicities * noise.eigenvalues / (noise.eigenvalues + decay)
    expected = (y - X @ weight).square().mean() / (1 - shares.sum() / n) ** 2
    assert float(tracked) == pytest.approx(float(expected), rel=1e-3)


def test_closed_form_of_leave_one_out_is_that_of_refitting(module):
    optimum, problems = module("_peer_optimum"), module("_peer_problems")
    problem = problems.linear(15, 0, weight_decay=0.1, at_end=True)
    X, y, n = problem.inputs.double(), problem.targets.double(), len(problem.inputs)
    errors = []
    for i in range(n):
        kept = torch.arange(n) != i
        gram = X[kept].T @ X[kept] + n * 0.1 * torch.eye(15)
        weight = torch.linalg.solve(gram, X[kept].T @ y[kept])
        errors.append((y[i] - X[i] @ weight).square())
    found = optimum.leave_one_out_ridge(problem, lambda model: None)
    assert float(found) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)


@pytest.mark.parametrize("study", ["ridge", "logistic"])
def test_gradient_descent_reaches_the_minimum_of_the_solver(module, study):
    optimum, problems = module("_peer_optimum"), module("_peer_problems")
    methods, models = module("_peer_methods"), []
    problem = problems.PROBLEMS[study](60, 0)
    for method in (methods.gradient_descent, optimum.solved):
        method(problem, models.append)
    descended, solved = (model[0].weight.detach() for model in models)
    assert (descended - solved).norm() < 2e-3 * solved.norm()


@pytest.mark.parametrize("study", ["ridge", "logistic"])
def test_randalo_is_near_leave_one_out(module, study):
    pytest.importorskip("randalo")
    optimum, problems = module("_peer_optimum"), module("_peer_problems")
    problem = problems.PROBLEMS[study](60, 0)
    exact = optimum.leave_one_out(problem, lambda model: None)
    found = optimum.randomised(problem, lambda model: None)
    # A hundred probes leave a tenth of a leverage, and approximation is as good for 120 samples.
    assert float(found) == pytest.approx(float(exact), rel=0.1, abs=0.02)


def fresh(problem, count):
    """Samples of the law that a problem's truth is told of."""
    source, law = torch.Generator().manual_seed(1), problem.truth.keywords
    inputs = torch.randn(count, problem.inputs.shape[1], generator=source)
    if problem.square:
        inputs *= law["variances"].sqrt()
        noise = 0.5 * torch.randn(count, generator=source)
        return inputs, (inputs @ law["beta"] + noise)[:, None]
    signs = 2.0 * torch.randint(2, (count, 1), generator=source) - 1
    return inputs + signs * law["mean"], signs


@pytest.mark.parametrize("study", ["linear_anisotropic", "logistic"])
def test_truth_is_the_mean_over_fresh_samples(module, study):
    problem, models = module("_peer_problems").PROBLEMS[study](20, 0), []
    module("_peer_methods").gradient_descent(problem, models.append)
    inputs, targets = fresh(problem, 100_000)
    with torch.no_grad():
        errors = problem.errors(models[-1](inputs), targets)
    within = 5 * float(errors.std()) / math.sqrt(len(errors))
    assert problem.truth(models[-1]) == pytest.approx(float(errors.mean()), abs=within)


def test_floor_is_the_mean_distance_of_an_average_of_new_samples(module):
    problems = module("_peer_problems")
    source = torch.Generator().manual_seed(0)
    linear, logistic = problems.linear(20, 0), problems.PROBLEMS["logistic"](20, 0)
    squares = torch.randn(20_000, 40, generator=source).square().mean(1)
    assert float((squares - 1).abs().mean()) == pytest.approx(linear.floor(1.0), rel=0.03)
    wrong = (torch.rand(20_000, 40, generator=source) < 0.3).float().mean(1)
    assert float((wrong - 0.3).abs().mean()) == pytest.approx(logistic.floor(0.3), rel=0.03)


def test_a_peak_of_memory_counts_what_is_held_at_once(module):
    pytest.importorskip("memray")
    problem = module("_peer_problems").linear(20, 0)

    def allocate(problem, look):
        for _ in range(3):
            torch.ones(1_000_000, dtype=torch.float64)
        return np.ones(500_000) + torch.ones(1_000_000, dtype=torch.float64)[:1].numpy()

    # Eight million bytes of torch, and twice four of numpy: one for the sum.
    assert module("_peer_measures")._peak(allocate, problem) == pytest.approx(16e6, rel=0.02)


def test_the_program_writes_every_figure_and_a_picture(module, tmp_path, capsys):
    peers, table, picture = module("peers"), tmp_path / "peers.json", tmp_path / "peers.png"
    quick = ["--quick", "--seeds", "2", "--only", "accuracy", "--json", str(table)]
    assert peers.main([*quick, "--figure", str(picture)]) == 0
    found = json.loads(table.read_text(encoding="utf-8"))
    assert found["runs"][0]["quick"]
    assert {row["study"] for row in found["rows"]} == set(peers.STUDIES)
    for row in found["rows"]:
        assert row["cost"] is None
        assert row["accuracy"]["seeds"] == 2
        for name in ("truth", "estimate", "selected", "distance", "distance_error", "floor"):
            assert row["accuracy"][name] >= 0
        assert abs(row["accuracy"]["signed"]) <= row["accuracy"]["distance"]
    pixels = matplotlib.image.imread(picture)
    assert np.ptp(pixels[..., :3]) > 0.9
    printed = capsys.readouterr().out
    for study in peers.STUDIES:
        assert study in printed


def test_the_program_measures_cost_and_joins_what_it_reads(module, tmp_path, capsys):
    peers = module("peers")
    parts = [tmp_path / f"{only}.json" for only in ("accuracy", "cost")]
    for part in parts:
        arguments = ["network", "--quick", "--only", part.stem, "--seeds", "2", "--rounds", "1"]
        peers.main([*arguments, "--json", str(part)])
    whole = tmp_path / "whole.json"
    peers.main(["--read", *map(str, parts), "--json", str(whole)])
    found = json.loads(whole.read_text(encoding="utf-8"))
    assert len(found["runs"]) == 2
    assert [row["method"] for row in found["rows"]] == list(peers.STUDIES["network"])
    for row in found["rows"]:
        assert row["accuracy"] is not None
        assert len(row["cost"]["seconds"]) == 1
    reference = found["rows"][0]["cost"]
    assert reference["time_ratio"] == 1
    assert reference["memory_ratio"] in (1, None)
    assert " 1.00 |" in capsys.readouterr().out


def row(method, distance, time_ratio, d=1000):
    """Figures of the network study."""
    accuracy = {"distance": distance, "floor": 0.01, "seeds": 5}
    cost = {"time_ratio": time_ratio}
    about = {"study": "network", "d": d, "n": 2 * d, "method": method}
    return {**about, "accuracy": accuracy, "cost": cost}


def test_claims_that_do_not_hold_are_told(module):
    missed = module("peers").missed
    good = [row("gd", 0.3, 1.0), row("gd_kfold", 0.1, 5.0), row("dd", 0.01, 2.0)]
    assert missed(good) == []
    [far] = missed([*good[:2], row("dd", 0.03, 2.0)])
    assert "DD: tracked is 3.0 floors off, beyond 2.9" in far
    [near] = missed([row("gd", 0.04, 1.0), *good[1:]])
    assert "GD: training error is 4.0 floors off only" in near
    [slow] = missed([*good[:2], row("dd", 0.01, 6.0)])
    assert "takes 6.0 times the time" in slow
    # Of several sizes the largest counts.
    assert missed([row("dd", 0.01, 9.0, d=250), row("gd_kfold", 0.1, 5.0, d=250), *good]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "studies are linear, linear_anisotropic"),
        (["--sizes", "0"], "expected a positive integer, got '0'"),
        (["--read", "nowhere.json"], "cannot read 'nowhere.json'"),
        (["--read", str(REPOSITORY / "pyproject.toml")], "cannot read"),
    ],
)
def test_what_cannot_be_measured_is_an_error(module, capsys, arguments, message):
    with pytest.raises(SystemExit):
        module("peers").main(arguments)
    assert message in capsys.readouterr().err


def test_another_file_is_not_read(module, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit):
        module("peers").main(["--read", str(other)])
    assert "was not written by this program" in capsys.readouterr().err
