"""An Optuna study that outlives its search, bound to what it was a search over."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

import dd

__all__ = ["bind_study"]

# Where a study says what it was made of.
ATTRIBUTE = "decoupled-descent"


def bind_study(config: DictConfig) -> None:
    """Bind the stored study of a search to its settings, or check that it is bound to them.

    Optuna goes on with a study of the same name, so that the best of its trials may be one of other
    data. What is searched over may change.

    Args:
        config: of the multirun.

    Raises:
        ValueError: if the study was begun with other settings or data, or nobody knows with which.
    """
    sweeper = config.hydra.sweeper
    storage, name = sweeper.get("storage"), sweeper.get("study_name")
    if storage is None or name is None:
        return
    import optuna

    if OmegaConf.is_config(storage):
        storage = hydra.utils.instantiate(storage)
    now = _made_of(config)
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        study = optuna.create_study(
            study_name=name, storage=storage, directions=_directions(sweeper.get("direction"))
        )
    kept = study.user_attrs.get(ATTRIBUTE)
    if kept is None and not study.trials:
        study.set_user_attr(ATTRIBUTE, json.dumps(now))
    elif kept is None:
        raise ValueError(
            f"the study {name} of {sweeper.storage} has {len(study.trials)} trials of unknown "
            f"settings. {_REMEDY}"
        )
    elif other := _differences(json.loads(kept), now):
        raise ValueError(
            f"the study {name} of {sweeper.storage} has {len(study.trials)} trials of other "
            f"settings: {'; '.join(other)}. {_REMEDY}"
        )


_REMEDY = (
    "Its best trial could be one of those: give this search a study of its own with "
    "hydra.sweeper.study_name=..., or another hydra.sweeper.storage"
)


def _directions(given: Any) -> list[str]:
    each = [given or "minimize"] if isinstance(given, str) or given is None else list(given)
    return [str(getattr(one, "name", one)).lower() for one in each]


def _made_of(config: DictConfig) -> dict[str, str]:
    """The fixed settings of a search by their keys, its files by their content, and the version."""
    found = {"dd": dd.__version__}
    for override in OverridesParser.create().parse_overrides(list(config.hydra.overrides.task)):
        key = override.key_or_group
        if override.is_sweep_override() or key.startswith("tracking."):
            continue
        text = (
            override.value() if isinstance(override.value(), str) else override.get_value_string()
        )
        found[key] = str(text)
        if key in {"data.path", "data.test_path"} and Path(str(text)).is_file():
            content = Path(str(text)).read_bytes()
            found[key] = f"{text} (digest {hashlib.sha256(content).hexdigest()[:12]})"
    return found


def _differences(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} was {kept.get(key, 'not set')} and is {now.get(key, 'not set')}"
        for key in dict.fromkeys([*kept, *now])
        if kept.get(key) != now.get(key)
    ]
