"""What every experiment trains and tests on."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dd.data.reading import Reading
from dd.theory.mixture import GaussianMixture

__all__ = ["Split"]


@dataclass(frozen=True, eq=False)
class Split:
    """A training set and a test set of one distribution; the latter may be empty.

    Attributes:
        train_inputs: shape (n, d), float32.
        train_targets: class of each training sample, shape (n,), int64.
        train_components: mixture component of each training sample, shape (n,), int64, or None
            where it is unknown.
        test_inputs: shape (n_test, d), float32.
        test_targets: class of each test sample, shape (n_test,), int64.
        mixture: the law that all inputs were drawn from, where it is known.
        reading: what was read of a user's files, where they come from there.

    Raises:
        TypeError: if a tensor has the wrong data type.
        ValueError: if shapes disagree, there are no training samples, an input is not finite or an
            id negative.

    Example:
        >>> from dd.data import Split
        >>> split = Split(X, y, None, X_test, y_test)  # components unknown
        >>> split.dimension, split.num_classes, split.is_tested
        (50, 2, True)
    """

    train_inputs: Tensor
    train_targets: Tensor
    train_components: Tensor | None
    test_inputs: Tensor
    test_targets: Tensor
    mixture: GaussianMixture | None = None
    reading: Reading | None = None

    def __post_init__(self) -> None:
        """Check that the tensors fit together.

        Raises:
            ValueError: if they do not.
        """
        _check_inputs("train_inputs", self.train_inputs, least=1)
        _check_inputs("test_inputs", self.test_inputs, least=0)
        if self.test_inputs.shape[1] != self.dimension:
            raise ValueError(
                f"test_inputs must have the {self.dimension} columns of train_inputs, "
                f"got {self.test_inputs.shape[1]}"
            )
        _check_ids("train_targets", self.train_targets, len(self.train_inputs))
        _check_ids("test_targets", self.test_targets, len(self.test_inputs))
        if self.train_components is not None:
            _check_ids("train_components", self.train_components, len(self.train_inputs))

    @property
    def dimension(self) -> int:
        """Number d of input coordinates."""
        return self.train_inputs.shape[1]

    @property
    def is_tested(self) -> bool:
        """Whether there are test samples."""
        return len(self.test_targets) > 0

    @property
    def num_classes(self) -> int:
        """One more than the largest class of either set."""
        return 1 + int(torch.cat([self.train_targets, self.test_targets]).max())

    def fitted_on(self, rows: Tensor) -> "Split":
        """Return the same split with some of the training samples, rows of shape (m,).

        Example:
            >>> from dd.data import Split
            >>> split = Split(X, y, y, X_test, y_test)
            >>> split.fitted_on(torch.arange(0, 500, 5)).train_inputs.shape
            torch.Size([100, 50])
        """
        components = self.train_components
        return replace(
            self,
            train_inputs=self.train_inputs[rows],
            train_targets=self.train_targets[rows],
            train_components=None if components is None else components[rows],
        )

    def to(self, device: torch.device | str) -> "Split":
        """Return the same split with every tensor on the device.

        Example:
            >>> from dd.data import Split
            >>> device = "cuda" if torch.cuda.is_available() else "cpu"
            >>> split = Split(X, y, y, X_test, y_test).to(device)
        """
        components = self.train_components
        return replace(
            self,
            train_inputs=self.train_inputs.to(device),
            train_targets=self.train_targets.to(device),
            train_components=None if components is None else components.to(device),
            test_inputs=self.test_inputs.to(device),
            test_targets=self.test_targets.to(device),
        )


def _check_inputs(name: str, inputs: Tensor, least: int) -> None:
    if inputs.ndim != 2 or len(inputs) < least or inputs.shape[1] == 0:
        raise ValueError(
            f"{name} must have shape (samples, dimension), neither of them zero, "
            f"got {tuple(inputs.shape)}; flatten each sample into a row"
        )
    if inputs.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {inputs.dtype}; convert with {name}.float()")
    if not bool(inputs.isfinite().all()):
        bad = int((~inputs.isfinite()).any(1).sum())
        raise ValueError(
            f"{name} must be finite, got {bad} of {len(inputs)} rows with NaN or infinity; "
            "drop or repair those rows"
        )


def _check_ids(name: str, ids: Tensor, samples: int) -> None:
    if ids.shape != (samples,):
        raise ValueError(
            f"{name} must hold one integer for each of the {samples} samples, "
            f"got shape {tuple(ids.shape)}"
        )
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {ids.dtype}; convert with {name}.long()")
    if len(ids) and int(ids.min()) < 0:
        raise ValueError(
            f"{name} must be integers from 0, got {int(ids.min())}; renumber them from 0"
        )
