"""Some trials of training on all samples, computed at once."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dd.correction.head_choice import AUTO, worth_correcting
from dd.curvature.choice import has_leaky_kinks
from dd.noise.by_default import fitted_by_default
from dd.noise.model import NoiseModel
from dd.optimizer import DecoupledDescent
from dd.trials.inputs import (
    MakeOptimizer,
    TrialSplit,
    check_model,
    check_noise,
    check_scores,
    check_split,
    made,
)
from dd.trials.results import METRICS, Doubt, Failure, Trials
from dd.trials.stacked import Correction, Loss, StackedNetwork, StackedNoise, StackedOptimizer
from dd.watch.shadow_size import largest_shadow_ratio, shares

__all__ = ["Chunk", "FirstTrial", "MakeModel", "MakeNoise", "MakeSplit", "Plan", "first_trial"]

MakeSplit = Callable[[int], TrialSplit]
MakeModel = Callable[[int, TrialSplit], nn.Sequential]
MakeNoise = Callable[[TrialSplit], NoiseModel | None]


@dataclass(frozen=True, eq=False)
class Plan:
    """What all chunks have in common; the arguments of :func:`run_trials`, checked."""

    make_split: MakeSplit
    make_model: MakeModel
    optimizers: dict[str, MakeOptimizer]
    recorded: list[int]
    loss: Loss
    noise: MakeNoise | None
    probe_seed: Callable[[int], int] | None
    device: torch.device


class FirstTrial(NamedTuple):
    """Seed, data and network of the first trial."""

    seed: int
    split: TrialSplit
    model: nn.Sequential


def first_trial(plan: Plan, seed: int) -> FirstTrial:
    """Make and check the first trial.

    Raises:
        ValueError: if its data or network cannot be batched.
        TypeError: if its network is not of the kind that can be.
    """
    split = plan.make_split(seed)
    check_split(split, seed, split)
    model = plan.make_model(seed, split)
    check_model(model, seed, split)
    check_scores(model, plan.loss, seed, split)
    return FirstTrial(seed, split, model)


class Chunk:
    """Some trials that are computed at once.

    Args:
        plan: what all chunks have in common.
        seeds: of the S trials.
        first: the trial that all others must be like.
    """

    def __init__(self, plan: Plan, seeds: tuple[int, ...], first: FirstTrial) -> None:
        self._plan, self._seeds = plan, seeds
        splits, models = [], []
        for seed in seeds:
            split, model = first.split, first.model
            if seed != first.seed:
                split = plan.make_split(seed)
                check_split(split, seed, first.split)
                model = plan.make_model(seed, split)
                check_model(model, seed, split)
                _check_alike(model, seed, first.model)
            splits.append(split)
            models.append(model)
        device = plan.device
        self._inputs = torch.stack([split.train_inputs for split in splits]).to(device)
        self._targets = torch.stack([split.train_targets for split in splits]).to(device)
        self._test_inputs = torch.stack([split.test_inputs for split in splits]).to(device)
        self._test_targets = torch.stack([split.test_targets for split in splits]).to(device)
        self._model = first.model
        self._limits: dict[str, list[float]] = {}
        noises = _Noises(plan.noise, splits)
        self._optimizers = {
            name: self._optimizer(name, make, models, noises)
            for name, make in plan.optimizers.items()
        }
        count = (len(plan.optimizers), len(seeds))
        self._failed = torch.full(count, -1, device=device)
        self._figures: list[Tensor] = []
        self._shares: list[Tensor] = []

    def _optimizer(
        self, name: str, make: MakeOptimizer, models: Sequence[nn.Module], noises: "_Noises"
    ) -> StackedOptimizer:
        starts = [dict(model.named_parameters()) for model in models]
        parameters: dict[str, Tensor] = {
            key: nn.Parameter(
                torch.stack([start[key].detach() for start in starts]).to(self._plan.device),
                requires_grad=first.requires_grad,
            )
            for key, first in starts[0].items()
        }
        network = StackedNetwork(self._model, parameters, self._plan.loss)
        optimizer = made(name, make, [p for p in parameters.values() if p.requires_grad])
        correction = None
        if isinstance(optimizer, DecoupledDescent):
            correction = self._correction(name, optimizer, noises, network.weight)
        return StackedOptimizer(network, optimizer, correction)

    def _correction(
        self, name: str, optimizer: DecoupledDescent, noises: "_Noises", weight: Tensor
    ) -> Correction:
        models = noises.models(None if optimizer._damping == 1.0 else 1)
        check_noise(name, optimizer, models, list(self._inputs), weight.shape[1])
        layer = next(self._model.children())
        assert isinstance(layer, nn.Linear)
        if optimizer._head == AUTO and any(
            worth_correcting(self._model, layer, noise, optimizer._curvature) is not None
            for noise in models
        ):
            raise ValueError(
                f"run_trials: optimizers[{name!r}]: these samples are few for the head, which "
                'head="auto" would correct, in one trial at a time. Use head=False to train with '
                "the head as it is, and expect training errors that are too low by what it "
                "over-fits; or loop over the seeds"
            )
        noise = StackedNoise.of(models, weight)
        self._limits[name] = [
            largest_shadow_ratio(model, self._inputs.shape[1]) for model in models
        ]
        seeds = None
        if self._plan.probe_seed is not None:
            seeds = [self._plan.probe_seed(seed) for seed in self._seeds]
        leaky = has_leaky_kinks(self._model)
        samples, width = self._inputs.shape[1], weight.shape[1]
        return Correction(optimizer, noise, samples, width, seeds, leaky=leaky)

    @torch.no_grad()
    def run(self, advance: Callable[[int], None]) -> Trials:
        """Train, and return what it has shown.

        Args:
            advance: is told how many trials have made a step.
        """
        recorded, seconds = self._plan.recorded, 0.0
        self._model.train()
        products = self._products(self._inputs)
        for start, stop in itertools.pairwise(recorded):
            self._record(products, start)
            started = time.perf_counter()
            for step in range(start, stop):
                self._step(products, step)
                products = self._products(self._inputs)
                advance(len(self._seeds))
            if self._plan.device.type == "cuda":
                torch.cuda.synchronize(self._plan.device)
            seconds += time.perf_counter() - started
        self._record(products, recorded[-1])
        return self._result(seconds)

    def _products(self, inputs: Tensor) -> list[Tensor]:
        """XW of every optimizer, each of shape (S, n, k), from one pass over the inputs."""
        weights = [optimizer.network.weight for optimizer in self._optimizers.values()]
        # Rows of W before columns of X: the faster of the orders for few units.
        product = torch.cat(weights, 1) @ inputs.mT
        return [part.mT for part in product.chunk(len(weights), 1)]

    def _step(self, products: list[Tensor], step: int) -> None:
        optimizers = list(self._optimizers.values())
        losses = [
            optimizer.backward(product, self._targets, step)
            for optimizer, product in zip(optimizers, products, strict=True)
        ]
        self._look(torch.stack(losses), step)
        gradients = torch.cat([optimizer.gradient.mT for optimizer in optimizers], 1)
        moves = (gradients @ self._inputs).chunk(len(optimizers), 1)
        for optimizer, move in zip(optimizers, moves, strict=True):
            optimizer.step(move)

    def _look(self, losses: Tensor, step: int) -> None:
        """See which trials have failed, from losses of shape (optimizers, S)."""
        fresh = (self._failed < 0) & ~losses.isfinite()
        self._failed.masked_fill_(fresh, step)

    def _record(self, products: list[Tensor], step: int) -> None:
        tests = self._products(self._test_inputs)
        figures = torch.stack(
            [
                self._measured(optimizer, product, test)
                for optimizer, product, test in zip(
                    self._optimizers.values(), products, tests, strict=True
                )
            ]
        )
        self._look(figures[..., 0], step)
        failed = (self._failed >= 0).unsqueeze(-1)
        self._figures.append(figures.masked_fill(failed, torch.nan))
        decoupled = [
            _shares(optimizer, product)
            for optimizer, product in zip(self._optimizers.values(), products, strict=True)
            if optimizer.corrects
        ]
        if decoupled:
            self._shares.append(torch.stack(decoupled))

    def _measured(self, optimizer: StackedOptimizer, product: Tensor, test: Tensor) -> Tensor:
        """The figures of every trial, shape (S, 6), in the order of METRICS."""
        train = _figures(optimizer, product, self._targets, corrected=True)
        self._model.eval()
        tested = _figures(optimizer, test, self._test_targets, corrected=False)
        plain = _figures(optimizer, product, self._targets, corrected=False)
        self._model.train()
        pairs = zip(train, tested, strict=True)
        return torch.stack([*(value for pair in pairs for value in pair), *plain], -1)

    def _result(self, seconds: float) -> Trials:
        figures = torch.stack(self._figures, -1).cpu()
        names = list(self._optimizers)
        failed = self._failed.tolist()
        return Trials(
            seeds=self._seeds,
            steps=torch.tensor(self._plan.recorded),
            metrics={
                name: dict(zip(METRICS, of_one.unbind(1), strict=True))
                for name, of_one in zip(names, figures, strict=True)
            },
            weights={
                name: {k: p.detach().cpu() for k, p in optimizer.network.parameters.items()}
                for name, optimizer in self._optimizers.items()
            },
            failures=tuple(
                Failure(name, seed, step)
                for name, steps in zip(names, failed, strict=True)
                for seed, step in zip(self._seeds, steps, strict=True)
                if step >= 0
            ),
            seconds=seconds,
            doubts=self._doubts(),
        )

    def _doubts(self) -> tuple[Doubt, ...]:
        if not self._shares:
            return ()
        found: list[Doubt] = []
        # Of every optimizer, trial and record.
        shares = torch.stack(self._shares, -1).tolist()
        for (name, limits), of_one in zip(self._limits.items(), shares, strict=True):
            for seed, limit, values in zip(self._seeds, limits, of_one, strict=True):
                records = zip(self._plan.recorded, values, strict=True)
                # False where one is not a number.
                doubts = (Doubt(name, seed, *own) for own in records if own[1] > limit)
                found += itertools.islice(doubts, 1)
        return tuple(found)


def _figures(
    optimizer: StackedOptimizer, product: Tensor, targets: Tensor, *, corrected: bool
) -> tuple[Tensor, Tensor]:
    """Loss and error of every trial, each of shape (S,), float64."""
    network = optimizer.network
    scores = network.scores(optimizer.preactivation(product, corrected=corrected))
    errors = scores.argmax(-1) != targets
    return network.losses(scores, targets).double(), errors.double().mean(1)


def _shares(optimizer: StackedOptimizer, product: Tensor) -> Tensor:
    """|Q|/|R| of every trial, shape (S,), from XW."""
    corrected = optimizer.preactivation(product, corrected=True)
    return shares(corrected - optimizer.preactivation(product, corrected=False), corrected)


class _Noises:
    """The noise models of some trials, each fitted once for all optimizers."""

    def __init__(self, make: MakeNoise | None, splits: Sequence[TrialSplit]) -> None:
        self._splits = splits
        self._given = [None if make is None else make(split) for split in splits]
        self._fitted: dict[int | None, list[NoiseModel]] = {}

    def models(self, bins: int | None) -> list[NoiseModel]:
        """Those given, and in place of the others such as an optimizer fits by itself.

        Args:
            bins: at most so many; by default as the spectrum asks for.
        """
        if bins not in self._fitted:
            self._fitted[bins] = [
                fitted_by_default(split.train_inputs, bins) if given is None else given
                for given, split in zip(self._given, self._splits, strict=True)
            ]
        return self._fitted[bins]


def _check_alike(model: nn.Module, seed: int, first: nn.Module) -> None:
    """Check that a network is of the architecture of the first one.

    Raises:
        ValueError: if it is not.
    """
    expected = {name: (p.shape, p.requires_grad) for name, p in first.named_parameters()}
    shapes = {name: (p.shape, p.requires_grad) for name, p in model.named_parameters()}
    if shapes != expected or str(model) != str(first):
        raise ValueError(
            "run_trials: the networks of all trials must be of one architecture, the same "
            f"parameters trained, but that of seed {seed} is {model}, and that of the first {first}"
        )
