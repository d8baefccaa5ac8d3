"""Rows of one sample that come several times, which tell no more than one."""

import torch
from torch import Tensor

from dd.correction.attachment import Attachment

__all__ = ["Repeats"]


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


def _labels(fingerprints: Tensor) -> Tensor:
    """One number for all samples of equal fingerprints (n, 3), shape (n,)."""
    values = fingerprints.double().nan_to_num(torch.inf)
    size = values[values[:, 0].isfinite()].square().mean(0).sqrt()
    order = values[:, 0].argsort(stable=True)
    apart = ((values[order].diff(dim=0).abs() <= 1e-6 * size).all(1)).logical_not()
    labels = torch.empty(len(values), dtype=torch.long, device=values.device)
    labels[order] = torch.cat([apart.new_zeros(1), apart]).cumsum(0)
    return labels
