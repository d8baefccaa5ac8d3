"""The figures that the README states, at full size."""

import os
from pathlib import Path

import pytest

from dd.experiments.experiment import Experiment
from tests.experiments.test_experiment import configure

QUIET = ["tracking.progress=false", "tracking.wandb.mode=disabled"]
DIGITS = Path(os.environ.get("DD_DATA") or Path(__file__).parents[2] / "shared" / "data")

pytestmark = pytest.mark.slow

FEATURES = DIGITS / "cifar10_efficientnet_lite0.npz"
needs_features = pytest.mark.skipif(
    not FEATURES.is_file(), reason=f"no features in {DIGITS}; set DD_DATA"
)
needs_digits = pytest.mark.skipif(
    not (DIGITS / "MNIST" / "raw").is_dir(), reason=f"no MNIST in {DIGITS}; set DD_DATA"
)


def summary(folder: Path, experiment: str, *overrides: str) -> dict[str, dict[str, float]]:
    settings = [*QUIET, "optimizers=[gd,dd]", *overrides]
    run = Experiment(configure(*settings, experiment=experiment), folder)
    run.run()
    assert not run.failures
    return run.summary


@pytest.mark.parametrize(("curvature", "error_gap"), [("stein", 0.010), ("probe", 0.012)])
def test_xor(tmp_path, curvature, error_gap):
    figures = summary(tmp_path, "xor", "trials=5", f"optimizer.curvature={curvature}")
    gd, decoupled = figures["gd"], figures["dd"]
    assert decoupled["mean_error_gap"] <= error_gap
    assert decoupled["mean_loss_gap"] <= 0.02
    assert gd["mean_error_gap"] >= 0.15
    assert decoupled["best_test_error"] <= gd["best_test_error"] - 0.03
    assert decoupled["selected_test_error"] <= decoupled["best_test_error"] + 0.01


@needs_digits
def test_noisy_mnist(tmp_path):
    figures = summary(tmp_path, "noisy_mnist", "trials=3", f"data.root={DIGITS}")
    assert figures["dd"]["mean_error_gap"] <= 0.012
    assert figures["gd"]["mean_error_gap"] >= 0.2
    assert figures["dd"]["best_test_error"] <= figures["gd"]["best_test_error"] + 0.005


@needs_features
@pytest.mark.parametrize("samples", [1000, 3000])
def test_features_are_at_the_sampling_floor(tmp_path, samples):
    """The mean of 5 absolute Gaussians is 0.80 ± 0.60/sqrt(5) of their deviation; see below.

    All tests share their 2000 test samples, so that the allowance of three standard errors is a
    little narrow.
    """
    figures = summary(
        tmp_path, "cifar10_probe", "trials=5", f"data.path={FEATURES}", f"data.num_train={samples}"
    )
    gd, decoupled = figures["gd"], figures["dd"]
    error = decoupled["final_test_error"]
    deviation = (error * (1 - error) * (1 / samples + 1 / 2000)) ** 0.5
    assert decoupled["mean_error_gap"] <= deviation * (0.80 + 3 * 0.60 / 5**0.5)
    assert gd["mean_error_gap"] >= 10 * decoupled["mean_error_gap"]
    assert decoupled["best_test_error"] <= gd["best_test_error"] + 0.005


LOOPS = {
    "full batch": [],
    "momentum": ["data.batch_size=100", "lr=0.03", "optimizer.momentum=0.9"],
    "batches of 20": ["data.batch_size=20", "lr=0.1", "steps=600", "tracking.record_every=20"],
}


@needs_digits
@pytest.mark.parametrize("loop", LOOPS)
def test_noisy_mnist_with_a_small_head_is_at_the_sampling_floor(tmp_path, loop):
    """Where the identity is exact, the gap is that of two samples of one error rate p.

    Its standard deviation is sqrt(p(1 - p)(1/n + 1/n_test)), 0.0114 at p = 0.24; the mean of 8
    absolute Gaussians is sqrt(2/π) = 0.80 of that, give or take 0.60/sqrt(8) of it. The signed mean
    has standard error 0.0114/sqrt(8). Three standard errors are allowed.
    """
    trials = 8
    overrides = [f"trials={trials}", "model.width=16", "model.activation=tanh", "optimizers=[dd]"]
    overrides += ["correct_head=false", "noise_bins=1", *LOOPS[loop]]
    run = Experiment(
        configure(*QUIET, *overrides, f"data.root={DIGITS}", experiment="noisy_mnist"), tmp_path
    )
    run.run()
    _, train = run.history.curves("dd", "train_error")
    _, test = run.history.curves("dd", "test_error")
    error = float(test[:, test.shape[1] // 4 :].mean())
    deviation = (error * (1 - error) * (1 / 2000 + 1 / 5000)) ** 0.5
    assert abs((train - test).mean()) <= 3 * deviation / trials**0.5
    assert abs(train - test).mean() <= deviation * (0.80 + 3 * 0.60 / trials**0.5)
