"""A mean over training samples as an estimate of the test loss, with a confidence interval."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

__all__ = ["Estimate", "check_confidence"]


# What the correction leaves at finite size, and networks that scatter from split to split, come on
# top of the sampling error. By so much a 90 % interval must be wider to cover 86 % of 400 splits of
# fifty public tables (docs/theory.md, section 8); that of five-fold cross-validation as well.
_WIDENING = 1.7


@dataclass(frozen=True, eq=False)
class Estimate:
    """An estimate of a test loss or error from training samples alone.

    Under decoupled descent a sample's loss is that of a network which has not seen it, to leading
    order. Of such losses the mean differs from the test loss like the mean of independent ones,
    though every one has another network (Bayle, Bayle, Janson and Mackey, Cross-validation
    confidence intervals for test error, 2020). The interval is wider than of independent ones by a
    factor of 1.7, which makes room for finite size (docs/theory.md, section 8).

    Attributes:
        value: the mean, of the shape of one sample's values.
        lower: lower end of the interval, likewise.
        upper: upper end, likewise.
        confidence: probability that the interval is meant to have.
        num_samples: n, each counted once however often it came.
        doubts: why it is not to be believed, a sentence each; empty where no check has failed.

    Example:
        >>> optimizer = dd.DecoupledDescent(model, lr=0.5, noise=dd.NoiseModel.fit(X, y))
        >>> for step in range(10):
        ...     optimizer.zero_grad()
        ...     criterion(model(X), y).backward()
        ...     optimizer.step()
        >>> losses = torch.nn.CrossEntropyLoss(reduction="none")
        >>> found = optimizer.estimate([(X, y)], lambda batch: losses(model(batch[0]), batch[1]))
        >>> test_loss = criterion(model.eval()(X_test), y_test)
        >>> bool(found.lower < test_loss < found.upper), found.num_samples, found.doubts
        (True, 500, ())
    """

    value: Tensor
    lower: Tensor
    upper: Tensor
    confidence: float
    num_samples: int
    doubts: tuple[str, ...] = ()

    @classmethod
    def of_sums(
        cls,
        total: Tensor,
        squares: Tensor,
        num_rows: int,
        confidence: float,
        *,
        num_samples: int | None = None,
        effective: float | Tensor | None = None,
    ) -> "Estimate":
        """The estimate from sums over rows, one a sample unless said otherwise.

        Of zeros and ones it is Wilson's interval (1927), which has a width where all are equal; of
        other values mean ± z standard errors; z is 1.7 times the normal quantile.

        Args:
            total: sum of the values.
            squares: sum of their squares.
            num_rows: rows, at least 2.
            confidence: between 0 and 1.
            num_samples: distinct samples among them.
            effective: how many samples that come once tell as much, above 1; of each value, or
                of all.

        Example:
            >>> wrong = torch.tensor([1.0, 0.0, 0.0, 0.0])
            >>> print(dd.Estimate.of_sums(wrong.sum(), wrong.square().sum(), 4, confidence=0.9))
            0.25 (90 %: 0.02... to 0.8..., n = 4)
        """
        n = float(num_rows) if effective is None else effective
        z = _WIDENING * NormalDist().inv_cdf((1 + confidence) / 2)
        mean = total / num_rows
        variance = (squares / num_rows - mean**2).clamp_min(0.0)
        half = z * (variance / (n - 1)).sqrt()
        # Zeros and ones are their own squares.
        binary = (total == squares) & (mean >= 0.0) & (mean <= 1.0)
        centre = torch.where(binary, (mean + z**2 / (2 * n)) / (1 + z**2 / n), mean)
        wilson = z / (1 + z**2 / n) * (mean * (1 - mean) / n + z**2 / (4 * n**2)).abs().sqrt()
        half = torch.where(binary, wilson, half)
        return cls(mean, centre - half, centre + half, confidence, num_samples or num_rows)

    def __str__(self) -> str:
        """The value and its interval, for example ``0.123 (90 %: 0.111 to 0.136, n = 2000)``.

        Where a check has failed it says so: ``..., not to be believed: ...``.
        """
        ends = zip(
            self.value.flatten().tolist(),
            self.lower.flatten().tolist(),
            self.upper.flatten().tolist(),
            strict=True,
        )
        percent = f"{100 * self.confidence:g} %"
        figures = "; ".join(
            f"{value:.4g} ({percent}: {low:.4g} to {high:.4g}, n = {self.num_samples})"
            for value, low, high in ends
        )
        return f"{figures}, not to be believed: {' '.join(self.doubts)}" if self.doubts else figures


def check_confidence(confidence: float) -> None:
    """Reject what is no probability.

    Raises:
        ValueError: if it does not lie between 0 and 1.
    """
    if not (math.isfinite(confidence) and 0.0 < confidence < 1.0):
        raise ValueError(
            f"DecoupledDescent: confidence must lie between 0 and 1, such as 0.9; got {confidence}"
        )
