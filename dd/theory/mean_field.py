"""One simulation of the recursion of state evolution, and what it simulates."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dd.correction.layers import find_layer
from dd.functional import centre_within_components, symmetric_curvature
from dd.rules.line_search.replay import forward_replaced
from dd.support.checks import check_count, check_number
from dd.theory.fresh_paths import FreshPaths, Start
from dd.theory.limit_checks import check_loss, check_network
from dd.theory.mixture import GaussianMixture

__all__ = ["MeanField", "Snapshot", "Training"]

# Of H̄, relative to the mean eigenvalue of K: where K has none, the drift W H̄ has none either.
_RIDGE = 1e-6


@dataclass(frozen=True, eq=False)
class Training:
    """What is trained on what, and how; attributes as the arguments of ``dd.state_evolution``.

    Raises:
        ValueError: if a number is out of range.
    """

    mixture: GaussianMixture
    loss: Callable[[Tensor, Tensor], Tensor]
    error: Callable[[Tensor, Tensor], Tensor] | None
    alpha: float
    steps: int
    lr: float | Callable[[int], float]
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    damping: float

    def __post_init__(self) -> None:
        check_count("state_evolution: steps", self.steps)
        check_number("state_evolution: alpha", self.alpha)
        if self.alpha == 0:
            raise ValueError("state_evolution: alpha = n/d must be positive, got 0")
        check_number("state_evolution: damping", self.damping)
        if self.damping > 1:
            raise ValueError(f"state_evolution: damping must lie in [0, 1], got {self.damping}")
        if self.damping < 1 and len(self.mixture.eigenvalues) > 1:
            raise ValueError(
                f"state_evolution: damping={self.damping} is defined for isotropic noise, got "
                f"{len(self.mixture.eigenvalues)} bins; use damping=1"
            )

    def rate(self, step: int) -> float:
        """Learning rate of an update.

        Raises:
            ValueError: if it is no number.
        """
        rate = self.lr(step) if callable(self.lr) else self.lr
        check_number(f"state_evolution: lr at step {step}", rate)
        return rate

    def optimizer(self, parameters: list[Tensor]) -> torch.optim.SGD:
        """The rule that moves the decoupled weights and every other parameter alike."""
        return torch.optim.SGD(
            parameters,
            lr=self.rate(0),
            momentum=self.momentum,
            dampening=self.dampening,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )

    @property
    def noise_per_sample(self) -> Tensor:
        """τ_b/n of each bin, shape (B,), float64."""
        share = torch.tensor(self.mixture.multiplicities) / self.mixture.dimension
        return share.double() * self.mixture.eigenvalues / self.alpha


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A simulation at one step: loss, error, M (A, k) and K (k, k)."""

    loss: float
    error: float
    overlaps: Tensor
    covariance: Tensor


class MeanField:
    """Sampled paths, and a head that is trained on them.

    Args:
        training: what to simulate.
        model: with its initial weights; is changed.
        layer: the decoupled one, its name, or None.
        count: number of paths.
        generator: CPU generator of the paths.

    Raises:
        ValueError: if the model does not fit the mixture.
    """

    def __init__(
        self,
        training: Training,
        model: nn.Module,
        layer: nn.Module | str | None,
        count: int,
        generator: torch.Generator,
    ) -> None:
        mixture = training.mixture
        self._training, self._model = training, model.train()
        name, self._layer = find_layer(model, layer)
        check_network(model, name, self._layer, mixture.dimension)
        model.zero_grad()
        weight = self._layer.weight
        counts = _counts(mixture.probabilities, count)
        self._shares = (mixture.probabilities / counts).to(weight)
        self._sizes = counts.tolist()
        self._components = torch.arange(len(counts)).repeat_interleave(counts).to(weight.device)
        self._targets = mixture.targets.to(weight.device)[self._components]
        self._paths = FreshPaths(
            Start.measured(weight.detach().T, mixture),
            mixture.eigenvalues,
            training.noise_per_sample,
            self._components,
            width=weight.shape[0],
            steps=training.steps,
            dtype=weight.dtype,
            generator=_on_device(generator, weight.device),
        )
        others = [p for p in model.parameters() if p.requires_grad and p is not weight]
        self._optimizer = training.optimizer([self._paths.weight, *others])

    @torch.enable_grad()
    def look(self, step: int) -> Snapshot:
        """Find losses, errors and gradients of the present state.

        Raises:
            FloatingPointError: if the loss or its gradient is not finite.
            ValueError: if the model uses its inputs or the decoupled weight beside the decoupled
                layer, or the loss is no mean over samples.
        """
        self._optimizer.zero_grad()
        self._preactivation = self._paths.preactivation().requires_grad_()
        outputs = self._outputs()
        if step == 0:
            check_loss(self._training.loss, outputs.detach(), self._targets, self._sizes)
        loss = self._expected_loss(outputs)
        if not bool(loss.isfinite()):
            raise self._not_finite(step)
        loss.backward()
        gradient = self._preactivation.grad
        if gradient is None or not bool(gradient.isfinite().all()):
            raise self._not_finite(step)
        if self._layer.weight.grad is not None:
            raise ValueError(
                "state_evolution: the decoupled weight is used beside its layer, as a tied or a "
                "penalised one; that is outside of the theory"
            )
        return Snapshot(
            float(loss.detach()),
            self._expected_error(outputs.detach()),
            self._paths.overlaps().clone(),
            self._paths.covariance(),
        )

    def move(self, step: int) -> None:
        """Make one update, from the gradients that :meth:`look` found."""
        preactivation, gradient = self._preactivation.detach(), self._preactivation.grad
        assert gradient is not None
        shares = self._shares[self._components, None]
        curvature = self._curvature(preactivation, gradient, shares)
        damped = self._training.damping * curvature
        means = torch.stack([part.sum(0) for part in gradient.split(self._sizes)])
        self._paths.weight.grad = self._paths.gradient(means, gradient / shares.sqrt(), damped)
        self._optimizer.param_groups[0]["lr"] = self._training.rate(step)
        self._optimizer.step()

    def _outputs(self) -> Tensor:
        """The model's outputs on samples of these pre-activations.

        Raises:
            ValueError: if the decoupled layer does not get the inputs themselves, once.
        """
        rows = self._preactivation
        # Whatever else takes the inputs finds them to be no numbers.
        nowhere = rows.new_full((1, 1), torch.nan).expand(len(rows), self._layer.in_features)
        bias, calls = self._layer.bias, 0

        def forward(inputs: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if inputs.data_ptr() != nowhere.data_ptr() or inputs.shape != nowhere.shape:
                raise ValueError(
                    "state_evolution: something before the decoupled layer changes its inputs; "
                    "apply it to the mixture instead"
                )
            # A module after the layer may work in place.
            return rows.clone() if bias is None else rows + bias

        with forward_replaced(self._layer, forward):
            outputs = self._model(nowhere)
        if calls != 1:
            raise ValueError(
                f"state_evolution: the decoupled layer ran {calls} times in one forward, expected "
                "once"
            )
        return outputs

    def _expected_loss(self, outputs: Tensor) -> Tensor:
        parts = zip(outputs.split(self._sizes), self._targets.split(self._sizes), strict=True)
        losses = torch.stack([self._training.loss(*part).reshape(()) for part in parts])
        return self._training.mixture.probabilities.to(losses) @ losses

    def _expected_error(self, outputs: Tensor) -> float:
        error = self._training.error
        if error is None:
            scores = outputs.ndim == 2 and outputs.shape[1] > 1
            if self._targets.is_floating_point() or self._targets.ndim != 1 or not scores:
                return torch.nan
            wrong = outputs.argmax(1) != self._targets
        else:
            wrong = error(outputs, self._targets)
            if wrong.shape != (len(outputs),):
                raise ValueError(
                    f"state_evolution: expected error to return a number for each of "
                    f"{len(outputs)} samples, got shape {tuple(wrong.shape)}"
                )
        return float(wrong.to(self._shares) @ self._shares[self._components])

    def _curvature(self, preactivation: Tensor, gradient: Tensor, shares: Tensor) -> Tensor:
        """H̄ by Stein's lemma, around the component means of the paths themselves."""
        centred = centre_within_components(preactivation, self._components, len(self._sizes))
        centred = centred.double()
        covariance = centred.T @ (shares * centred)
        return symmetric_curvature(covariance, centred.T @ gradient.double(), _RIDGE).to(gradient)

    def _not_finite(self, step: int) -> Exception:
        if step == 0 and bool(self._preactivation.isfinite().all()):
            return ValueError(
                "state_evolution: the loss or its gradient is not finite at the start. Either the "
                "model uses its inputs beside the decoupled layer (these are NaN here), or the "
                "loss overflows"
            )
        return FloatingPointError(
            f"state_evolution: the loss or its gradient is not finite at step {step}; the likely "
            "cause is a learning rate that is too large"
        )


def _counts(probabilities: Tensor, total: int) -> Tensor:
    """Paths of each component: near p_a of them all, and two at least."""
    return (probabilities * total).round().long().clamp_min(2)


def _on_device(generator: torch.Generator, device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return generator
    return torch.Generator(device).manual_seed(generator.initial_seed())
