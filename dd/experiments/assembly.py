"""From a configuration to the objects it describes."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from dd.baselines.selection import Candidate, Selection
from dd.data import Split, generator
from dd.data.seeding import check_seed
from dd.decouple import decouple
from dd.noise.components import find_components
from dd.noise.model import NoiseModel
from dd.optimizer import DecoupledDescent
from dd.runs.optimizer_list import (
    AUTO,
    OURS,
    is_decoupled,
    is_tracked,
    known_optimizers,
    requested_optimizers,
)
from dd.support.checks import check_count, check_number
from dd.training.batches import Batches, check_batch_size
from dd.training.joint_optimizer import JointOptimizer

__all__ = [
    "batch_size",
    "make_batches",
    "make_model",
    "make_noise",
    "make_optimizer",
    "make_selection",
    "make_split",
    "optimizer_maker",
    "optimizer_settings",
    "refuse_idle_overrides",
    "settled",
    "validate",
    "with_candidate",
    "with_seed",
]

# Modules that configurations of earlier versions name.
MOVED = {
    "dd.models": "dd.experiments.models",
    "dd.penalised_lbfgs": "dd.baselines.penalised_lbfgs",
}


GROUPS = ("data", "model", "optimizer", "available", "tracking")
COMPONENTS = ("none", "known", "labels", "found")
SWITCHES = ("theory", "together")
RATES = ("lr", "momentum", "weight_decay", "damping")


def validate(config: DictConfig) -> None:
    """Check what no single part of the configuration can check.

    Raises:
        ValueError: if ``optimizers``, ``trials``, ``seed``, ``components``, ``noise_bins``,
            ``theory``, ``theory_paths``, ``together``, ``data.batch_size``, ``resume`` or a number
            of an optimizer cannot be.
    """
    for group in GROUPS:
        if not OmegaConf.is_dict(config[group]):
            raise ValueError(f"{group} must be a group of settings, got {config[group]!r}")
    for name in SWITCHES:
        if not isinstance(config[name], bool):
            raise ValueError(f"{name} must be true or false, got {config[name]!r}")
    check_count("theory_paths", config.theory_paths, least=1000)
    if config.resume is not None:
        raise ValueError(
            "resume= belongs on the command line, and takes the settings from the folder it names"
        )
    check_seed(config.seed)
    check_count("trials", config.trials)
    check_batch_size(config.data.get("batch_size"))
    if config.noise_bins is not None:
        check_count("noise_bins", config.noise_bins)
    if config.components not in COMPONENTS:
        raise ValueError(
            f"components must be one of {', '.join(COMPONENTS)}, got {config.components!r}"
        )
    _check_optimizers(config)


def _check_optimizers(config: DictConfig) -> None:
    if config.optimizer.name not in config.available:
        raise ValueError(
            f"optimizer.name must be one of {', '.join(config.available)}, got "
            f"{config.optimizer.name!r}; choose an optimizer with optimizer=..."
        )
    known = known_optimizers(config)
    names = requested_optimizers(config)
    if not names or len(set(names)) < len(names) or any(name not in known for name in names):
        raise ValueError(
            f"optimizers must list some of {', '.join(known)}, each once, for example "
            f"optimizers=[dd], or be auto; got {config.optimizers}"
        )
    for name in names:
        for rate in RATES:
            if rate in known[name]:
                _check_rate(name, rate, known[name])
        _check_parts(name, known[name])
        if known[name].get("batch_size") is not None:
            check_count(f"batch_size of optimizer {name}", known[name].batch_size)
        make_selection(config, name)


def _check_parts(name: str, settings: DictConfig) -> None:
    """Check groups of settings that an optimizer may have: of a second one, of the correction.

    Raises:
        ValueError: if one is no group, or a number in it out of range.
    """
    for key in ("adamw", "decouple"):
        if settings.get(key) is not None and not OmegaConf.is_dict(settings[key]):
            raise ValueError(
                f"{key} of optimizer {name} must be a group of settings, got {settings[key]!r}"
            )
    for rate, value in (settings.get("adamw") or {}).items():
        if rate in RATES:
            check_number(f"adamw.{rate} of optimizer {name}", value)


def _check_rate(name: str, rate: str, settings: DictConfig) -> None:
    value = settings[rate]
    if (rate, value) != ("lr", AUTO):
        check_number(f"{rate} of optimizer {name}", value)
    elif not is_decoupled(settings):
        raise ValueError(
            f"lr of optimizer {name} must be a number, finite and not negative, got {value!r}; "
            "only decoupled descent chooses its own steps: optimizers=[dd_auto]"
        )


def refuse_idle_overrides(config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse settings of the command line that would reach no optimizer.

    Args:
        config: the composed configuration, its list of optimizers settled.
        overrides: as typed, for example ``["lr=0.1", "optimizer.curvature=stein"]``.

    Raises:
        ValueError: if one of them sets an optimizer that is not trained, or is set elsewhere.
    """
    name = config.optimizer.name
    for override in overrides:
        key = override.lstrip("+~").split("=")[0]
        if key.startswith(f"available.{name}."):
            raise ValueError(f"{override} has no effect: set {name} with optimizer.*")
        if key.startswith("optimizer.") and name not in config.optimizers:
            raise ValueError(
                f"{override} sets {name}, which is not trained: optimizers={config.optimizers}; "
                "use lr= for all optimizers, or available.<optimizer>.<setting>="
            )
        if key == "lr" and not _follows_rate(config):
            raise ValueError(
                f"{override} has no effect: no optimizer of optimizers={config.optimizers} takes "
                "its lr from there; dd_auto chooses its own steps, and others have rates of their "
                f"own: available.<optimizer>.lr=, of {name} optimizer.lr="
            )


def _follows_rate(config: DictConfig) -> bool:
    known = known_optimizers(config)
    settings = [OmegaConf.to_container(known[name]) for name in config.optimizers]
    return any("${lr}" in str(each) for each in settings)


def with_seed(config: DictConfig, seed: int) -> DictConfig:
    """Return a copy in which everything random derives from ``seed``."""
    copy = config.copy()
    copy.seed = seed
    return copy


def settled(config: DictConfig) -> DictConfig:
    """Return a copy with all references resolved but those that follow the seed of a trial."""
    twin = with_seed(config, config.seed + 1)
    raw, now, then = (
        OmegaConf.to_container(each, resolve=resolve)
        for each, resolve in ((config, False), (config, True), (twin, True))
    )
    return OmegaConf.create(_merged(raw, now, then))


def _merged(raw: Any, now: Any, then: Any) -> Any:
    """Values that differ between two seeds as they were written, all others resolved."""
    if isinstance(raw, dict):
        return {key: _merged(value, now[key], then[key]) for key, value in raw.items()}
    return now if now == then else raw


def make_split(config: DictConfig) -> Split:
    """Return the data set on the CPU."""
    settings: Any = OmegaConf.to_container(config.data, resolve=True)
    settings.pop("batch_size", None)
    with _explained("data"):
        split: Split = _build(OmegaConf.create(settings))
    return split


def make_batches(config: DictConfig, name: str, split: Split) -> Batches:
    """Return the batches of every update, the same ones for every optimizer of one batch size.

    Raises:
        ValueError: if there are fewer samples than ``data.batch_size``.
    """
    samples, size = len(split.train_inputs), batch_size(config, name)
    own = known_optimizers(config)[name].get("batch_size") is not None
    return Batches(samples, min(size, samples) if own and size else size, config.seed)


def batch_size(config: DictConfig, name: str) -> int | None:
    """Return the samples of an update of the optimizer called ``name``: its own, or the data's."""
    own = known_optimizers(config)[name].get("batch_size")
    size: int | None = config.data.get("batch_size") if own is None else own
    return size


def make_selection(config: DictConfig, name: str) -> Selection | None:
    """Return how the optimizer called ``name`` chooses its settings; None where it does not.

    Raises:
        ValueError: if what its settings say of it cannot be.
    """
    settings = optimizer_settings(config, name).get("selection")
    if settings is None:
        return None
    try:
        return Selection.of_settings(settings)
    except ValueError as error:
        raise ValueError(f"optimizer {name}: {error}") from error


def with_candidate(config: DictConfig, name: str, candidate: Candidate) -> DictConfig:
    """Return a copy in which an optimizer has the settings of a candidate."""
    copy = config.copy()
    settings = known_optimizers(copy)[name]
    settings.lr, settings.weight_decay = candidate.lr, candidate.weight_decay
    return copy


def make_model(config: DictConfig, split: Split) -> nn.Sequential:
    """Return the network for a data set, with initial weights from the seed, on the CPU."""
    with _explained("model"):
        model: nn.Sequential = _build(config.model)(
            split.dimension,
            num_outputs=split.num_classes,
            generator=generator(config.seed, "initialisation"),
            **_informed(config, split),
        )
    return model


def _informed(config: DictConfig, split: Split) -> dict[str, Any]:
    if "overlap" not in config.model:
        return {}
    if split.mixture is None:
        raise ValueError(
            f"model.overlap needs data of known component means, which {config.name} has not; use "
            "model=two_layer"
        )
    return {"mixture": split.mixture}


def make_optimizer(
    config: DictConfig,
    name: str,
    model: nn.Module,
    split: Split,
    noise: NoiseModel | None = None,
) -> torch.optim.Optimizer:
    """Return the optimizer called ``name``, with the correction of the model where it has one.

    Args:
        config: of the run.
        name: of the optimizer.
        model: to train.
        split: to train on.
        noise: model of its training inputs, where there is one already.

    Raises:
        ValueError: if its settings are out of range.
    """
    settings = optimizer_settings(config, name)
    with _explained(f"optimizer {name}"):
        made = optimizer_maker(config, name)(model.parameters())
    if is_tracked(settings) and noise is None:
        noise = make_noise(config, settings, split)
    if isinstance(made, DecoupledDescent) and settings.get("decouple") is None:
        made.attach(model, noise=noise)
        return made
    optimizers = made if isinstance(made, list) else [made]
    if settings.get("decouple") is None:
        return optimizers[0] if len(optimizers) == 1 else JointOptimizer(optimizers)
    with _explained(f"optimizer {name}"):
        tracker = decouple(model, *optimizers, noise=noise, **settings["decouple"])
    return JointOptimizer(optimizers, tracker)


def optimizer_maker(config: DictConfig, name: str) -> functools.partial[Any]:
    """Return what makes the optimizer called ``name`` from parameters."""
    settings = optimizer_settings(config, name)
    for key in OURS:
        settings.pop(key, None)
    maker: functools.partial[Any] = _build(OmegaConf.create(settings))
    return maker


def make_noise(config: DictConfig, settings: dict[str, Any], split: Split) -> NoiseModel:
    """Return the noise model of a tracked optimizer of these settings, of the training inputs."""
    correction = {"head": AUTO, "curvature": AUTO, **(settings.get("decouple") or settings)}
    components = _components(config, correction["curvature"], split)
    return NoiseModel.fit(
        split.train_inputs,
        components,
        bins=config.noise_bins,
        per_sample=False if config.noise_bins == 1 else None,
        separate_means=_separates(correction["head"], components),
    )


def _separates(head: bool | str, components: Tensor | None) -> bool | None:
    """Whether the noise model keeps the component means out; None for both forms."""
    return None if head == AUTO else components is not None and head is not False


def _components(config: DictConfig, curvature: str, split: Split) -> Tensor | None:
    source = config.components
    if source == "none" and curvature == "stein":
        source = "known"
    if source == "known" and split.train_components is None:
        raise ValueError(
            f"components=known, but the data of {config.name} has no component ids; use "
            "components=labels, found or none"
        )
    if source == "known":
        return split.train_components
    if source == "labels":
        return split.train_targets
    if source == "found":
        return find_components(split.train_inputs, split.train_targets)
    return None


def optimizer_settings(config: DictConfig, name: str) -> dict[str, Any]:
    """Return the resolved settings of the optimizer called ``name``."""
    settings: Any = OmegaConf.to_container(known_optimizers(config)[name], resolve=True)
    return dict(settings)


@contextmanager
def _explained(part: str) -> Iterator[None]:
    # Settings of a wrong type or name fail somewhere inside the part that takes them.
    try:
        yield
    except (AttributeError, TypeError) as error:
        raise ValueError(f"the settings of {part} do not fit: {error}") from error


def _build(settings: DictConfig) -> Any:
    _refuse_moved(settings.get("_target_"))
    try:
        return hydra.utils.instantiate(settings)
    except InstantiationException as error:
        # The error of the part itself says what to mend; Hydra's says where it came from.
        raise error.__cause__ or error from None


def _refuse_moved(target: Any) -> None:
    """Refuse a ``_target_`` by the name of an earlier version.

    Raises:
        ValueError: if it is one.
    """
    module, _, name = str(target).rpartition(".")
    if module in MOVED:
        raise ValueError(f"_target_: {target} has moved; write _target_: {MOVED[module]}.{name}")
