"""What all samples share: the decoupled layer along the component means, its bias, and the head.

One sample moves these parameters by no more than O(p/n), p their number, so that the theory at
large n leaves them alone. A head of hundreds of numbers fitted to a thousand samples over-fits all
the same, and is corrected here as the decoupled layer is: every sample meets the parameters as they
would be without it. Section 7 of ``docs/theory.md``.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dd.correction.capture import StepGradients
from dd.correction.gradient_check import require_unedited, same_weight, weight_changed
from dd.correction.head_choice import shared_count
from dd.correction.head_record import HeadRecord
from dd.correction.layers import find_head
from dd.functional import (
    at_least_single,
    shared_curvature,
    shared_sample_gradient,
    shared_shadow_gradient,
)
from dd.noise.units import Units
from dd.samples.placement import Placement
from dd.support.growth import grown
from dd.support.ranks import Ranks

__all__ = ["SharedParameters", "row_products"]

# H_ψ has this many rows at most: 1.6 GB in single precision.
_MOST_PARAMETERS = 20_000


Read = Callable[[Tensor, str], Tensor | None]
Write = Callable[[Tensor, str, Tensor], None]


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

    def check_gradients(
        self, gradient: Tensor, scores: HeadRecord, scale: float, ranks: Ranks
    ) -> None:
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
                require_unedited(
                    found, delivered, along, projection, name, scale=scale, ranks=ranks
                )

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
                    write(parameter, name, grown(found, num_samples))

    def curvature(self, pushes: StepGradients, scale: float, ranks: Ranks) -> Tensor:
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
        self,
        pushes: StepGradients,
        curvature: Tensor,
        scale: float,
        read: Read,
        units: Units | None = None,
    ) -> list[tuple[Tensor, str, Tensor, Tensor]]:
        """Shadows and their gradients, equation (4).

        Args:
            pushes: rows of the step whose shadows are kept here, with signal and scores.
            curvature: H_ψ, shape (p, p).
            scale: of the step's loss over the one that was differentiated here.
            read: gives the shadow of a parameter under a key.
            units: rows that are left out together, or None.

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
        if units is not None:
            moved = joined @ curvature.to(joined.dtype)
            pushed, push = units.summed(shared_sample_gradient(*rows).to(joined.dtype), index)
            moved.index_add_(0, pushed, push, alpha=-1)
        elif index is None:
            moved = shared_shadow_gradient(joined, *rows, curvature)
        else:
            # Displacements have one curvature for all, so that absent samples' move as well.
            moved = joined @ curvature.to(joined.dtype)
            moved.index_add_(0, index, shared_sample_gradient(*rows).to(joined.dtype), alpha=-1)
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
