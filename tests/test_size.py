"""The train-test gap is a finite-size effect: it falls as n and d grow at fixed n/d."""

from pathlib import Path

import numpy as np
import pytest

from dd.experiment import Experiment
from tests.test_experiment import configure

DIMENSIONS = (250, 500, 1000, 2000)
TRIALS = 6


def mean_loss_gap(folder: Path, dimension: int) -> float:
    config = configure(
        f"data.dimension={dimension}",
        f"data.num_train={4 * dimension}",
        f"trials={TRIALS}",
        # Before the head's step passes its stability edge, past which size does not decide.
        "steps=100",
        "optimizers=[dd]",
        "optimizer.curvature=stein",
        "tracking.progress=false",
        "tracking.wandb.mode=disabled",
    )
    experiment = Experiment(config, folder)
    experiment.run()
    return experiment.summary["dd"]["mean_loss_gap"]


@pytest.mark.slow
def test_loss_gap_falls_with_size(tmp_path):
    """The slope of log gap against log d.

    Sampling alone makes the gap fall like n^-1/2, slope -0.5; the remainder of the theory falls at
    least as fast. The mean of 6 absolute Gaussians has relative standard error
    sqrt(π/2 - 1)/sqrt(6) = 0.31; the slope over log d = 0, 1, 2, 3 log 2 has weights
    (-3, -1, 1, 3)/(10 log 2), hence standard error 0.31 · sqrt(20)/(10 log 2) = 0.20.
    Two of them on the side that would not fall leave -0.1.
    """
    gaps = [mean_loss_gap(tmp_path / str(d), d) for d in DIMENSIONS]
    slope = np.polyfit(np.log(DIMENSIONS), np.log(gaps), 1)[0]
    print(f"mean loss gap {dict(zip(DIMENSIONS, gaps, strict=True))}, slope {slope:.2f}")  # noqa: T201
    assert slope < -0.1
    assert slope > -1.1
    assert gaps[-1] < gaps[0]
