"""Experiments as the command line composes them, run in this process."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dd.experiments.experiment import Experiment

CONFIGS = Path(__file__).parents[1] / "configs"

# A run of a second, with more records and checkpoints than one.
QUICK = [
    "data.num_train=120",
    "data.num_test=100",
    "data.dimension=40",
    "steps=22",
    "tracking.record_every=5",
    "tracking.checkpoint_every=4",
    "tracking.progress=false",
    "tracking.wandb.mode=disabled",
]


def composed(*overrides: str, hydra: bool = False) -> DictConfig:
    """The configuration of ``python -m dd`` with these words; with Hydra's own, if asked."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=hydra)


def ran(folder: Path, *overrides: str) -> Experiment:
    """An experiment that has been run in a folder."""
    experiment = Experiment(composed(*overrides), folder)
    experiment.run()
    return experiment
