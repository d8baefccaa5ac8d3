"""Moments of pre-activations and gradients from which the curvature is solved."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dd.functional import all_finite, at_least_single, component_counts, component_sums
from dd.support.blocks import row_blocks, tall_product
from dd.support.ranks import Ranks

__all__ = ["Moments"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean second moments of rows a_i, and Σ_i a_i b_iᵀ, around component means.

    The b_i are parts of a gradient, so that their sum over a batch is already its mean.

    Attributes:
        rows: number of rows, shape ().
        counts: rows of each component, shape (C,); empty where nothing is centred.
        left: mean of a in each component, shape (C, k).
        right: mean of b in each component, shape (C, k), where they may be pooled with others.
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
        cls,
        values: Tensor,
        products: Tensor,
        components: Tensor,
        count: int,
        ranks: Ranks,
        *,
        pools: bool = True,
    ) -> "Moments":
        """Moments around component means.

        Args:
            values: a, shape (m, k).
            products: b, shape (m, k).
            components: of each row, shape (m,).
            count: number of components C.
            ranks: over which rows are spread.
            pools: whether they will be pooled with others; ``right`` is empty if not.
        """
        values, products = at_least_single(values), at_least_single(products)
        width, averaged = values.shape[1], [values, products] if pools else [values]
        counts = ranks.sum(component_counts(components, count).to(values))
        sums = [component_sums(rows, components, count) for rows in averaged]
        means = ranks.sum(torch.stack(sums)) / counts.clamp_min(1).unsqueeze(1)
        left = means[0]
        gram, cross = _zeros(values, 2, width, width)
        blocks = row_blocks(len(values), width, values.device)
        buffer = torch.empty_like(values[blocks[0]])
        for rows in blocks:
            around = buffer[: rows.stop - rows.start]
            torch.index_select(left, 0, components[rows], out=around)
            torch.sub(values[rows], around, out=around)
            gram += tall_product(around, around)
            cross += tall_product(around, products[rows])
        gram, cross = ranks.sum(torch.stack([gram, cross]))
        total = counts.sum()
        return cls(
            rows=total,
            counts=counts,
            left=left,
            right=means[1] if pools else left[:0],
            gram=gram / total,
            cross=cross,
        )

    @classmethod
    def plain(cls, values: Tensor, products: Tensor, ranks: Ranks) -> "Moments":
        """Moments around zero; arguments as in :meth:`centred`."""
        values, products = at_least_single(values), at_least_single(products)
        rows = ranks.sum(values.new_full((), float(len(values))))
        none = values.new_empty(0, values.shape[1])
        both = ranks.sum(torch.stack([tall_product(values, b) for b in (values, products)]))
        return cls(rows, none[:, 0], none, none, both[0] / rows, both[1])

    @property
    def is_finite(self) -> Tensor:
        """Whether all numbers are, shape ()."""
        return all_finite(self.gram, self.cross).all()

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
