"""From a configuration to the objects it describes."""

from typing import Any

import hydra
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dd.data import Split, generator
from dd.data.seeding import check_seed
from dd.noise import NoiseModel
from dd.optimizer import DecoupledDescent

__all__ = ["make_model", "make_optimizer", "make_split", "validate", "with_seed"]


def validate(config: DictConfig) -> None:
    """Check what no single part of the configuration can check.

    Raises:
        ValueError: if ``optimizers``, ``trials`` or ``seed`` cannot be.
    """
    known = _known_optimizers(config)
    names = list(config.optimizers) if OmegaConf.is_list(config.optimizers) else None
    if not names or len(set(names)) < len(names) or any(name not in known for name in names):
        raise ValueError(
            f"optimizers must list some of {', '.join(known)}, each once, for example "
            f"optimizers=[dd]; got {config.optimizers}"
        )
    if isinstance(config.trials, bool) or not isinstance(config.trials, int) or config.trials < 1:
        raise ValueError(f"trials must be a positive integer, got {config.trials!r}")
    check_seed(config.seed)


def with_seed(config: DictConfig, seed: int) -> DictConfig:
    """Return a copy in which everything random derives from ``seed``."""
    copy = config.copy()
    copy.seed = seed
    return copy


def make_split(config: DictConfig) -> Split:
    """Return the data set on the CPU."""
    split: Split = _build(config.data)
    return split


def make_model(config: DictConfig, split: Split) -> nn.Sequential:
    """Return the network for a data set, with initial weights from the seed, on the CPU."""
    model: nn.Sequential = _build(config.model)(
        split.dimension,
        num_outputs=split.num_classes,
        generator=generator(config.seed, "initialisation"),
    )
    return model


def make_optimizer(
    config: DictConfig, name: str, model: nn.Module, split: Split
) -> torch.optim.Optimizer:
    """Return the optimizer called ``name``, attached to the model where it is a decoupled one.

    Raises:
        ValueError: if its settings are out of range.
    """
    settings = dict(_known_optimizers(config)[name])
    settings.pop("name")
    optimizer: torch.optim.Optimizer = _build(OmegaConf.create(settings))(model.parameters())
    if isinstance(optimizer, DecoupledDescent):
        known = config.components_known or settings["curvature"] == "stein"
        components = split.train_components if known else None
        optimizer.attach(model, noise=NoiseModel.isotropic(split.train_inputs, components))
    return optimizer


def _known_optimizers(config: DictConfig) -> dict[str, DictConfig]:
    # What optimizer.* overrides replaces the default settings of the same name.
    return {**config.available, config.optimizer.name: config.optimizer}


def _build(settings: DictConfig) -> Any:
    try:
        return hydra.utils.instantiate(settings)
    except InstantiationException as error:
        # The error of the part itself says what to mend; Hydra's says where it came from.
        raise error.__cause__ or error from None
