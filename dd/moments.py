"""Moments of pre-activations and gradients from which the curvature is solved."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dd.blocks import row_blocks
from dd.functional import at_least_single, component_sums
from dd.ranks import Ranks

__all__ = ["Moments"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean second moments of rows a_i, and Σ_i a_i b_iᵀ, around component means.

    The b_i are parts of a gradient, so that their sum over a batch is already its mean.

    Attributes:
        rows: number of rows, shape ().
        counts: rows of each component, shape (C,); empty where nothing is centred.
        left: mean of a in each component, shape (C, k).
        right: mean of b in each component, shape (C, k).
        gram: Σ a aᵀ / rows, shape (k, k).
        cross: Σ a bᵀ, shape (k, k).
    """

    rows: Tensor
    counts: Tensor
    left: Tensor
    right: Tensor
    gram: Tensor
    cross: Tensor

    @classmethod
    def centred(
        cls, values: Tensor, products: Tensor, components: Tensor, count: int, ranks: Ranks
    ) -> "Moments":
        """Moments around component means.

        Args:
            values: a, shape (m, k).
            products: b, shape (m, k).
            components: of each row, shape (m,).
            count: number of components C.
            ranks: over which rows are spread.
        """
        values, products = at_least_single(values), at_least_single(products)
        blocks = row_blocks(len(values), values.shape[1], values.device)
        sums = _zeros(values, count, 1 + 2 * values.shape[1])
        for rows in blocks:
            ids, ones = components[rows], torch.ones_like(values[rows, :1])
            parts = (ones, values[rows], products[rows])
            sums += torch.cat([component_sums(part, ids, count) for part in parts], 1)
        sums = ranks.sum(sums)
        counts = sums[:, 0]
        left, right = (sums[:, 1:] / counts.clamp_min(1).unsqueeze(1)).chunk(2, 1)
        left = left.contiguous()
        gram, cross = _zeros(values, 2, values.shape[1], values.shape[1])
        for rows in blocks:
            around = values[rows] - left.index_select(0, components[rows])
            gram.addmm_(around.mT, around)
            cross.addmm_(around.mT, products[rows])
        gram, cross = ranks.sum(torch.stack([gram, cross]))
        total = counts.sum()
        return cls(total, counts, left, right, gram / total, cross)

    @classmethod
    def plain(cls, values: Tensor, products: Tensor, ranks: Ranks) -> "Moments":
        """Moments around zero; arguments as in :meth:`centred`."""
        values, products = at_least_single(values), at_least_single(products)
        rows = ranks.sum(values.new_full((), float(len(values))))
        none = values.new_empty(0, values.shape[1])
        both = ranks.sum(torch.stack([values.mT @ values, values.mT @ products]))
        return cls(rows, none[:, 0], none, none, both[0] / rows, both[1])

    @property
    def is_finite(self) -> Tensor:
        """Whether all numbers are, shape ()."""
        return self.packed().isfinite().all()

    def scaled(self, scale: Tensor | float) -> "Moments":
        """Moments with b multiplied by a scale."""
        return replace(self, right=scale * self.right, cross=scale * self.cross)

    def merged(self, earlier: "Moments", keep: float) -> "Moments":
        """Pool means and Σ a aᵀ with those of earlier steps, weighted by ``keep`` times their rows.

        Chan, Golub and LeVeque (1979): means and centred moments of a union from those of its
        parts, without the cancellation of raw moments. Σ a bᵀ stays that of this step, around the
        pooled means: it enters the curvature linearly, so that its noise averages out over steps,
        while the gradients of earlier steps would lag behind.
        """
        before, now = keep * earlier.rows, self.rows
        rows = before + now
        before_counts = keep * earlier.counts
        counts = before_counts + self.counts
        share = (self.counts / counts.clamp_min(torch.finfo(counts.dtype).tiny)).unsqueeze(1)
        moved = self.left - earlier.left
        between = moved.mT @ (before_counts.unsqueeze(1) * share * moved)
        left = earlier.left + share * moved
        push = self.counts.unsqueeze(1) * self.right
        return Moments(
            rows=rows,
            counts=counts,
            left=left,
            right=self.right,
            gram=(before * earlier.gram + now * self.gram + between) / rows,
            cross=self.cross + (self.left - left).mT @ push,
        )

    def averaged(self, earlier: "Moments", keep: float) -> "Moments":
        """Pool both moments around zero with those of earlier steps, weighted likewise."""
        before, now = keep * earlier.rows, self.rows
        rows = before + now
        return replace(
            self,
            rows=rows,
            gram=(before * earlier.gram + now * self.gram) / rows,
            cross=(before * earlier.cross + now * self.cross) / rows,
        )

    def packed(self) -> Tensor:
        """What pooling needs of earlier steps in one tensor, shape (numbers,)."""
        parts = (self.rows, self.counts, self.left, self.gram, self.cross)
        return torch.cat([part.reshape(-1) for part in parts])

    @classmethod
    def unpacked(cls, numbers: Tensor, count: int, width: int) -> "Moments | None":
        """Moments of earlier steps, for ``count`` components of ``width`` units.

        None if they are of other sizes, as after another estimator.
        """
        if len(numbers) != 1 + count + count * width + 2 * width * width:
            return None
        square = width * width
        rows, counts, left, gram, cross = numbers.split([1, count, count * width, square, square])
        left = left.reshape(count, width)
        gram, cross = gram.reshape(width, width), cross.reshape(width, width)
        return cls(rows.reshape(()), counts, left, torch.zeros_like(left), gram, cross)


def _zeros(like: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=like.dtype, device=like.device)
