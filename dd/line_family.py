"""The linear family of states around the present one, and the loss at any of them.

    W' = aW + Σ_j s_j D_j,      Q_b' = aQ_b + Σ_j s_j ΔQ_bj,      θ' = θ + Σ_j t_j u_j,
    R' = aR + Σ_j s_j S_j,      S_j = XD_j + Σ_b ΔQ_bj.

D_0 = −∂L/∂W, ΔQ_b0 = −∇Q_b and u_0 = −∂L/∂θ are what a gradient step moves along; j = 1 is the
displacement of the last step without its shrinkage. The layer's bias is a part of θ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from dd.attachment import UNTRACEABLE, Attachment
from dd.functional import at_least_single
from dd.head import SharedParameters, row_products
from dd.line_search import Point
from dd.product_cache import PRODUCT
from dd.replay import Rewind, forward_replaced
from dd.training_forward import full_precision

__all__ = ["LineFamily", "Part", "Responses", "Trial", "responses_of"]


@dataclass(frozen=True, eq=False)
class Part:
    """A tensor that moves with the family.

    Attributes:
        owner: the parameter in whose state it is kept.
        key: under which, or None for the parameter itself.
        tensor: is moved in place.
        directions: one tensor of its shape a direction.
        shrinks: whether it moves as W does, by a and s, and not as θ, by t.
    """

    owner: Tensor
    key: str | None
    tensor: Tensor
    directions: Sequence[Tensor]
    shrinks: bool

    def displacement(self, point: Point) -> Tensor:
        """Σ_j s_j D_j or Σ_j t_j u_j, of the tensor's shape."""
        first, *others = (point.s if self.shrinks else point.t).tolist()
        total = first * self.directions[0]
        for step, direction in zip(others, self.directions[1:], strict=True):
            total.add_(direction, alpha=step)
        return total

    def move(self, point: Point) -> Tensor:
        """Move to a point; return the displacement without its shrinkage."""
        displacement = self.displacement(point)
        if self.shrinks and point.a != 1.0:
            self.tensor.mul_(point.a)
        self.tensor.add_(displacement)
        return displacement


@dataclass(frozen=True, eq=False)
class Responses:
    """What the network's two corrected layers receive at a point.

    Attributes:
        shrinking: R and S_0 to S_{J-1}, each (n, k), the layer's bias and its shadow left out.
        bias_shadow: shadow of the layer's bias, and its directions, each (n, k); or none.
        head: shadows of the head's weight, and their directions, each (n, C, f); or none.
        head_bias: those of its bias, each (n, C); or none.
    """

    shrinking: Sequence[Tensor]
    bias_shadow: Sequence[Tensor] = ()
    head: Sequence[Tensor] = ()
    head_bias: Sequence[Tensor] = ()


class Trial:
    """One training forward at a point of the family.

    Args:
        attachment: of the decoupled layer.
        responses: around the present state.
        point: coordinates (a, s, t), shape (1 + 2J,), in the precision of R.
        dtype: of the layer's output.
    """

    def __init__(
        self, attachment: Attachment, responses: Responses, point: Tensor, dtype: torch.dtype
    ) -> None:
        self._attachment, self._responses, self._dtype = attachment, responses, dtype
        self._ordinary: Callable[[Tensor], Tensor] = attachment.layer.forward
        width = len(responses.shrinking)
        self._shrinking = point[:width].unbind()
        self._others: Sequence[Tensor | float] = (1.0, *point[width:].unbind())

    def forward(self, input: Tensor) -> Tensor:
        """Return R' + bias, shape (n, k), a function of the point and of the bias alone.

        Raises:
            RuntimeError: if the inputs are not all samples in their order.
        """
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=UNTRACEABLE)
        return self._forward(input)

    # Compiled code must not take up what stands in for a layer for a while.
    @_disable_dynamo
    def _forward(self, input: Tensor) -> Tensor:
        layer = self._attachment.layer
        if not layer.training:
            return self._ordinary(input)
        with full_precision(input):
            self._require_all(input)
            output = _combined(self._shrinking, self._responses.shrinking)
            if self._responses.bias_shadow:
                output = output + _combined(self._others, self._responses.bias_shadow)
            output = output if layer.bias is None else output + layer.bias
            return output.to(self._dtype)

    def _require_all(self, inputs: Tensor) -> None:
        samples, noise = self._attachment.samples, self._attachment.given_noise
        cause = None
        try:
            if samples.place(inputs, noise, binds=False).index is None:
                return
        except RuntimeError as error:
            cause = error
        raise RuntimeError(
            "DecoupledDescent: a later call of the closure trained on other samples than the "
            'first; with lr="auto" every call computes the loss of all training samples, as they '
            "were first seen. Give lr a number for mini-batches."
        ) from cause

    def at_layer(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> None:
        """Leave the output of the decoupled layer as it is: it is corrected."""

    def at_head(self, head: nn.Module, inputs: Tensor, output: Tensor) -> Tensor | None:
        """Correct the output of the head, shape (n, C), with the shadows of the point."""
        shared = self._attachment.shared
        if shared is None or not (self._attachment.layer.training and head.training):
            return None
        with full_precision(output):
            features = at_least_single(inputs)
            shifts = [row_products(shadow, features) for shadow in self._responses.head]
            if self._responses.head_bias:
                biases = self._responses.head_bias
                shifts = [shift + bias for shift, bias in zip(shifts, biases, strict=True)]
            return output + _combined(self._others, shifts).to(output.dtype)


class LineFamily:
    """A :class:`dd.line_search.Family` whose loss is the user's closure.

    Args:
        attachment: of the decoupled layer.
        parts: everything that moves.
        responses: around the present state.
        closure: computes the loss of all samples and differentiates it.
        rewind: around every call of it, after the first.
        loss: that the first call returned.
        dtype: of the decoupled layer's output.

    Attributes:
        directions: J.
        loss: that of the present state.
        sizes: root mean squares of R and of S_0 to S_{J-1}, shape (1 + J,).
    """

    def __init__(
        self,
        attachment: Attachment,
        parts: Sequence[Part],
        responses: Responses,
        closure: Callable[[], Any],
        rewind: Rewind,
        loss: float,
        dtype: torch.dtype,
    ) -> None:
        self._attachment, self._responses = attachment, responses
        self._closure, self._rewind, self._dtype = closure, rewind, dtype
        self._others = [part for part in parts if part.key is None and not part.shrinks]
        self._starts = [part.tensor.clone() for part in self._others]
        self.loss, self.directions = loss, len(responses.shrinking) - 1
        squares = [response.double().square().mean() for response in responses.shrinking]
        self.sizes = torch.stack(squares).sqrt().cpu()

    @torch.no_grad()
    def evaluate(self, point: Point) -> tuple[float, Tensor]:
        """Loss at a point and its derivative in (a, s, t), shape (1 + 2J,), float64.

        Args:
            point: of the family.

        Raises:
            RuntimeError: if the loss does not depend on the decoupled layer.
        """
        nowhere = torch.inf, torch.zeros(1 + 2 * self.directions, dtype=torch.float64)
        if not point.is_finite:
            return nowhere
        for part, start in zip(self._others, self._starts, strict=True):
            part.tensor.copy_(start + part.displacement(point))
        with self._rewind.call():
            loss, derivative = self._call(point)
            along = self._along_others()
        derivative[1 + self.directions :] += along
        if not (torch.isfinite(loss) and derivative.isfinite().all()):
            return nowhere
        return float(loss), derivative

    def _call(self, point: Point) -> tuple[Tensor, Tensor]:
        attachment = self._attachment
        variables = point.vector.to(self._responses.shrinking[0]).requires_grad_()
        with torch.enable_grad():
            trial = Trial(attachment, self._responses, variables, self._dtype)
            with attachment.trying(trial), forward_replaced(attachment.layer, trial.forward):
                loss = self._closure()
        if variables.grad is None or not isinstance(loss, Tensor):
            raise RuntimeError(
                "DecoupledDescent: a later call of the closure did not do as the first: run the "
                "model in train mode on all training samples, differentiate the loss and return it"
            )
        return loss.detach().reshape(()), variables.grad.double().cpu()

    def _along_others(self) -> Tensor:
        """⟨∂L/∂θ', u_j⟩ for every direction, shape (J,)."""
        total = torch.zeros(self.directions, dtype=torch.float64)
        for part in self._others:
            gradient = part.tensor.grad
            if gradient is not None:
                products = [(gradient.detach() * u).sum().double() for u in part.directions]
                total += torch.stack(products).cpu()
        return total

    def restore(self) -> None:
        """Put everything back where it was before the search."""
        for part, start in zip(self._others, self._starts, strict=True):
            part.tensor.copy_(start)
        self._rewind.finish()


def responses_of(
    parts: Sequence[Part], shared: SharedParameters | None, signal: Tensor | None
) -> Responses:
    """What a family does to the layers that are corrected.

    Args:
        parts: everything that moves.
        shared: where the head is corrected.
        signal: coordinates along the component means, shape (n, m), where it is.
    """
    found = {(id(part.owner), part.key): [part.tensor, *part.directions] for part in parts}
    layer = next(part.owner for part in parts if part.key == PRODUCT)
    products, shadows = found[id(layer), PRODUCT], found[id(layer), "shadow"]
    # Sums over bins in the order of the forward: a point where nothing moves has its very R.
    shrinking = [
        product + shadow.sum(0).to(product.dtype)
        for product, shadow in zip(products, shadows, strict=True)
    ]
    if shared is None:
        return Responses(shrinking)
    assert signal is not None
    along = found[id(layer), "signal_shadow"]
    shrinking = [
        one + row_products(omega, signal).to(one.dtype)
        for one, omega in zip(shrinking, along, strict=True)
    ]
    return Responses(
        shrinking,
        found.get((id(shared.layer.bias), "shadow"), ()),
        found[id(shared.head.weight), "shadow"],
        found.get((id(shared.head.bias), "shadow"), ()),
    )


def _combined(factors: Sequence[Tensor | float], terms: Sequence[Tensor]) -> Tensor:
    total: Tensor = factors[0] * terms[0]
    for factor, term in zip(factors[1:], terms[1:], strict=True):
        total = total + factor * term
    return total
