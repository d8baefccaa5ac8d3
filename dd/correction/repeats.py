"""Rows of one sample or group that come several times, which tell no more than one."""

import torch
from torch import Tensor

from dd.correction.attachment import Attachment
from dd.noise.units import Units

__all__ = ["GroupSums", "Repeats"]


class Repeats:
    """How often each sample came in a pass over training batches.

    Args:
        attachment: whose samples come.
    """

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._indices: list[Tensor] = []
        self._unknown = 0

    def see(self, rows: int) -> None:
        """Count the rows of the latest training forward."""
        placement = self._attachment.now
        if placement is None or len(placement.fingerprints) != rows:
            self._unknown += rows
            return
        index = placement.index
        self._indices.append(torch.arange(rows) if index is None else index.cpu())

    def numbers(self) -> tuple[int, float]:
        """Distinct samples that came, and how many equally frequent ones tell as much.

        The latter is (Σ_i m_i)²/Σ_i m_i², m_i the rows of sample i (Kish 1965).
        """
        attachment = self._attachment
        known, ranks = attachment.samples.known, attachment.ranks
        if known is None or not self._indices:
            count = int(ranks.sum(torch.tensor(self._unknown, device=attachment.weight.device)))
            return count, float(count)
        counts = torch.bincount(torch.cat(self._indices), minlength=len(known)).double()
        counts = counts.to(attachment.weight.device)
        if ranks.size > 1 and attachment.ranks_number_alike():
            counts = ranks.sum(counts)
            alone = True
        else:
            alone = ranks.size == 1
        # Copies have numbers of their own, but are one sample.
        labels = _labels(known.values).to(counts.device)
        counts = counts.new_zeros(len(counts)).index_add(0, labels, counts)
        found = torch.stack([counts.count_nonzero().double(), counts.sum(), counts.square().sum()])
        distinct, rows, squares = (found if alone else ranks.sum(found)).tolist()
        unknown = float(ranks.sum(torch.tensor(self._unknown, device=counts.device)))
        rows, squares = rows + unknown, squares + unknown
        return round(distinct + unknown), rows**2 / squares


class GroupSums:
    """Sums of values over the rows of each group, which are not independent.

    Args:
        attachment: whose rows come.
        units: which groups they are of.
    """

    def __init__(self, attachment: Attachment, units: Units) -> None:
        self._attachment, self._units = attachment, units
        self._sums: Tensor | None = None
        self._counts = torch.zeros(len(units), dtype=torch.float64)

    @classmethod
    def of(cls, attachment: Attachment) -> "GroupSums | None":
        """For samples that are rows of groups; None for independent ones."""
        units = None if attachment.noise is None else attachment.noise.units
        return None if units is None or units.are_samples else cls(attachment, units)

    def see(self, values: Tensor) -> None:
        """Take in the values of the latest training forward, shape (m,) or (m, j).

        Raises:
            RuntimeError: if they are not of its rows.
        """
        placement = self._attachment.now
        if placement is None or len(placement.fingerprints) != len(values):
            raise RuntimeError(
                "DecoupledDescent: estimate() does not know the groups of a batch's rows; let "
                "losses(batch) run the model once, on training rows"
            )
        unit = self._units.unit
        unit = unit if placement.index is None else unit[placement.index]
        if self._sums is None:
            self._sums = values.new_zeros(len(self._units), *values.shape[1:])
        self._sums.index_add_(0, unit.to(values.device), values)
        self._counts += torch.bincount(unit.cpu(), minlength=len(self._units))

    def numbers(self, total: Tensor, squares: Tensor, num_rows: int) -> tuple[int, Tensor]:
        """Groups that came, and of each value how many independent rows tell as much.

        The mean's variance is that of the groups' sums around their shares of the total.

        Args:
            total: sum of all values, shape () or (j,).
            squares: sum of their squares.
            num_rows: rows that came.
        """
        assert self._sums is not None
        counts, mean = self._counts.to(total), total / num_rows
        groups = int(counts.count_nonzero())
        shares = counts.view(-1, *[1] * mean.dim()) * mean
        spread = (self._sums - shares).square().sum(0) * (groups / max(groups - 1, 1))
        variance = (squares / num_rows - mean**2).clamp_min(0.0)
        # The interval divides the variance by one less.
        effective = 1 + num_rows**2 * variance / spread
        alike = torch.full_like(effective, float(groups))
        return groups, torch.where(spread > 0, effective, alike).clamp_max(num_rows)


def _labels(fingerprints: Tensor) -> Tensor:
    """One number for all samples of equal fingerprints (n, 3), shape (n,)."""
    values = fingerprints.double().nan_to_num(torch.inf)
    size = values[values[:, 0].isfinite()].square().mean(0).sqrt()
    order = values[:, 0].argsort(stable=True)
    apart = ((values[order].diff(dim=0).abs() <= 1e-6 * size).all(1)).logical_not()
    labels = torch.empty(len(values), dtype=torch.long, device=values.device)
    labels[order] = torch.cat([apart.new_zeros(1), apart]).cumsum(0)
    return labels
