"""The linear family of states around the present one, and the loss at any of them.

    W' = WA + DB,     Q_b' = Q_b A + ΔQ_b B,     θ' = θ + t u,      A = aI + rP,  B = sI + qP⁺,
    R' = aR + sS + r RP + q SP⁺,                 S = XD + Σ_b ΔQ_b.                              (5)

D = −∂L/∂W, ΔQ_b = −∇Q_b and u = −∂L/∂θ are what a gradient step moves along, and the layer's bias
is a part of θ. Maps from the right act on samples alike, so that they commute with leaving one out.
P is the curvature H, which makes r the share of the layer's own drift that is taken back (section
6), and P⁺ its inverse, which makes q a Newton step; both of unit norm.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dd.correction.attachment import Attachment
from dd.correction.head import row_products
from dd.correction.training_forward import full_precision
from dd.functional import at_least_single
from dd.rules.line_search.moving_tensors import LinearResponse, Part
from dd.rules.line_search.product_cache import require_all_again
from dd.rules.line_search.replay import (
    UNLIKE_FIRST,
    ClosureReplay,
    batch_norms,
    forward_replaced,
    own_statistics,
)
from dd.rules.line_search.search import NO_MOVE, Point

__all__ = ["LineFamily", "PointForward"]

# A step that changes the loss by this share, and by which share that may differ from its slope's.
_SHORT, _UNLIKE = 0.01, 0.2


class PointForward:
    """One training forward at a point of the family.

    Args:
        attachment: of the decoupled layer.
        linear_responses: around the present state.
        point: coordinates (a, s, r, q, t), shape (5,), in the precision of R.
        dtype: of the layer's output.
    """

    def __init__(
        self,
        attachment: Attachment,
        linear_responses: LinearResponse,
        point: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._attachment, self._responses, self._dtype = attachment, linear_responses, dtype
        self._ordinary: Callable[[Tensor], Tensor] = attachment.layer.forward
        *layer, head = point.unbind()
        self._of_layer: Sequence[Tensor] = layer
        self._of_head: Sequence[Tensor | float] = (1.0, head)

    def forward(self, input: Tensor) -> Tensor:
        """Return R' + bias, shape (n, k), a function of the point and of the bias alone.

        Raises:
            RuntimeError: if the inputs are not all samples in their order.
        """
        layer = self._attachment.layer
        if not layer.training:
            return self._ordinary(input)
        with full_precision(input):
            require_all_again(self._attachment, input)
            output = _combined(self._of_layer, self._responses.layer)
            if self._responses.bias_shadow:
                output = output + _combined(self._of_head, self._responses.bias_shadow)
            output = output if layer.bias is None else output + layer.bias
            return output.to(self._dtype)

    def at_layer(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> None:
        """Leave the output of the decoupled layer as it is: it is corrected."""

    def at_head(self, head: nn.Module, inputs: Tensor, output: Tensor) -> Tensor | None:
        """Correct the output of the head, shape (n, C), with the shadows of the point."""
        if not (self._responses.head and self._attachment.layer.training and head.training):
            return None
        with full_precision(output):
            features = at_least_single(inputs)
            shifts = [row_products(shadow, features) for shadow in self._responses.head]
            if self._responses.head_bias:
                biases = self._responses.head_bias
                shifts = [shift + bias for shift, bias in zip(shifts, biases, strict=True)]
            return output + _combined(self._of_head, shifts).to(output.dtype)


class LineFamily:
    """A :class:`dd.rules.line_search.search.Family` whose loss is the user's closure.

    Args:
        attachment: of the decoupled layer.
        parts: everything that moves.
        linear_responses: around the present state.
        closure: computes the loss of all samples and differentiates it.
        rewind: around every call of it, after the first.
        loss: that the first call returned.
        dtype: of the decoupled layer's output.

    Attributes:
        loss: that of the present state.
        shape: of R, (n, k).
        gram: mean products of R, S, RP and SP⁺ with one another, shape (4, 4), float64.
        head_sizes: Euclidean norms of θ and of u.
    """

    def __init__(
        self,
        attachment: Attachment,
        parts: Sequence[Part],
        linear_responses: LinearResponse,
        closure: Callable[[], Any],
        rewind: ClosureReplay,
        loss: float,
        *,
        dtype: torch.dtype,
    ) -> None:
        self._attachment, self._responses = attachment, linear_responses
        self._closure, self._rewind, self._dtype = closure, rewind, dtype
        self._others = [part for part in parts if part.key is None and part.units is None]
        self._starts = [part.tensor.clone() for part in self._others]
        self.loss = loss
        self._loss_dtype = dtype
        samples, width = linear_responses.layer[0].shape
        self.shape = (samples, width)
        rows = torch.stack([response.flatten() for response in linear_responses.layer])
        self.gram = (rows @ rows.mT / rows.shape[1]).double().cpu()
        self.head_sizes = (_norm(self._starts), _norm([part.descent for part in self._others]))

    def evaluate(self, point: Point) -> tuple[float, Tensor]:
        """Loss at a point and its derivative in (a, s, r, q, t), shape (5,), float64.

        Args:
            point: of the family.

        Raises:
            RuntimeError: if the loss does not depend on the decoupled layer.
        """
        return self._evaluate(self._responses, point)

    @torch.no_grad()
    def _evaluate(self, linear_responses: LinearResponse, point: Point) -> tuple[float, Tensor]:
        nowhere = torch.inf, torch.zeros(5, dtype=torch.float64)
        if not point.is_finite:
            return nowhere
        self._place_others(point.head)
        variables = point.vector.to(linear_responses.layer[0])
        with self._rewind.call():
            loss, derivative = self._call(linear_responses, variables)
            derivative[-1] += self._along_others()
        if not (torch.isfinite(loss) and derivative.isfinite().all()):
            return nowhere
        return float(loss), derivative

    def evaluate_plain(self, point: Point) -> tuple[float, Tensor]:
        """The same as :meth:`evaluate` without any correction: of the plain network's own loss."""
        return self._evaluate(LinearResponse(self._responses.plain), point)

    def _place_others(self, head: float) -> None:
        """Put every parameter but the decoupled weights where a step of the head leads."""
        for part, start in zip(self._others, self._starts, strict=True):
            part.tensor.copy_(start + head * part.descent)

    def _call(self, linear_responses: LinearResponse, variables: Tensor) -> tuple[Tensor, Tensor]:
        attachment, variables = self._attachment, variables.requires_grad_()
        with torch.enable_grad():
            trial = PointForward(attachment, linear_responses, variables, self._dtype)
            with attachment.trying(trial), forward_replaced(attachment.layer, trial.forward):
                loss = self._closure()
        if variables.grad is None or not isinstance(loss, Tensor):
            raise RuntimeError(UNLIKE_FIRST)
        self._loss_dtype = loss.dtype
        return loss.detach().reshape(()), variables.grad.double().cpu()

    def _along_others(self) -> float:
        """⟨∂L/∂θ', u⟩."""
        total = 0.0
        for part in self._others:
            if part.tensor.grad is not None:
                total += float((part.tensor.grad.detach() * part.descent).sum())
        return total

    @torch.no_grad()
    def require_its_loss(self) -> None:
        """Check that the closure returns the loss that it differentiates.

        Raises:
            RuntimeError: if along the layer's gradient that changes otherwise than its slope says.
        """
        here, slope = self.evaluate(NO_MOVE)
        down = -float(slope[1])
        if not (math.isfinite(here) and down > 0):
            return
        # So short that pre-activations hardly move, where they can tell.
        sizes = self.gram.diagonal().sqrt()
        length = _SHORT * min(abs(here) / down, float(sizes[0] / sizes[1]))
        there, slope_there = self.evaluate(replace(NO_MOVE, step=length))
        expected = length * float(slope[1] + slope_there[1]) / 2
        eps = max(torch.finfo(kind).eps for kind in (self._dtype, self._loss_dtype))
        rounding = 16 * eps * abs(here)
        bends = abs(float(slope_there[1]) + down) > _UNLIKE * down
        if not math.isfinite(there) or bends or abs(expected) < 10 * rounding:
            return
        if abs(there - here - expected) > _UNLIKE * abs(expected) + rounding:
            raise RuntimeError(
                'DecoupledDescent: with lr="auto" the closure must return the loss that it '
                f"differentiates: a short step changes what it returns by {there - here:.3g}, but "
                f"by its gradients {expected:.3g}. Differentiate it as it is, without a factor (a "
                "gradient scaler, a mean over other counts) and without further terms."
            )

    @torch.no_grad()
    def settle_statistics(self, point: Point) -> None:
        """Leave batch normalisations with the statistics of a point."""
        if not batch_norms(self._attachment.module):
            return
        self._place_others(point.head)
        with own_statistics(self._attachment.module), self._rewind.call(keeps_statistics=True):
            self._call(self._responses, point.vector.to(self._responses.layer[0]))

    def restore(self) -> None:
        """Put everything back where it was before the search."""
        for part, start in zip(self._others, self._starts, strict=True):
            part.tensor.copy_(start)
        self._rewind.finish()


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _combined(factors: Sequence[Tensor | float], terms: Sequence[Tensor]) -> Tensor:
    total: Tensor = factors[0] * terms[0]
    for factor, term in zip(factors[1:], terms[1:], strict=True):
        total = total + factor * term
    return total
