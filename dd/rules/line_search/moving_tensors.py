"""What moves when a linear family is left for one of its points, and what that does to R."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dd.correction.head import SharedParameters, row_products
from dd.rules.line_search.product_cache import PRODUCT
from dd.rules.line_search.search import Point

__all__ = ["LinearResponse", "Maps", "Part", "linear_response"]

# A Newton step goes along flat directions as if they had this share of the largest curvature.
_FLOOR = 0.03


@dataclass(frozen=True, eq=False)
class Maps:
    """The maps P and P⁺ of hidden units, each (k, k), symmetric and of unit Frobenius norm."""

    drift: Tensor
    newton: Tensor

    @classmethod
    def of(cls, curvature: Tensor) -> "Maps":
        """The maps of a curvature H, shape (k, k), symmetric; zero where it is zero."""
        # Of 8-byte numbers, and on the CPU, where small eigenproblems are fastest.
        drift = curvature.double().cpu()
        # The inverse of a tiny curvature would overflow.
        drift = (drift / drift.abs().max()).nan_to_num(0.0)
        values, vectors = torch.linalg.eigh(drift)
        sizes = values.abs()
        inverses = (1 / sizes.clamp_min(_FLOOR * sizes.max())).nan_to_num(posinf=0.0)
        maps = (drift, (vectors * inverses) @ vectors.mT)
        return cls(*(normalize(one.flatten(), dim=0).view_as(one).to(curvature) for one in maps))

    def at(self, point: Point) -> tuple[Tensor, Tensor]:
        """A and B at a point, each (k, k)."""
        identity = torch.eye(len(self.drift)).to(self.drift)
        return (
            point.keep * identity + point.drift * self.drift,
            point.step * identity + point.newton * self.newton,
        )


@dataclass(frozen=True, eq=False)
class Part:
    """A tensor that moves with the family.

    Attributes:
        owner: the parameter in whose state it is kept.
        key: under which, or None for the parameter itself.
        tensor: is moved in place.
        descent: D, ΔQ or u, of its shape.
        units: dimension of the hidden units, -1 or -2, where it moves as W does; None where it
            moves as θ.
    """

    owner: Tensor
    key: str | None
    tensor: Tensor
    descent: Tensor
    units: int | None

    def move(self, point: Point, maps: Maps) -> None:
        """Move to a point."""
        if self.units is None:
            self.tensor.add_(self.descent, alpha=point.head)
            return
        kept, moved = (matrix.to(self.tensor.dtype) for matrix in maps.at(point))
        descent = self.descent.to(self.tensor.dtype)
        self.tensor.copy_(self._mapped(self.tensor, kept) + self._mapped(descent, moved))

    def _mapped(self, tensor: Tensor, matrix: Tensor) -> Tensor:
        return tensor @ matrix if self.units == -1 else matrix.mT @ tensor


@dataclass(frozen=True, eq=False)
class LinearResponse:
    """What the network's two corrected layers receive at a point.

    Attributes:
        layer: R, S, RP and SP⁺, each (n, k), the layer's bias and its shadow left out.
        plain: XW, XD, XWP and XDP⁺, each (n, k), the layer's bias left out; or none.
        bias_shadow: shadow of the layer's bias, and how it descends, each (n, k); or none.
        head: shadow of the head's weight, and how it descends, each (n, C, f); or none.
        head_bias: that of its bias, each (n, C); or none.
    """

    layer: Sequence[Tensor]
    plain: Sequence[Tensor] = ()
    bias_shadow: Sequence[Tensor] = ()
    head: Sequence[Tensor] = ()
    head_bias: Sequence[Tensor] = ()


def linear_response(
    parts: Sequence[Part], maps: Maps, shared: SharedParameters | None, signal: Tensor | None
) -> LinearResponse:
    """What a family does to the layers that are corrected.

    Args:
        parts: everything that moves.
        maps: of the hidden units.
        shared: where the head is corrected.
        signal: coordinates along the component means, shape (n, m), where it is.
    """
    found = {(id(part.owner), part.key): (part.tensor, part.descent) for part in parts}
    layer = next(part.owner for part in parts if part.key == PRODUCT)
    # Sums over bins in the order of the forward: where nothing moves, R is its very R.
    present, descent = (
        product + shadow.sum(0).to(product.dtype)
        for product, shadow in zip(
            found[id(layer), PRODUCT], found[id(layer), "shadow"], strict=True
        )
    )
    plain = _of_layer(*found[id(layer), PRODUCT], maps)
    if shared is None:
        return LinearResponse(_of_layer(present, descent, maps), plain)
    assert signal is not None
    omega, omega_descent = found[id(layer), "signal_shadow"]
    present = present + row_products(omega, signal).to(present.dtype)
    descent = descent + row_products(omega_descent, signal).to(descent.dtype)
    return LinearResponse(
        _of_layer(present, descent, maps),
        plain,
        found.get((id(shared.layer.bias), "shadow"), ()),
        found[id(shared.head.weight), "shadow"],
        found.get((id(shared.head.bias), "shadow"), ()),
    )


def _of_layer(present: Tensor, descent: Tensor, maps: Maps) -> list[Tensor]:
    drift, newton = maps.drift.to(present.dtype), maps.newton.to(present.dtype)
    return [present, descent, present @ drift, descent @ newton]
