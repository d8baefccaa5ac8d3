"""State evolution of an experiment's decoupled optimizers."""

from collections.abc import Mapping

import numpy as np
import torch
from omegaconf import DictConfig

from dd.data import Split
from dd.experiments.assembly import make_model, optimizer_settings, with_seed
from dd.runs.optimizer_list import AUTO, is_decoupled
from dd.theory.state_evolution import StateEvolution, state_evolution
from dd.tracking.history import Array, History

__all__ = ["check_theory", "curves", "deviations", "predicted"]


# As arguments of state_evolution; what an optimizer's settings do not name is the default of both.
RULE = ("momentum", "dampening", "weight_decay", "nesterov", "damping")

# Settings that change the rule otherwise.
BEYOND = ("decoupled_weight_decay", "maximize")


def check_theory(config: DictConfig, split: Split) -> None:
    """Check that state evolution knows of the training.

    Raises:
        ValueError: if the law of the inputs is unknown, the batches are not full, or no optimizer
            can be predicted.
    """
    settings = [optimizer_settings(config, name) for name in config.optimizers]
    if not any(map(_is_predictable, settings)):
        raise ValueError(
            f"theory=true predicts decoupled descent of a numeric rate, and none of "
            f"optimizers={config.optimizers} is; add dd"
        )
    if split.mixture is None:
        raise ValueError(
            f"theory=true needs inputs of a known Gaussian mixture, which those of {config.name} "
            "are not; use theory=false, or experiment=xor"
        )
    if config.data.get("batch_size") is not None:
        raise ValueError(
            f"theory=true predicts full-batch training; data.batch_size={config.data.batch_size} "
            "should be null"
        )


def predicted(
    config: DictConfig, split: Split, device: torch.device, *, progress: bool
) -> tuple[dict[str, StateEvolution], list[str]]:
    """Predict the curves of every decoupled optimizer of a numeric rate, and say where none is.

    Several trials are predicted as a mean over the law of their initial weights, a single one from
    its own.

    Args:
        config: its list of optimizers settled.
        split: of the first trial, whose means all trials have up to a rotation.
        device: where to compute.
        progress: whether to show it.
    """
    found, notes = {}, []
    for name in config.optimizers:
        if not _is_predictable(optimizer_settings(config, name)):
            continue
        unknown = [key for key in BEYOND if optimizer_settings(config, name).get(key)]
        if unknown:
            notes.append(f"{name} has no prediction: state evolution does not know {unknown[0]}")
            continue
        try:
            found[name] = _predicted(config, name, split, device, progress=progress)
        except FloatingPointError as error:
            notes.append(f"{name} has no prediction: {error}")
    return found, notes


def _is_predictable(settings: Mapping[str, object]) -> bool:
    return is_decoupled(settings) and settings["lr"] != AUTO


def _predicted(
    config: DictConfig, name: str, split: Split, device: torch.device, *, progress: bool
) -> StateEvolution:
    settings = optimizer_settings(config, name)
    assert split.mixture is not None

    def drawn(generator: torch.Generator) -> torch.nn.Module:
        return make_model(with_seed(config, generator.initial_seed() % 2**31), split)

    return state_evolution(
        make_model(config, split) if config.trials == 1 else drawn,
        split.mixture,
        alpha=len(split.train_inputs) / split.dimension,
        steps=config.steps,
        lr=settings["lr"],
        **{key: settings[key] for key in RULE if key in settings},
        paths=config.theory_paths,
        record_every=config.tracking.record_every,
        seed=config.seed,
        device=device,
        progress=progress,
    )


def curves(found: StateEvolution) -> dict[str, tuple[Array, Array]]:
    """Steps and values of the predicted error and loss, each of shape (T,)."""
    steps = found.steps.double().numpy()
    return {"error": (steps, found.error.mean.numpy()), "loss": (steps, found.loss.mean.numpy())}


def deviations(theory: Mapping[str, StateEvolution], history: History) -> list[str]:
    """A sentence for each optimizer on how far the trials' median test curves are from theory."""
    return [
        f"{name}: state evolution is {_furthest(found, history, name, 'error')} of the median test "
        f"error and {_furthest(found, history, name, 'loss')} of the median test loss at every "
        "recorded step"
        for name, found in theory.items()
    ]


def _furthest(found: StateEvolution, history: History, name: str, metric: str) -> str:
    steps, values = history.curves(name, f"test_{metric}")
    known, predicted = curves(found)[metric]
    values, predicted = values[:, np.isin(steps, known)], predicted[np.isin(known, steps)]
    # Trials that failed have no numbers from there on.
    left = np.isfinite(values).any(0)
    median = np.nanmedian(values[:, left], axis=0)
    error = getattr(found, metric).standard_error.max()
    furthest = np.abs(median - predicted[left]).max()
    return f"within {furthest:.4f} (Monte-Carlo error up to {error:.4f})"
