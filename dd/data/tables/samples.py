"""Features and labels as they stand in a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from dd.data.tables.labels import Labels

__all__ = ["Samples"]


@dataclass(frozen=True, eq=False)
class Samples:
    """Features and labels as they stand in a file.

    Attributes:
        source: what they are called in messages.
        features: shape (n, d), float64, NaN where one is missing.
        labels: one a sample.
        names: of the d features; their numbers in the file where they have no names.
        named: whether the names are the file's own.
        exact: features that float64 rounds, by their place, as Python's integers, shape (n,).
        left_out: columns of the file that are none of the features, and why.
        notes: on how the file was understood.
    """

    source: str
    features: npt.NDArray[np.float64]
    labels: Labels
    names: Sequence[str]
    named: bool
    exact: Mapping[int, npt.NDArray[np.object_]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def rows(self, index: npt.NDArray[np.int64]) -> "Samples":
        """Return some samples."""
        return replace(
            self,
            features=self.features[index],
            labels=self.labels.rows(index),
            exact={place: values[index] for place, values in self.exact.items()},
        )

    def columns(self, names: Sequence[str]) -> "Samples":
        """Return some features, in this order."""
        if list(names) == list(self.names):
            return self
        place = {name: number for number, name in enumerate(self.names)}
        order = [place[name] for name in names]
        return replace(
            self,
            features=self.features[:, order],
            names=list(names),
            exact={new: self.exact[old] for new, old in enumerate(order) if old in self.exact},
        )

    def without(self, reasons: Mapping[str, str]) -> "Samples":
        """Return the samples without some columns, which are told why.

        Args:
            reasons: why a column is left out, by its name; others than features are not looked at.

        Raises:
            ValueError: if no feature is left.
        """
        left_out = {name: why for name, why in reasons.items() if name in self.names}
        if not left_out:
            return self
        rest = [name for name in self.names if name not in left_out]
        if not rest:
            why = "; ".join(f"{name!r}: {reason}" for name, reason in left_out.items())
            raise ValueError(
                f"{self.source} has no feature ({why}); name those that are with data.keep=[...]"
            )
        return replace(self.columns(rest), left_out={**self.left_out, **left_out})
