"""XW of all samples, kept from step to step by linearity instead of being computed anew."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dd.correction.attachment import Attachment
from dd.correction.layer_forward import place
from dd.correction.training_forward import full_precision
from dd.functional import at_least_single

__all__ = ["PRODUCT", "FirstForward", "keep_product", "require_all_again", "tensor_checksum"]

PRODUCT, MARK, AGE = "shadow_product", "shadow_product_mark", "shadow_product_age"

# Steps after which rounding has had time enough to add up.
_REFRESH_AFTER = 100

_INTEGERS = {4: torch.int32, 8: torch.int64}


class FirstForward:
    """The decoupled layer's forward at the first call of a closure.

    Where XW is kept for the very weights that the layer has, and the batch is all samples in their
    order, nothing is multiplied. The gradients are those of the ordinary forward.

    Args:
        attachment: of the layer.
        state: of the decoupled weight.

    Attributes:
        inputs: X, shape (n, d), once the layer ran.
        product: XW, shape (n, k), likewise.
        dtype: of the layer's output, likewise.
        age: number of steps since XW was computed.
    """

    def __init__(self, attachment: Attachment, state: dict[str, Any]) -> None:
        self._attachment, self._state = attachment, state
        self._ordinary: Callable[[Tensor], Tensor] = attachment.layer.forward
        self.inputs: Tensor | None = None
        self.product: Tensor | None = None
        self.dtype: torch.dtype | None = None
        self.age = 0

    def forward(self, input: Tensor) -> Tensor:
        """Return XW + bias, shape (n, k)."""
        layer = self._attachment.layer
        if not layer.training or not torch.is_grad_enabled():
            return self._ordinary(input)
        kept, bias = self._kept(input), layer.bias
        if kept is None:
            output = self._ordinary(input)
            plain = at_least_single(output.detach())
            # The product is moved in place, what the user sees is not.
            self.product = plain.clone() if bias is None else plain - bias.detach()
            self.age = 0
        else:
            output = _Product.apply(input, layer.weight, kept)
            output = output if bias is None else output + bias
            self.product, self.age = kept, self._state[AGE]
        self.inputs, self.dtype = input.detach(), output.dtype
        return output

    def again(self, input: Tensor) -> Tensor:
        """Return what :meth:`forward` returned, as a function of the bias alone."""
        layer = self._attachment.layer
        if not layer.training or not torch.is_grad_enabled():
            return self._ordinary(input)
        assert self.product is not None
        assert self.dtype is not None
        with full_precision(input):
            require_all_again(self._attachment, input)
            output = self.product.clone().requires_grad_()
            output = output if layer.bias is None else output + layer.bias
            return output.to(self.dtype)

    def _kept(self, inputs: Tensor) -> Tensor | None:
        attachment, state = self._attachment, self._state
        product: Tensor | None = state.get(PRODUCT)
        if product is None or state[AGE] >= _REFRESH_AFTER:
            return None
        # An output in half precision is the user's choice, and so is another weight an error.
        if torch.is_autocast_enabled(inputs.device.type) or inputs.dtype != product.dtype:
            return None
        weight = attachment.layer.weight
        if weight is not attachment.weight or not torch.equal(tensor_checksum(weight), state[MARK]):
            return None
        placement = place(attachment, inputs, state, binds=True)
        whole = placement is not None and placement.index is None
        return product if whole and len(product) == len(inputs) else None


def require_all_again(attachment: Attachment, inputs: Tensor) -> None:
    """Check that a later call of a closure trains on what the first one did.

    Raises:
        RuntimeError: if the inputs are not all samples in their order.
    """
    samples, noise = attachment.samples, attachment.given_noise
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


class _Product(torch.autograd.Function):
    """XW that is known already; its gradient is that of the product."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, product: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return product.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,), (inputs, weight) = gradients, ctx.saved_tensors
        needs_input, needs_weight, _ = ctx.needs_input_grad
        return (
            gradient @ weight if needs_input else None,
            gradient.mT @ inputs if needs_weight else None,
            None,
        )


def keep_product(state: dict[str, Any], weight: Tensor, product: Tensor, age: int) -> None:
    """Keep XW for the next step.

    Args:
        state: of the decoupled weight.
        weight: Wᵀ, shape (k, d), that the product belongs to.
        product: XW, shape (n, k).
        age: number of steps since it was computed.
    """
    if weight.element_size() not in _INTEGERS:
        # Weights in half precision are rounded at every step, and XW with them.
        state.pop(PRODUCT, None)
        return
    state[PRODUCT], state[MARK], state[AGE] = product, tensor_checksum(weight), age


def tensor_checksum(weight: Tensor) -> Tensor:
    """A number that tells a tensor of 4 or 8 bytes a number from any other, int64, shape ().

    Unlike a tensor's version it survives copies and files, and sees changes through ``.data``.
    """
    bits = weight.detach().contiguous().view(_INTEGERS[weight.element_size()]).flatten().long()
    # Odd factors modulo 2^64 can be inverted, so that no change of one number goes unseen.
    return (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()
