"""Copies among the training samples, which leave their imprint on each other."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dd.support.fingerprint import Fingerprints

__all__ = ["CopyWatch", "coincidences", "count_copies"]

# Returns the inputs of some samples, shape (m, d), by their indices, shape (m,).
Rows = Callable[[Tensor], Tensor]

# Fingerprints of one sample differ by less, and those of two samples by more.
_EQUAL = 1e-6
# Pairs of equal fingerprints that are compared entry by entry.
_COMPARED = 256
# Rows among which distances are measured, and candidates that each is held against.
_ROWS, _CANDIDATES = 512, 4
# Fewer pairs of a kind, or fewer samples, show nothing.
_PAIRS, _FEWEST = 10, 100
# Equal pairs over those that independent draws explain, the share of near copies, and the share of
# samples with a neighbour that close by chance: tables without copies stay within these, but for
# one draw in a hundred (docs/when-to-trust.md).
_UNEXPLAINED, _NEAR, _BY_CHANCE = 3.0, 0.03, 1e-4
# Where a category has a column for each value, another category changes two of many columns.
_MANY_COLUMNS = 8
# Neighbours further apart than this, over the usual distance, are called close in no dimension.
_CLOSE = 0.6
# Ratios of the distances to two neighbours that copies leave alone.
_APART = 0.5
# Differences of numbers that are formed in all, and at a time.
_IN_ALL, _AT_A_TIME = 2**26, 2**18
# Numbers of the inputs that are kept during the first pass.
_KEPT = 2**22


def count_copies(fingerprints: Tensor, rows: Rows, held: Tensor | None = None) -> int:
    """Number of samples that are copies, or nearly, of another one before them.

    A copy is one draw that came twice. Equal samples that are draws of their own, as in a table of
    few values, harm nothing and are not counted, and neither are neighbours that are no closer than
    the samples' own dimension makes them. Reads a few thousand rows at most.

    Args:
        fingerprints: of the samples, shape (n, 3).
        rows: gives their inputs.
        held: samples that ``rows`` knows, if not all; then near copies are not looked for.

    Returns:
        The count; an estimate from five hundred samples where they are no exact copies.
    """
    values, n = fingerprints.double(), len(fingerprints)
    if n < 2:
        return 0
    order = values[:, 0].argsort(stable=True)
    size = values.square().mean(0).sqrt()
    same = (values[order].diff(dim=0).abs() <= _EQUAL * size).all(1)
    first = torch.cat([same.new_zeros(1), same]).logical_not()
    exact = _exact(order, first, rows, held) if bool(same.any()) else 0
    if held is not None:
        return exact
    distinct = order[first]
    return exact + round(_near_share(values[distinct], distinct, rows) * len(distinct))


def _exact(order: Tensor, first: Tensor, rows: Rows, held: Tensor | None) -> int:
    """Number of samples equal to the one before them in some order, unless by coincidence."""
    again = (~first).nonzero().squeeze(1)
    share, n = 1.0, len(order)
    if held is None:
        some = again[:: -(-len(again) // _COMPARED)]
        share = float((rows(order[some - 1]) == rows(order[some])).all(1).double().mean())
    sizes = torch.bincount(first.cumsum(0)).double()
    pairs = share * float((sizes * (sizes - 1)).sum()) / 2
    sample = _shuffled(n, order.device) if held is None else held
    some = sample[: min(_ROWS, math.isqrt(_IN_ALL // rows(sample[:1]).shape[1]))]
    explained = _UNEXPLAINED * coincidences(rows(some).double()) * n**2 / 2
    # Few pairs vary by the square root of their number.
    by_chance = pairs <= explained + 3 * math.sqrt(explained)
    return 0 if by_chance else round(share * len(again))


def coincidences(inputs: Tensor) -> float:
    """Upper estimate of the probability that two independent draws are equal.

    Equal draws are equal in every column, so that they are no more frequent than equal values of
    the column that has fewest of them. Pairs that differ in j columns number N_j. For independent
    columns these are as elementary symmetric polynomials of odds, so that N_0 ≤ N_1² / (2 N_2). A
    shell of several j stands for one where few pairs differ in as little as a single column.

    Args:
        inputs: of some samples, shape (m, d).
    """
    inputs = inputs[:, (inputs != inputs[:1]).any(0)]
    columns = inputs.shape[1]
    if columns == 0:
        return 1.0
    differ = torch.cdist(inputs, inputs, p=0.0).round().long()
    differ = differ[torch.ones_like(differ, dtype=torch.bool).triu(1)]
    bound = _rarest_equality(inputs, int((differ == 0).sum()))
    if columns == 1:
        # What is seen in no pair may happen once in a third of them.
        return max(bound, 3 / len(differ))
    up_to = torch.bincount(differ[differ > 0], minlength=columns + 1).cumsum(0)
    enough = (up_to >= _PAIRS).nonzero().squeeze(1)
    if len(enough) == 0:
        return bound
    shell = int(enough[0])
    if shell == columns:
        return 0.0
    most = 0.0
    for width in {shell, max(shell, 2 if columns >= _MANY_COLUMNS else 1)}:
        last = min(2 * width, columns)
        one, two = int(up_to[width]), int(up_to[last])
        # The second shell may be cut off by the number of columns.
        most = max(most, one / 2 * (one / max(two - one, 1)) ** (width / max(last - width, 1)))
    return min(most / len(differ), bound)


def _rarest_equality(inputs: Tensor, equal: int) -> float:
    """Share of pairs that are equal in one column and differ in another, the smallest of all."""
    m, smallest = len(inputs), 1.0
    for column in inputs.mT:
        sizes = column.unique(return_counts=True)[1].double()
        pairs = float((sizes * (sizes - 1)).sum()) / 2 - equal
        smallest = min(smallest, pairs / (m * (m - 1) / 2 - equal))
    return smallest


def _near_share(fingerprints: Tensor, index: Tensor, rows: Rows) -> float:
    """Share of samples that are nearly copies of others.

    In dimension D volumes are as distances to the power of D, and that up to the nearest sample is
    exponential. So the distance to the nearest of n samples is below t times that to the nearest of
    s with probability 1 / (1 + s / (n t^D)).

    Args:
        fingerprints: of distinct samples, shape (n, 3).
        index: which they are, shape (n,).
        rows: gives their inputs.
    """
    n = len(index)
    if n < _FEWEST:
        return 0.0
    shuffled = _shuffled(n, index.device)
    asked = shuffled[: min(_ROWS, max(_FEWEST, _IN_ALL // n))]
    # So few that copies seldom meet among them.
    others = shuffled[-min(_ROWS, max(n // 4, _FEWEST)) :]
    among = rows(index[others]).double()
    centre = among.mean(0)
    among -= centre
    nearest = torch.cdist(among, among).fill_diagonal_(torch.inf).topk(2, largest=False)[0]
    dimension = _dimension(nearest[:, 0] / nearest[:, 1])
    if dimension is None:
        return 0.0
    close = min(_CLOSE, (_BY_CHANCE * len(others) / n) ** (1 / dimension))
    total, fingerprints = 0.0, (fingerprints - fingerprints.mean(0)).float()
    for block in asked.split(max(1, _AT_A_TIME // n)):
        own = block.unsqueeze(1)
        apart = torch.cdist(fingerprints[block], fingerprints).scatter_(1, own, torch.inf)
        candidates = apart.topk(_CANDIDATES, largest=False)[1]
        here = rows(index[block]).double() - centre
        there = rows(index[candidates.flatten()]).double() - centre
        distance = (here.unsqueeze(1) - there.unflatten(0, candidates.shape)).norm(dim=-1)
        # Copies among the others would pass for the usual distance.
        known = torch.cat([candidates, own], 1)
        excluded = (others == known.unsqueeze(-1)).any(1)
        usual = torch.cdist(here, among).masked_fill(excluded, torch.inf).amin(1)
        twins = (distance <= close * usual.unsqueeze(1)).sum(1)
        total += float((1 - 1 / (1 + twins.double())).sum())
    share = total / len(asked)
    return share if share >= _NEAR else 0.0


def _dimension(ratios: Tensor) -> float | None:
    """Intrinsic dimension by ratios of the distances to the two nearest samples, shape (m,).

    A ratio is below t with probability t^D (Facco et al. 2017). Small ones may be of copies, so
    that D maximises the likelihood of the others, given that they are not small.
    """
    logs, most = -ratios[ratios > _APART].log(), -math.log(_APART)
    if len(logs) < _PAIRS:
        return None
    mean, low, high = float(logs.mean()), 1e-3, 1e4
    while high > 1.001 * low:
        middle = math.sqrt(low * high)
        # Of an exponential law of rate D that ends at ``most``.
        expected = 1 / middle - most / math.expm1(min(middle * most, 700.0))
        low, high = (middle, high) if expected > mean else (low, middle)
    return low


def _shuffled(n: int, device: torch.device) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(device)


class CopyWatch:
    """Looks at the mini-batches of the first pass, and counts copies at its end."""

    def __init__(self) -> None:
        self._seen = torch.zeros(0, dtype=torch.bool)
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._room = _KEPT

    def see(self, index: Tensor, inputs: Tensor, known: Fingerprints) -> int | None:
        """Look at a batch.

        Args:
            index: its samples, shape (m,), on the CPU.
            inputs: its rows, shape (m, d).
            known: the samples so far.

        Returns:
            Number of copies among the known samples, or None while the pass goes on.
        """
        more = len(known) - len(self._seen)
        self._seen = torch.cat([self._seen, self._seen.new_zeros(max(0, more))])
        # Of several rows of one sample the last is kept.
        where = torch.full((len(self._seen),), -1).index_copy_(0, index, torch.arange(len(index)))
        where[self._seen] = -1
        new = (where >= 0).nonzero().squeeze(1)
        self._seen[new] = True
        if len(new) > 0:
            fitting = new[: self._room // inputs.shape[1]]
            self._room -= len(fitting) * inputs.shape[1]
            self._kept.append((fitting, inputs[where[fitting].to(inputs.device)].clone()))
            return None
        return self._count(known)

    def _count(self, known: Fingerprints) -> int:
        held = torch.cat([index for index, _ in self._kept])
        values = torch.cat([rows for _, rows in self._kept])
        self._kept = []
        place = torch.full((len(self._seen),), -1).index_copy_(0, held, torch.arange(len(held)))
        samples = self._seen.nonzero().squeeze(1)
        device = values.device

        def rows(index: Tensor) -> Tensor:
            return values[place[samples[index.cpu()]].to(device)]

        found = known.values[samples.to(known.values.device)].to(device)
        whole = len(held) == len(samples)
        some = None if whole else place[samples].ge(0).nonzero().squeeze(1).to(device)
        return count_copies(found, rows, some)
