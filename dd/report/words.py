"""What a report says in words: how true each optimizer's report is, what each number means."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dd.runs.folder import RunFolder
from dd.runs.optimizer_list import is_tracked, known_optimizers
from dd.tracking.figures import LABELS
from dd.tracking.mark import mark

__all__ = ["GLOSSARY", "Verdict", "best", "is_tested", "labels_of", "verdicts"]

Key = TypeVar("Key")

# Trials have reasons of their own, and all of them say much the same.
MOST_REASONS = 3

# How an optimizer comes to what it reports.
SOURCES = {
    "tracked": "its tracked error on all training samples",
    "holdout": "its error on training samples held out of the fit",
    "kfold": "its mean error over training samples held out of the fit in turn",
    "plain": "its training error, which is no estimate of the error on new data",
}

GLOSSARY = {
    "error": "Share of samples that are misclassified, from 0 to 1.",
    "loss": "What training minimises, the mean over samples.",
    "step": "Updates of the weights made so far. Steps of different optimizers differ in cost; see "
    "passes and seconds.",
    "train": "On the training samples. Of decoupled descent, and of what dd.decouple follows, it "
    "is taken at the corrected pre-activations, and estimates the test curve. Of any other "
    "optimizer it falls with over-fitting.",
    "test": "On samples that no optimizer sees and that nothing is chosen by.",
    "uncorrected": "On the training samples, of the plain network that a decoupled optimizer "
    "trained: what the correction corrects.",
    "validation": "On training samples held out of the fit, with the settings chosen by it.",
    "theory": "Predicted by state evolution without any data.",
    "reported": "The error on new data that a method claims without the test samples. Of decoupled "
    "optimizers: its training error, where that is lowest or where it stopped by itself; too low, "
    "with no sign of it, where columns were chosen by the labels of the same samples. Of hold-out "
    "and K folds: the validation error. Of plain optimizers: their lowest training error.",
    "test error": "On the test samples, with the weights whose error is reported.",
    "not to be believed": "A check of a decoupled optimizer failed while it trained, so that its "
    "training error and the interval of it say nothing of new data.",
    "off by": "|reported − test error|. By chance alone, two samples of n and m independent draws "
    "from one source differ by about 0.8·√(p(1 − p)(1/n + 1/m)) at an error rate p.",
    "seconds": "Among the methods: all that the weights and the reported error took, every "
    "candidate and fold included. Among the other figures: the updates alone.",
    "passes": "Samples whose loss was differentiated, over all the training samples there are.",
    "samples": "Training samples that the weights were fitted on.",
    "90% interval": "Of the test error at the last step, from the training error of a decoupled "
    "optimizer.",
    "best test error": "The lowest of the test curve. Only an oracle could pick its step.",
    "test error at lowest train error": "At the step that the training curve alone would pick.",
    "mean |train-test|": "The distance between the two curves, the mean over recorded steps.",
    "chosen learning rate, weight decay": "Of the candidate that was judged best.",
    "several trials": "Curves are medians over trials, bands reach from the 25 % to the 75 % "
    "quartile, and figures in tables are means.",
}


@dataclass(frozen=True)
class Verdict:
    """One optimizer in a sentence.

    Attributes:
        name: of the optimizer.
        label: what it is called.
        sentence: what it reports, and how true that is.
    """

    name: str
    label: str
    sentence: str


def labels_of(names: Iterable[str]) -> dict[str, str]:
    """Return what each optimizer is called; its name where another one is called the same."""
    labels = {name: LABELS.get(name, name) for name in names}
    taken = Counter(labels.values())
    return {name: label if taken[label] == 1 else name for name, label in labels.items()}


def is_tested(run: RunFolder) -> bool:
    """Whether a run has test samples; one that never evaluated a finite test error has none."""
    return any(math.isfinite(record.test_error) for record in run.history.records)


def verdicts(run: RunFolder) -> list[Verdict]:
    """Return a verdict on each optimizer of a run."""
    labels = labels_of(run.optimizers)
    return [Verdict(name, label, _sentence(run, name)) for name, label in labels.items()]


def _sentence(run: RunFolder, name: str) -> str:
    source = SOURCES[_source(run, name)]
    figures = run.optimizers[name]
    reported, true = (_known(figures, key) for key in ("reported_error", "reported_test_error"))
    if reported is None:
        sentence = "has no error to report."
    elif true is None:
        sentence = f"reports {reported:.3f}, {source}."
    else:
        gap = _known(figures, "reported_gap")
        off = abs(reported - true) if gap is None else gap
        sentence = (
            f"reports {reported:.3f}, {source}. The test error is {true:.3f}, off by {off:.3f}."
        )
    return sentence + _doubt(figures) + _unfinished(run, name)


def _doubt(figures: Mapping[str, Any]) -> str:
    said = mark(figures)
    if not said:
        return ""
    reasons = figures["doubts"]
    more = [] if len(reasons) <= MOST_REASONS else [f"(And {len(reasons) - MOST_REASONS} more.)"]
    return f" What it reports is {said}: {' '.join([*reasons[:MOST_REASONS], *more])}"


def _source(run: RunFolder, name: str) -> str:
    """A key of :data:`SOURCES`."""
    if name in run.results.noise:
        return "tracked"
    config = run.config
    known = known_optimizers(config) if "available" in config and "optimizer" in config else {}
    settings: Mapping[str, Any] = known.get(name, {})
    if is_tracked(settings):
        return "tracked"
    return str(settings.get("selection", {}).get("by", "plain"))


def _unfinished(run: RunFolder, name: str) -> str:
    trials = run.history.trials(name)
    completed = sum(one == name for one, _ in run.results.fits)
    # A run of an earlier version does not tell.
    if "completed_trials" not in run.optimizers[name] or completed == len(trials):
        return ""
    if len(trials) == 1:
        return " It did not come to its end."
    return f" Only {completed} of {len(trials)} trials came to their end."


def best(figures: Mapping[Key, Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Key]:
    """Return for some figures whose is the lowest, of those that came to their end."""
    ended = {name: own for name, own in figures.items() if _known(own, "samples") is not None}
    found = {}
    for key in keys:
        values = {name: _known(own, key) for name, own in ended.items()}
        known = {name: value for name, value in values.items() if value is not None}
        if known:
            found[key] = min(known, key=lambda name: known[name])
    return found


def _known(figures: Mapping[str, Any], key: str) -> float | None:
    value = figures.get(key)
    return value if value is not None and math.isfinite(value) else None
