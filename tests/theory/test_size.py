"""The train-test gap is a finite-size effect: it falls as n and d grow at fixed n/d."""

from pathlib import Path

import numpy as np
import pytest

from dd.experiments.experiment import Experiment
from tests.experiments.test_experiment import configure

DIMENSIONS = (250, 500, 1000, 2000)
TRIALS = 10


def loss_gap(folder: Path, dimension: int) -> float:
    """Root mean square, over trials and recorded steps, of train minus test loss."""
    config = configure(
        f"data.dimension={dimension}",
        f"data.num_train={4 * dimension}",
        # Five times the largest training set: what is left is the gap, not the test set's noise.
        "data.num_test=40000",
        f"trials={TRIALS}",
        # Before the head's step passes its stability edge, past which size does not decide.
        "steps=100",
        "tracking.record_every=10",
        "optimizers=[dd]",
        "optimizer.curvature=stein",
        "tracking.progress=false",
        "tracking.wandb.mode=disabled",
    )
    experiment = Experiment(config, folder)
    experiment.run()
    _, train = experiment.history.curves("dd", "train_loss")
    _, test = experiment.history.curves("dd", "test_loss")
    return float(np.sqrt(np.mean((train - test) ** 2)))


@pytest.mark.slow
def test_loss_gap_falls_with_size(tmp_path):
    """The slope of log gap against log d is about -1/2.

    Sampling alone makes the gap fall like n^-1/2, and so does the remainder of the theory. The
    steps of a trial share their samples, so each size has 10 independent gaps; the root mean square
    of those has relative standard error 1/sqrt(20) = 0.22. The slope over log d = 0, 1, 2, 3 log 2
    has weights (-3, -1, 1, 3)/(10 log 2), hence standard error 0.22 · sqrt(20)/(10 log 2) = 0.14.
    Three of them either way.
    """
    gaps = [loss_gap(tmp_path / str(d), d) for d in DIMENSIONS]
    slope = np.polyfit(np.log(DIMENSIONS), np.log(gaps), 1)[0]
    print(f"loss gap {dict(zip(DIMENSIONS, gaps, strict=True))}, slope {slope:.2f}")  # noqa: T201
    assert -0.5 - 3 * 0.14 < slope < -0.5 + 3 * 0.14
