"""Folders as runs leave them, written without a run."""

import math
from pathlib import Path

from omegaconf import OmegaConf

from dd.runs.fit import Fit, SelectionRow
from dd.runs.results import Results
from dd.runs.theory_file import COLUMNS
from dd.support.files import write_json, write_rows
from dd.tracking.history import Record

NAN = math.nan
DD = "dd.DecoupledDescent"
SGD = "torch.optim.SGD"
SETTINGS = {
    "gd": {"_target_": SGD, "lr": 0.5},
    "gd_holdout": {"_target_": SGD, "lr": 0.5, "selection": {"by": "holdout"}},
    "gd_kfold": {"_target_": SGD, "lr": 0.5, "selection": {"by": "kfold"}},
    "adamw_holdout": {"_target_": "torch.optim.AdamW", "selection": {"by": "holdout"}},
    "lbfgs_holdout": {
        "_target_": "dd.baselines.penalised_lbfgs.LBFGS",
        "selection": {"by": "holdout"},
    },
    "dd": {"_target_": DD, "lr": 0.5},
    "dd_auto": {"_target_": DD, "lr": "auto"},
}
STEPS = (0, 5, 10, 15)


def error_at(number, trial, step, side):
    """A made-up error: falls with the steps, differs between optimizers, trials and sides."""
    return (0.5 + 0.02 * trial + (0.03 if side == "test" else 0)) / (1 + step * (number + 1) / 40)


def results_of(names=("gd", "dd"), trials=1, tested=True, failed=()):
    """What a run of these optimizers would have found."""
    found = Results(num_train=100, token="0")  # noqa: S106
    for number, name in enumerate(names):
        for trial in range(trials):
            for step in STEPS:
                train, test = (error_at(number, trial, step, side) for side in ("train", "test"))
                plain = train / 2 if name.startswith("dd") else train
                test = test if tested else NAN
                found.history.append(
                    Record(name, trial, step, 2 * train, 2 * test, train, test, 2 * plain, plain)
                )
            if name in failed:
                found.fail(f"{name}: the training loss is nan at step 16")
                continue
            chosen = {}
            if "holdout" in name or "kfold" in name:
                chosen = {"lr": 0.5, "weight_decay": 0.0, "error": 0.21, "step": 10}
                found.selection += [
                    SelectionRow(name, trial, 0.5, 0.0, step, 0.6, 0.3) for step in STEPS
                ]
            found.complete(name, trial, Fit(1.0, 15.0, 1.5, 15.0, 100.0, **chosen))
        if name.startswith("dd"):
            found.noise[name] = "noise model: 1 bin"
    return found


def write_run(folder, results=None, *, name="xor", finished=True, theory=(), **settings):
    """Write the folder of a run with these results and settings, and return it."""
    results = results or results_of()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    available = {key: {"name": key, **own} for key, own in SETTINGS.items()}
    config = {
        "name": name,
        "optimizer": available["dd"],
        "available": available,
        "lr": 0.5,
        "tracking": {"record_every": 5},
        **settings,
    }
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    results.history.write_csv(folder / "history.csv")
    if results.selection:
        write_rows(folder / "selection.csv", results.selection)
    if theory:
        rows = [f"{own},{step},0.7,0.001,0.4,0.001" for own in theory for step in STEPS]
        (folder / "state_evolution.csv").write_text("\n".join([",".join(COLUMNS), *rows, ""]))
    provenance = {
        "finished": finished,
        "experiment": name,
        "seed": 0,
        "torch": "2.8",
        "failures": results.failures,
        "noise": results.noise,
        "notes": results.notes,
    }
    write_json(folder / "summary.json", {**results.summary(), **provenance})
    return folder
