"""An Optuna study that outlives its search, bound to what it was a search over."""

import hashlib
import json
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

import dd
from dd.experiments.assembly import settled
from dd.report.settings import differences, flat_config

__all__ = ["bind_study"]

# Where a study says what it was made of.
ATTRIBUTE = "decoupled-descent"
SHOWN = 4


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
    elif other := differences(json.loads(kept), now):
        raise ValueError(
            f"the study {name} of {sweeper.storage} has {len(study.trials)} trials of other "
            f"settings: {'; '.join([*other[:SHOWN], *(['...'] if other[SHOWN:] else [])])}. "
            f"{_REMEDY}"
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
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    written, settings = flat_config(own), flat_config(settled(own))
    # What is shown and logged changes nothing that is computed.
    found = {
        key: value
        for key, value in settings.items()
        if not key.startswith("tracking.") and "${tracking." not in written.get(key, "")
    }
    for name in ("path", "test_path"):
        given = own.data.get(name)
        if given is not None and (path := Path(given).expanduser()).is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[f"data.{name}"] += f" (digest {digest[:12]})"
    return {"dd": dd.__version__, **found}
