"""What was read of a user's files, in a table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dd.data.tables.listed import listed

__all__ = ["DataWarning", "Reading", "described"]

SHOWN = 20


class DataWarning(UserWarning):
    """Errors on the test samples may not be what they seem, or samples not what was meant."""


@dataclass(frozen=True)
class Reading:
    """What was read, and what was made of it.

    Attributes:
        files: of the training samples, and of the test samples where they have one of their own.
        train_samples: number of training samples.
        test_samples: number of test samples.
        features: number of features of a sample.
        left_out: columns that are none of the features, and why.
        constant: features that are constant in the training samples, up to rounding, and set to 0.
        classes: for each class the numbers of training and of test samples.
        notes: how files were understood where more than one way was open.
        doubts: why an error on the test samples may not be what it seems.
    """

    files: Sequence[str]
    train_samples: int
    test_samples: int
    features: int
    left_out: Mapping[str, str]
    constant: Sequence[str]
    classes: Mapping[str, Sequence[int]]
    notes: Sequence[str] = ()
    doubts: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return it in types that JSON can hold."""
        return asdict(self)


def described(reading: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the table of :meth:`Reading.as_dict`: what a row is called, and what it says."""
    tested = reading["test_samples"] > 0
    rows = [
        ("read from", ", ".join(reading["files"])),
        ("samples", f"{reading['train_samples']} to train, {reading['test_samples']} to test"),
        ("features", str(reading["features"])),
        (
            "columns left out",
            _all([f"{name} ({why})" for name, why in reading["left_out"].items()]),
        ),
        ("constant, set to 0", _all(reading["constant"])),
        # Files with a missing value are refused.
        ("missing values", "none"),
        (
            f"classes: samples to train{'/test' * tested}",
            _all(
                [
                    f"{name}: {train}" + (f"/{test}" if tested else "")
                    for name, (train, test) in reading["classes"].items()
                ]
            ),
        ),
    ]
    rows += [("note", note) for note in reading["notes"]]
    return rows + [("WARNING", doubt) for doubt in reading["doubts"]]


def _all(words: Sequence[str]) -> str:
    return listed(words, SHOWN, str) or "none"
