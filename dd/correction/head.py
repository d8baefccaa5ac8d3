"""What all samples share: the decoupled layer along the component means, its bias, and the head.

One sample moves these parameters by no more than O(p/n), p their number, so that the theory at
large n leaves them alone. A head of hundreds of numbers fitted to a thousand samples over-fits all
the same, and is corrected here as the decoupled layer is: every sample meets the parameters as they
would be without it. Section 7 of ``docs/theory.md``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dd.correction.gradient_check import require_unedited, same_weight, weight_changed
from dd.correction.head_choice import shared_count
from dd.correction.layers import find_head
from dd.functional import (
    at_least_single,
    shared_curvature,
    shared_push,
    shared_shadow_gradient,
    softmax_curvature,
)
from dd.samples.recognition import Placement
from dd.support.ranks import Ranks

if TYPE_CHECKING:
    from dd.correction.capture import Pushes

__all__ = ["Scores", "SharedParameters", "row_products"]

# H_ψ has this many rows at most: 1.6 GB in single precision.
_MOST_PARAMETERS = 20_000

# Share of the gradient by which it may differ from that of cross-entropy: rounding of probabilities
# near 0 and 1 in single precision, and of half precision, in which autocast delivers gradients.
_SINGLE_TOLERANCE, _HALF_TOLERANCE = 1e-3, 2e-2

Read = Callable[[Tensor, str], Tensor | None]
Write = Callable[[Tensor, str, Tensor], None]


@dataclass(eq=False)
class Scores:
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
    def joined(cls, parts: Sequence["Scores"]) -> "Scores":
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


class SharedParameters:
    """The shared parameters ψ of one attached model and where their shadows are kept.

    Args:
        module: the model.
        layer: the decoupled layer.
        choice: as in :func:`dd.correction.layers.find_head`.
        directions: orthonormal basis of the span of the component means, shape (d, m), or None
            where they are unknown.

    Attributes:
        name: dotted name of the head.
        head: the last linear layer.
        parts: each parameter with a shadow of its own, and the key of that shadow in its state.

    Raises:
        ValueError: if there is no head, or there are too many shared parameters.
        TypeError: if the head is not an ``nn.Linear``.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: nn.Linear,
        choice: bool | nn.Module | str,
        directions: Tensor | None,
    ) -> None:
        self.layer = layer
        self.name, self.head = find_head(module, layer, choice)
        self.parts: list[tuple[Tensor, str]] = []
        for linear, key in ((self.layer, "signal_shadow"), (self.head, "shadow")):
            self.parts.append((linear.weight, key))
            if linear.bias is not None and linear.bias.requires_grad:
                self.parts.append((linear.bias, "shadow"))
        self._directions = directions
        generator = torch.Generator().manual_seed(0)
        self._direction = torch.randn(
            self.head.in_features, generator=generator, dtype=torch.float32
        )
        self._expected: Tensor | None = None
        self._signal: Tensor | None = None
        self._require_few()

    @property
    def count(self) -> int:
        """Number p of the shared parameters."""
        along = 0 if self._directions is None else self._directions.shape[1]
        return shared_count(self.layer, self.head, along)

    def _has_bias(self, linear: nn.Linear) -> bool:
        return any(parameter is linear.bias for parameter, _ in self.parts)

    def _require_few(self) -> None:
        count = self.count
        if count > _MOST_PARAMETERS:
            raise ValueError(
                f"DecoupledDescent: head=True would follow {count} shared parameters, each "
                f"sample's and their {count} x {count} curvature; it is made for at "
                f"most {_MOST_PARAMETERS}. Use fewer units, or leave the head as it is (head=False)"
            )

    def forget(self) -> None:
        """Forget the samples and the weight that the state belonged to."""
        self._signal = self._expected = None

    def signal(self, inputs: Tensor, placement: Placement | None) -> Tensor:
        """Coordinates U of the inputs along the component means, and 1 for the bias.

        Args:
            inputs: shape (m, d).
            placement: of the batch. Coordinates of all samples in their order are kept.

        Returns:
            Shape (m, j) or (m, j + 1).
        """
        kept, dtype = self._signal, torch.promote_types(inputs.dtype, torch.float32)
        whole = placement is not None and placement.index is None
        if whole and kept is not None and kept.dtype == dtype and kept.device == inputs.device:
            return kept
        values = at_least_single(inputs.detach())
        along = values[:, :0]
        if self._directions is not None:
            along = values @ self._directions.to(values)
        signal = self._with_one(along, self.layer)
        if whole:
            self._signal = signal
        return signal

    def correct_preactivation(
        self, output: Tensor, signal: Tensor, read: Read, index: Tensor | None
    ) -> Tensor:
        """Add each sample's displacement of the decoupled layer along the means."""
        return self._displaced(output, signal, self.layer, "signal_shadow", read, index)

    def correct_scores(
        self, output: Tensor, features: Tensor, read: Read, index: Tensor | None
    ) -> Tensor:
        """Add each sample's displacement of the head.

        Args:
            output: scores, shape (m, C).
            features: as :meth:`features` gives them, shape (m, f).
            read: gives the shadow of a parameter under a key.
            index: sample of each row, shape (m,); None for all samples in their order.

        Raises:
            ValueError: if the head does not receive one row a sample.
        """
        shadow = read(self.head.weight, "shadow")
        rows = None if shadow is None else len(shadow) if index is None else len(index)
        if output.dim() != 2 or rows not in {None, len(output)}:
            expected = "n" if rows is None else str(rows)
            raise ValueError(
                f"DecoupledDescent: head {self.name!r} must return one row a sample, shape "
                f"({expected}, {self.head.out_features}), in training; got {tuple(output.shape)}"
            )
        return self._displaced(output, features, self.head, "shadow", read, index)

    def features(self, inputs: Tensor) -> Tensor:
        """Inputs of the head, and 1 for its bias, shape (n, f)."""
        return self._with_one(at_least_single(inputs.detach()), self.head)

    def check_gradients(self, gradient: Tensor, scores: Scores, scale: float, ranks: Ranks) -> None:
        """Check that the gradients of head and biases are those that the backward delivered.

        Args:
            gradient: G, shape (m, k).
            scores: of the same forward and backward.
            scale: by which the decoupled weight's gradient was edited since.
            ranks: which share the rows.

        Raises:
            RuntimeError: if one is another.
        """
        assert scores.gradient is not None
        smallest = torch.finfo(torch.promote_types(gradient.dtype, torch.float32)).tiny ** 0.5
        if bool(scores.gradient.abs().amax() < smallest):
            # Squares of these leave the range of numbers, and with them every comparison.
            return
        scores.require_only_way(gradient, self.name)
        features = scores.features[:, : self.head.in_features]
        direction = self._direction.to(features)
        ones = features.new_ones(len(features))
        checks = [(self.head.weight, scores.gradient, direction, features @ direction)]
        for linear, delivered in ((self.layer, gradient), (self.head, scores.gradient)):
            if self._has_bias(linear):
                checks.append((linear.bias, delivered, ones[:1], ones))
        for parameter, delivered, along, projection in checks:
            if parameter.grad is not None:
                found = parameter.grad.reshape(len(parameter), -1)
                name = f"a parameter of shape {tuple(parameter.shape)} followed by head=True"
                require_unedited(found, delivered, along, projection, name, scale, ranks)

    def remember_weight(self) -> None:
        """Remember the head's weight that a step leaves."""
        weight = at_least_single(self.head.weight.detach())
        self._expected = weight @ self._direction.to(weight)

    def check_weight(self) -> None:
        """Check that the head's weight is the one that the last step left.

        Raises:
            RuntimeError: if it is another.
        """
        if self._expected is None:
            return
        weight = self.head.weight.detach()
        if not bool(same_weight(weight, self._direction.to(weight.device), self._expected)):
            raise RuntimeError(weight_changed(f"the weight of head {self.name!r}"))

    def make(self, read: Read, write: Write, num_samples: int, signal: Tensor) -> None:
        """Make displacements of zero for samples that have none yet.

        Args:
            read: gives the shadow of a parameter under a key; None before the first step.
            write: takes it.
            num_samples: n.
            signal: U of some samples, shape (m, j).
        """
        for (parameter, key), size in zip(
            self.parts, self._sizes(num_samples, signal), strict=True
        ):
            for name in (key, f"{key}_momentum_buffer"):
                found = read(parameter, name)
                if found is None and name == key:
                    write(parameter, name, signal.new_zeros(size))
                elif found is not None and len(found) < num_samples:
                    more = found.new_zeros(num_samples - len(found), *size[1:])
                    write(parameter, name, torch.cat([found, more]))

    def curvature(self, pushes: "Pushes", scale: float, ranks: Ranks) -> Tensor:
        """H_ψ of a step, equation (4), shape (p, p).

        Args:
            pushes: rows of the step on this rank, with signal and scores.
            scale: of the step's loss over the one that was differentiated here.
            ranks: which share the rows.

        Raises:
            RuntimeError: if the loss is not softmax cross-entropy of the scores.
        """
        signal, scores = pushes.signal, pushes.scores
        assert signal is not None
        assert scores is not None
        jacobian = at_least_single(scores.jacobian)
        found = shared_curvature(scores.curvature(), jacobian, signal, scores.features)
        found = ranks.sum(found)
        return found if scale == 1.0 else scale * found

    def shadow_gradients(
        self, pushes: "Pushes", curvature: Tensor, scale: float, read: Read
    ) -> list[tuple[Tensor, str, Tensor, Tensor]]:
        """Shadows and their gradients, equation (4).

        Args:
            pushes: rows of the step whose shadows are kept here, with signal and scores.
            curvature: H_ψ, shape (p, p).
            scale: of the step's loss over the one that was differentiated here.
            read: gives the shadow of a parameter under a key.

        Returns:
            Parameter, key, shadow and gradient of each part.
        """
        signal, scores = pushes.signal, pushes.scores
        assert signal is not None
        assert scores is not None
        assert scores.gradient is not None
        shadows = [found for part in self.parts if (found := read(*part)) is not None]
        gradients = at_least_single(pushes.gradient), at_least_single(scores.gradient)
        if scale != 1.0:
            gradients = scale * gradients[0], scale * gradients[1]
        rows = (*gradients, signal, scores.features)
        joined, index = self._joined(shadows), pushes.placement.index
        if index is None:
            moved = shared_shadow_gradient(joined, *rows, curvature)
        else:
            # Displacements have one curvature for all, so that absent samples' move as well.
            moved = joined @ curvature.to(joined.dtype)
            moved.index_add_(0, index, shared_push(*rows).to(joined.dtype), alpha=-1)
        parts = self._split(moved, signal.shape[1], scores.features.shape[1])
        return [
            (parameter, key, shadow, part.reshape(shadow.shape))
            for (parameter, key), shadow, part in zip(self.parts, shadows, parts, strict=True)
        ]

    def _sizes(self, n: int, signal: Tensor) -> list[tuple[int, ...]]:
        along = signal.shape[1] - self._has_bias(self.layer)
        return [
            (n, self.layer.out_features, along) if key == "signal_shadow" else (n, *parameter.shape)
            for parameter, key in self.parts
        ]

    def _joined(self, shadows: list[Tensor]) -> Tensor:
        """One row ψ_i a sample, shape (n, p)."""
        split = 1 + self._has_bias(self.layer)
        blocks = (shadows[:split], shadows[split:])
        rows = [
            torch.cat([s if s.dim() == 3 else s.unsqueeze(-1) for s in block], -1).flatten(1)
            for block in blocks
        ]
        return torch.cat(rows, 1)

    def _split(self, joined: Tensor, along: int, features: int) -> list[Tensor]:
        k = self.layer.out_features
        omega = joined[:, : k * along].unflatten(1, (k, along))
        head = joined[:, k * along :].unflatten(1, (self.head.out_features, features))
        parts: list[Tensor] = []
        for block, linear in ((omega, self.layer), (head, self.head)):
            parts += [block[..., :-1], block[..., -1]] if self._has_bias(linear) else [block]
        # torch's fused step misreads gradients that are slices.
        return [part.contiguous() for part in parts]

    def _with_one(self, values: Tensor, linear: nn.Linear) -> Tensor:
        if not self._has_bias(linear):
            return values
        return torch.cat([values, values.new_ones(len(values), 1)], 1)

    def _displaced(
        self,
        output: Tensor,
        rows: Tensor,
        linear: nn.Linear,
        key: str,
        read: Read,
        index: Tensor | None,
    ) -> Tensor:
        shadow = read(linear.weight, key)
        if shadow is None:
            return output
        some = shadow if index is None else shadow[index]
        shift = row_products(some, rows)
        if self._has_bias(linear):
            bias = read(linear.bias, "shadow")
            assert bias is not None
            shift = shift + (bias if index is None else bias[index])
        return output + shift.to(output.dtype)


def row_products(shadow: Tensor, rows: Tensor) -> Tensor:
    """What each sample's displacement of a weight, shape (n, o, i), makes of its row.

    Args:
        shadow: shape (n, o, i).
        rows: shape (n, i), or more columns, of which the first count.

    Returns:
        Shape (n, o).
    """
    return torch.einsum("noi,ni->no", shadow, rows[:, : shadow.shape[2]])


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
