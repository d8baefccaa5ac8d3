"""Networks of one architecture in many trials, each with data of its own, as one computation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from dd.correction.training_forward import probe_seed
from dd.functional import (
    centre_within_components,
    corrected_preactivation,
    damped_weight_gradient,
    kink_curvature,
    probe_curvature,
    rademacher,
    scaled_by_mass,
    shadow_gradient,
    stein_curvature,
)
from dd.noise.model import NoiseModel
from dd.optimizer import DecoupledDescent

__all__ = ["Correction", "Loss", "StackedNetwork", "StackedNoise", "StackedOptimizer"]

Loss = Callable[[Tensor, Tensor], Tensor]


class StackedNetwork:
    """The network of S trials.

    Args:
        model: gives modules and names; its first module is the decoupled layer.
        parameters: of all trials by their name in the model, each of shape (S, ...).
        loss: mean loss of scores (n, C) and targets (n,).

    Attributes:
        parameters: as given.
        weight: of the decoupled layer, shape (S, k, d).
        bias: of the decoupled layer, shape (S, k), or None.
        later: the other parameters that are trained.
    """

    def __init__(self, model: nn.Sequential, parameters: dict[str, Tensor], loss: Loss) -> None:
        self.parameters, self._loss = parameters, loss
        (first, _), *others = model._modules.items()
        self.weight = parameters[f"{first}.weight"]
        self.bias = parameters.get(f"{first}.bias")
        layer = (self.weight, self.bias)
        self.later = [
            p for p in parameters.values() if p.requires_grad and not any(p is q for q in layer)
        ]
        self._head = [(module, _below(name, parameters)) for name, module in others]

    def scores(self, rows: Tensor) -> Tensor:
        """Scores of pre-activations (S, n, k), shape (S, n, C)."""
        # A copy, because an activation may work in place; one unit after the other in memory, as
        # products with the inputs come: elementwise work on two orders at once is slow.
        values = rows.mT.clone(memory_format=torch.contiguous_format).mT
        for module, own in self._head:
            values = (
                _linear(own, values) if type(module) is nn.Linear else _call(module, own, values)
            )
        return values

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of every trial, shape (S,), of scores (S, n, C) and targets (S, n)."""
        if self._loss is F.cross_entropy:
            # Twice as fast as under vmap.
            return F.cross_entropy(scores.mT, targets, reduction="none").mean(1)
        return vmap(self._loss)(scores, targets)


def _below(name: str, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    start = f"{name}."
    return {key[len(start) :]: p for key, p in parameters.items() if key.startswith(start)}


def _linear(parameters: dict[str, Tensor], values: Tensor) -> Tensor:
    product = parameters["weight"] @ values.mT
    if "bias" in parameters:
        product = product + parameters["bias"].unsqueeze(-1)
    return product.mT


def _call(module: nn.Module, parameters: dict[str, Tensor], values: Tensor) -> Tensor:
    def one(own: dict[str, Tensor], rows: Tensor) -> Tensor:
        return functional_call(module, own, (rows,))

    return vmap(one)(parameters, values)


@dataclass(frozen=True, eq=False)
class StackedNoise:
    """The noise models of S trials, filled up with bins of no noise.

    Attributes:
        eigenvalues: λ, shape (S, B).
        mass: τ, shape (S, B).
        relative_mass: shape (S, n), or None where all samples of all trials carry the same.
        components: component of each sample, shape (S, n), or None where they are unknown.
        num_components: the most that a trial has.
    """

    eigenvalues: Tensor
    mass: Tensor
    relative_mass: Tensor | None
    components: Tensor | None
    num_components: int

    @classmethod
    def of(cls, models: Sequence[NoiseModel], like: Tensor) -> "StackedNoise":
        """Stack models, in the precision and on the device of ``like``."""
        models = [model.to(like.device, like.dtype) for model in models]
        components = [model.components for model in models if model.components is not None]
        return cls(
            eigenvalues=_filled([model.eigenvalues for model in models]),
            mass=_filled([model.mass for model in models]),
            relative_mass=_relative_masses(models),
            components=torch.stack(components) if components else None,
            num_components=max((int(ids.max()) + 1 for ids in components), default=0),
        )


def _filled(rows: Sequence[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _relative_masses(models: Sequence[NoiseModel]) -> Tensor | None:
    masses = [model.relative_mass for model in models]
    some = next((mass for mass in masses if mass is not None), None)
    if some is None:
        return None
    return torch.stack([torch.ones_like(some) if mass is None else mass for mass in masses])


class Correction:
    """The shadows that one optimizer keeps in S trials, and what moves them.

    Args:
        optimizer: gives the estimator of the curvature, the damping and the seed of the probes.
        noise: of the trials.
        samples: n.
        width: k.
        seeds: of the probes of each trial; by default the optimizer's own in all.
        leaky: whether kinks at 0 may be other than a ReLU's.

    Attributes:
        shadow: Q, shape (S, B, n, k).
        stein: whether the curvature is Stein's and takes no second derivative.
    """

    def __init__(
        self,
        optimizer: DecoupledDescent,
        noise: StackedNoise,
        samples: int,
        width: int,
        seeds: Sequence[int] | None = None,
        *,
        leaky: bool = False,
    ) -> None:
        self._noise, self._damping = noise, optimizer._damping
        self._seeds = [optimizer._seed] if seeds is None else list(seeds)
        self.shadow = noise.eigenvalues.new_zeros(*noise.eigenvalues.shape, samples, width)
        self.stein = optimizer._curvature == "stein"
        self._leaky = leaky

    def corrected(self, preactivation: Tensor) -> Tensor:
        """R of XW, both of shape (S, n, k)."""
        return corrected_preactivation(preactivation.contiguous(), self.shadow)

    def curvature(self, rows: Tensor, gradient: Tensor, step: int) -> Tensor:
        """H, shape (S, k, k).

        Args:
            rows: R, shape (S, n, k), a leaf of the graph.
            gradient: G, shape (S, n, k); part of the graph but for Stein's estimate.
            step: number of updates so far.
        """
        noise = self._noise
        if self.stein:
            assert noise.components is not None
            ids, count = noise.components, noise.num_components
            return stein_curvature(centre_within_components(rows.detach(), ids, count), gradient)
        probe = self._probe(rows, step)
        product = _product(gradient, rows, probe.expand_as(rows))
        mass = noise.relative_mass
        kinks = kink_curvature(rows.detach(), gradient.detach(), mass, leaky=self._leaky)
        return probe_curvature(probe, scaled_by_mass(product, mass), kinks)

    def _probe(self, rows: Tensor, step: int) -> Tensor:
        """V, shape (n, k), or (S, n, k) where the trials have seeds of their own."""
        like, draws = rows.new_empty(rows.shape[1:]), {}
        for seed in set(self._seeds):
            generator = torch.Generator(rows.device).manual_seed(probe_seed(seed, step))
            draws[seed] = rademacher(like, generator)
        of_all = [draws[seed] for seed in self._seeds]
        probe = of_all[0] if len(of_all) == 1 else torch.stack(of_all)
        return probe.mT.contiguous().mT

    def shadow_gradient(self, gradient: Tensor, curvature: Tensor) -> Tensor:
        """∇Q, shape (S, B, n, k)."""
        noise = self._noise
        values, mass, relative = noise.eigenvalues, noise.mass, noise.relative_mass
        gradient = gradient.contiguous()
        moved = (self.shadow, gradient, curvature, values, mass, self._damping)
        return shadow_gradient(*moved, relative_mass=relative)

    def weight_gradient(self, gradient: Tensor, weight: Tensor, curvature: Tensor) -> Tensor:
        """What the decoupled weight (S, k, d) descends in place of its gradient."""
        if self._damping == 1.0:
            return gradient
        variance = self._noise.eigenvalues.unsqueeze(-1)
        return damped_weight_gradient(gradient, weight, curvature, variance, self._damping)


def _product(gradient: Tensor, rows: Tensor, probe: Tensor) -> Tensor:
    if not gradient.requires_grad:
        # A loss that is linear in R has no second derivative at all.
        return torch.zeros_like(gradient)
    (product,) = torch.autograd.grad(gradient, rows, probe, allow_unused=True)
    return torch.zeros_like(gradient) if product is None else product


class StackedOptimizer:
    """One optimizer in S trials.

    Args:
        network: that it trains.
        optimizer: of the network's trained parameters, in one group.
        correction: of a decoupled optimizer.

    Attributes:
        network: as given.
        gradient: G of the latest :meth:`backward`, shape (S, n, k).
    """

    gradient: Tensor

    def __init__(
        self,
        network: StackedNetwork,
        optimizer: torch.optim.Optimizer,
        correction: Correction | None,
    ) -> None:
        self.network, self._optimizer, self._correction = network, optimizer, correction
        if correction is not None:
            # The rule that moves W moves Q.
            optimizer.param_groups[0]["params"].append(correction.shadow)

    @property
    def corrects(self) -> bool:
        """Whether the training loss is that of corrected pre-activations."""
        return self._correction is not None

    def preactivation(self, product: Tensor, *, corrected: bool) -> Tensor:
        """R of XW, both of shape (S, n, k)."""
        bias = self.network.bias
        if bias is not None:
            product = product + bias.unsqueeze(-2)
        if corrected and self._correction is not None:
            product = self._correction.corrected(product)
        return product

    def backward(self, product: Tensor, targets: Tensor, step: int) -> Tensor:
        """Differentiate the losses, for :meth:`step` to follow.

        Args:
            product: XW, shape (S, n, k).
            targets: shape (S, n).
            step: number of updates so far.

        Returns:
            The training losses, shape (S,).
        """
        network, correction = self.network, self._correction
        rows = self.preactivation(product, corrected=True).requires_grad_()
        with torch.enable_grad():
            losses = network.losses(network.scores(rows), targets)
            # Trials share no parameter: the gradient of the sum is that of each.
            gradient, *others = torch.autograd.grad(
                losses.sum(),
                [rows, *network.later],
                create_graph=correction is not None and not correction.stein,
                materialize_grads=True,
            )
            if correction is not None:
                self._curvature = correction.curvature(rows, gradient, step)
        self.gradient = gradient.detach()
        for parameter, move in zip(network.later, others, strict=True):
            parameter.grad = move.detach()
        return losses.detach()

    def step(self, weight_gradient: Tensor) -> None:
        """Move weights and shadows.

        Args:
            weight_gradient: GᵀX, shape (S, k, d).
        """
        network, correction = self.network, self._correction
        if correction is not None:
            curvature = self._curvature
            weight_gradient = correction.weight_gradient(weight_gradient, network.weight, curvature)
            correction.shadow.grad = correction.shadow_gradient(self.gradient, curvature)
        network.weight.grad = weight_gradient
        if network.bias is not None and network.bias.requires_grad:
            network.bias.grad = self.gradient.sum(-2)
        self._optimizer.step()
