"""What the head saw and said in one training forward."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dd.functional import (
    at_least_single,
    softmax_curvature,
)

__all__ = ["HeadRecord"]


# Share of the gradient by which it may differ from that of cross-entropy: rounding of probabilities
# near 0 and 1 in single precision, and of half precision, in which autocast delivers gradients.
_SINGLE_TOLERANCE, _HALF_TOLERANCE = 1e-3, 2e-2


@dataclass(eq=False)
class HeadRecord:
    """What the head saw and said in one training forward.

    Attributes:
        values: corrected scores, shape (n, C).
        features: inputs of the head, and 1 for its bias, shape (n, f).
        jacobian: ∂scores_i/∂r_i, shape (n, C, k).
        gradient: ∂L/∂scores, shape (n, C), or None before the backward pass.
    """

    values: Tensor
    features: Tensor
    jacobian: Tensor
    gradient: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence["HeadRecord"]) -> "HeadRecord":
        """Put the rows of micro-batches together."""
        if len(parts) == 1:
            return parts[0]
        gradients = [part.gradient for part in parts if part.gradient is not None]
        return cls(
            torch.cat([part.values for part in parts]),
            torch.cat([part.features for part in parts]),
            torch.cat([part.jacobian for part in parts]),
            torch.cat(gradients) if len(gradients) == len(parts) else None,
        )

    def curvature(self) -> Tensor:
        """Curvature of L in the scores, shape (n, C, C).

        Raises:
            RuntimeError: if the gradient is not that of softmax cross-entropy.
        """
        assert self.gradient is not None
        return softmax_curvature(self.values, _sample_weights(self.values, self.gradient))

    def require_weights_of_labels(self) -> None:
        """Check that samples of one label have one weight.

        With two classes the gradient of any loss of their difference is that of a weighted
        cross-entropy, whose curvature it need not have.

        Raises:
            RuntimeError: if they have not.
        """
        assert self.gradient is not None
        gradient = at_least_single(self.gradient)
        if gradient.shape[1] != 2:
            return
        p = torch.softmax(at_least_single(self.values), 1).to(gradient)
        # That of the right class may be rounded to zero.
        first = gradient[:, 0] < gradient[:, 1]
        size = torch.where(first, gradient[:, 1], gradient[:, 0])
        # A gradient of zero does not tell the label, nor anything else.
        wrong = torch.where(first, p[:, 1], p[:, 0]) * (size != 0)
        # Squares of small probabilities would leave the range of numbers.
        smallest = torch.finfo(wrong.dtype).tiny
        wrong = wrong / wrong.amax().clamp_min(smallest)
        size = size / size.abs().amax().clamp_min(smallest)
        expected = torch.zeros_like(size)
        for label in (first, ~first):
            some = torch.where(label, wrong, 0.0)
            weight = (some * size).sum() / some.square().sum().clamp_min(smallest)
            expected = expected + weight * some
        if bool((expected - size).norm() > _tolerance(self.gradient) * size.norm()):
            raise RuntimeError(
                "DecoupledDescent: of two classes the head is followed where the loss is "
                "cross-entropy with one weight a class; this one is another, or weighs samples one "
                "by one. Weighted cross-entropy: head=True; else head=False."
            )

    def require_only_way(self, gradient: Tensor, name: str) -> None:
        """Check that the loss depends on each sample's pre-activation through its own scores alone.

        Args:
            gradient: G, shape (n, k).
            name: of the head.

        Raises:
            RuntimeError: if it does not.
        """
        assert self.gradient is not None
        scores, own = at_least_single(self.gradient), at_least_single(gradient)
        jacobian = at_least_single(self.jacobian).to(scores)
        through = torch.einsum("nck,nc->nk", jacobian, scores)
        share = max(_tolerance(self.gradient), _tolerance(gradient), _tolerance(self.jacobian))
        if bool((through - own).norm() > share * own.norm()):
            raise RuntimeError(
                "DecoupledDescent: the loss depends on the decoupled layer in other ways than "
                f"through head {name!r}, or samples depend on each other (batch normalisation, "
                "several heads, a penalty on activations), which the head's correction does not "
                "follow. Use head=False."
            )


def _tolerance(values: Tensor) -> float:
    return _HALF_TOLERANCE if torch.finfo(values.dtype).eps > 1e-4 else _SINGLE_TOLERANCE


def _sample_weights(scores: Tensor, gradient: Tensor) -> Tensor:
    """Weights w of the samples in a softmax cross-entropy with gradient w_i (p_i − y_i).

    Raises:
        RuntimeError: if the gradient is another.
    """
    share = _tolerance(gradient)
    gradient = at_least_single(gradient)
    p = torch.softmax(at_least_single(scores), 1).to(gradient)
    label = torch.nn.functional.one_hot(gradient.argmin(1), gradient.shape[1]).to(gradient)
    wrong = (p * (1 - label)).sum(1)
    weights = (gradient * (1 - label)).sum(1) / wrong.clamp_min(torch.finfo(wrong.dtype).tiny)
    expected = weights.unsqueeze(1) * (p - label)
    rounding = 1e-5 * weights.norm()
    matches = (expected - gradient).norm() <= share * gradient.norm() + rounding
    if bool(matches & (weights >= 0).all()):
        return weights
    raise RuntimeError(
        "DecoupledDescent: head=True needs the softmax cross-entropy of the head's output with one "
        "label a sample (torch.nn.CrossEntropyLoss without label smoothing); the gradient at the "
        "output is another. Use such a loss, name the layer that computes the scores with "
        "head=..., or use head=False."
    )
