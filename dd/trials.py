"""Many trials of training on all samples as one computation: many seeds, many optimizers."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd.checks import check_count
from dd.noise import LARGEST_GRAM, NoiseModel
from dd.optimizer import DecoupledDescent
from dd.progress import progress_bar
from dd.stacked import Correction, Loss, StackedNetwork, StackedNoise, StackedOptimizer
from dd.trial_inputs import (
    MakeOptimizer,
    TrialSplit,
    check_model,
    check_noise,
    check_split,
    checked_optimizers,
    made,
)

__all__ = ["METRICS", "Failure", "Trials", "run_trials", "trial_chunks"]

METRICS = (
    "train_loss",
    "test_loss",
    "train_error",
    "test_error",
    "uncorrected_train_loss",
    "uncorrected_train_error",
)

# Bytes of training inputs in a chunk on a CPU: enough trials that what a call costs is small.
_AT_ONCE = 2**26
# Share of a device's free memory that a chunk may take.
_SHARE = 0.5

MakeSplit = Callable[[int], TrialSplit]
MakeModel = Callable[[int, TrialSplit], nn.Sequential]
MakeNoise = Callable[[TrialSplit], NoiseModel | None]


class Failure(NamedTuple):
    """A trial whose training loss turned non-finite.

    Attributes:
        name: of the optimizer.
        seed: of the trial.
        step: number of updates after which it was first seen.
    """

    name: str
    seed: int
    step: int


@dataclass(frozen=True, eq=False)
class Trials:
    """What trials have shown.

    Attributes:
        seeds: of the trials.
        steps: number of updates before each record, shape (records,), int64.
        metrics: for every optimizer its losses and errors by the names in :data:`METRICS`, each of
            shape (trials, records), float64, on the CPU; not a number from where a trial has
            failed. The training figures are the corrected ones under decoupled descent.
        weights: for every optimizer the last parameters by their name in the model, each of shape
            (trials, ...), on the CPU.
        failures: the trials that turned non-finite.
        seconds: spent on updates, of all trials and optimizers together.
    """

    seeds: tuple[int, ...]
    steps: Tensor
    metrics: dict[str, dict[str, Tensor]]
    weights: dict[str, dict[str, Tensor]]
    failures: tuple[Failure, ...]
    seconds: float

    @classmethod
    def joined(cls, parts: Sequence["Trials"]) -> "Trials":
        """Put the trials of several chunks together, in their order.

        Raises:
            ValueError: if there are none, or they were recorded at other steps or of other
                optimizers.
        """
        if not parts:
            raise ValueError("Trials: nothing to join, got no parts")
        first = parts[0]
        for part in parts:
            if (
                not torch.equal(part.steps, first.steps)
                or part.metrics.keys() != first.metrics.keys()
            ):
                raise ValueError(
                    "Trials: only trials of the same optimizers and recorded steps can be joined, "
                    f"got {list(first.metrics)} at {len(first.steps)} steps and "
                    f"{list(part.metrics)} at {len(part.steps)}"
                )
        return cls(
            seeds=tuple(seed for part in parts for seed in part.seeds),
            steps=first.steps,
            metrics=_joined([part.metrics for part in parts]),
            weights=_joined([part.weights for part in parts]),
            failures=tuple(failure for part in parts for failure in part.failures),
            seconds=sum(part.seconds for part in parts),
        )


def _joined(parts: Sequence[dict[str, dict[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: torch.cat([part[name][key] for part in parts]) for key in tensors}
        for name, tensors in parts[0].items()
    }


def run_trials(
    make_split: MakeSplit,
    make_model: MakeModel,
    optimizers: Mapping[str, MakeOptimizer],
    *,
    seeds: Iterable[int],
    steps: int,
    record_every: int = 1,
    loss: Loss = F.cross_entropy,
    noise: MakeNoise | None = None,
    probe_seed: Callable[[int], int] | None = None,
    device: torch.device | str | None = None,
    memory: int | None = None,
    progress: bool = False,
) -> Trials:
    """Train networks on many data sets by several optimizers, many at a time.

    Every trial comes out as it would by itself, with an optimizer of its own and all samples in
    every step, up to rounding. All optimizers of a trial start from the same weights and share
    every pass over its inputs. The warnings of :class:`DecoupledDescent` are not given.

        trials = dd.run_trials(
            lambda seed: xor(dimension=500, num_train=2000, seed=seed),
            lambda seed, split: two_layer(500, 8, 2, generator=generator(seed, "start")),
            {"gd": partial(torch.optim.SGD, lr=0.5), "dd": partial(dd.DecoupledDescent, lr=0.5)},
            seeds=range(100),
            steps=200,
        )
        trials.metrics["dd"]["test_error"].mean(0)

    Args:
        make_split: makes the data of a seed, such as a :class:`dd.data.Split`; of one shape in all
            trials.
        make_model: makes the network of a seed and its data on the CPU: an ``nn.Sequential`` that
            begins with the decoupled ``nn.Linear``; of one architecture in all trials.
        optimizers: for every name what makes an optimizer of a list of parameters, a
            ``torch.optim.SGD`` or a ``DecoupledDescent``.
        seeds: of the trials.
        steps: number of updates.
        record_every: updates between two records; the last state is recorded in any case.
        loss: of scores (n, C) and targets (n,), the mean over samples.
        noise: makes the noise model of a trial from its data, on the CPU; by default, and where it
            returns None, the one that the optimizer fits by itself on the training inputs.
        probe_seed: seed of the curvature probes from that of the trial, in place of the
            optimizer's own, which makes the probes of all trials the same.
        device: to compute on; by default the CPU.
        memory: bytes that the trials computed at once may take; by default what suits the device.
        progress: show a bar, which needs the package rich.

    Raises:
        ValueError: if an argument is out of range, or trials, optimizers and noise models do not go
            together.
        TypeError: if a network or an optimizer is not of the kind that can be batched.
        ModuleNotFoundError: if a bar is asked for and rich is not installed.
    """
    return Trials.joined(
        list(
            trial_chunks(
                make_split,
                make_model,
                optimizers,
                seeds=seeds,
                steps=steps,
                record_every=record_every,
                loss=loss,
                noise=noise,
                probe_seed=probe_seed,
                device=device,
                memory=memory,
                progress=progress,
            )
        )
    )


def trial_chunks(
    make_split: MakeSplit,
    make_model: MakeModel,
    optimizers: Mapping[str, MakeOptimizer],
    *,
    seeds: Iterable[int],
    steps: int,
    record_every: int = 1,
    loss: Loss = F.cross_entropy,
    noise: MakeNoise | None = None,
    probe_seed: Callable[[int], int] | None = None,
    device: torch.device | str | None = None,
    memory: int | None = None,
    progress: bool = False,
) -> Iterator[Trials]:
    """Yield the trials of :func:`run_trials` as they are done, some at a time; arguments as there.

    Raises:
        ValueError: as :func:`run_trials`.
        TypeError: as :func:`run_trials`.
    """
    chosen = tuple(seeds)
    if not chosen:
        raise ValueError("run_trials: seeds is empty; give at least one, such as range(100)")
    check_count("run_trials: steps", steps)
    check_count("run_trials: record_every", record_every)
    if memory is not None:
        check_count("run_trials: memory", memory)
    plan = _Plan(
        make_split,
        make_model,
        checked_optimizers(optimizers),
        [*range(0, steps, record_every), steps],
        loss,
        noise,
        probe_seed,
        torch.device("cpu" if device is None else device),
    )
    return _chunks(plan, chosen, memory, progress=progress)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What all chunks have in common; the arguments of :func:`run_trials`, checked."""

    make_split: MakeSplit
    make_model: MakeModel
    optimizers: dict[str, MakeOptimizer]
    recorded: list[int]
    loss: Loss
    noise: MakeNoise | None
    probe_seed: Callable[[int], int] | None
    device: torch.device


def _chunks(
    plan: _Plan, seeds: tuple[int, ...], memory: int | None, *, progress: bool
) -> Iterator[Trials]:
    steps = plan.recorded[-1]
    with progress_bar(f"{len(seeds)} trials", len(seeds) * steps, show=progress) as advance:
        first = _first(plan, seeds[0])
        size = _chunk_size(plan, first, memory)
        for start in range(0, len(seeds), size):
            yield _Chunk(plan, seeds[start : start + size], first).run(advance)


class _First(NamedTuple):
    """Seed, data and network of the first trial."""

    seed: int
    split: TrialSplit
    model: nn.Sequential


def _first(plan: _Plan, seed: int) -> _First:
    split = plan.make_split(seed)
    check_split(split, seed, split)
    model = plan.make_model(seed, split)
    check_model(model, seed, split)
    return _First(seed, split, model)


def _chunk_size(plan: _Plan, first: _First, memory: int | None) -> int:
    """How many trials are computed at once."""
    train, test = first.split.train_inputs, first.split.test_inputs
    if memory is None and plan.device.type != "cuda":
        return max(1, _AT_ONCE // (train.numel() * train.element_size()))
    if memory is None:
        free, _ = torch.cuda.mem_get_info(plan.device)
        memory = int(_SHARE * free)
    width, _ = next(first.model.parameters()).shape
    # Rows of the width of the network that are held at once, shadows of twelve bins among them.
    rows = 80 * len(train) + 6 * len(test)
    numbers = train.numel() + test.numel() + rows * len(plan.optimizers) * width
    return max(1, memory // (numbers * train.element_size()))


class _Chunk:
    """Some trials that are computed at once.

    Args:
        plan: what all chunks have in common.
        seeds: of the S trials.
        first: the trial that all others must be like.
    """

    def __init__(self, plan: _Plan, seeds: tuple[int, ...], first: _First) -> None:
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
        noises = _Noises(plan.noise, splits)
        self._optimizers = {
            name: self._optimizer(name, make, models, noises)
            for name, make in plan.optimizers.items()
        }
        count = (len(plan.optimizers), len(seeds))
        self._failed = torch.full(count, -1, device=device)
        self._figures: list[Tensor] = []

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
        check_noise(name, optimizer, models, self._inputs[0], weight.shape[1])
        noise = StackedNoise.of(models, weight)
        seeds = None
        if self._plan.probe_seed is not None:
            seeds = [self._plan.probe_seed(seed) for seed in self._seeds]
        return Correction(optimizer, noise, self._inputs.shape[1], weight.shape[1], seeds)

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
        )


def _figures(
    optimizer: StackedOptimizer, product: Tensor, targets: Tensor, *, corrected: bool
) -> tuple[Tensor, Tensor]:
    """Loss and error of every trial, each of shape (S,), float64."""
    network = optimizer.network
    scores = network.scores(optimizer.preactivation(product, corrected=corrected))
    errors = scores.argmax(-1) != targets
    return network.losses(scores, targets).double(), errors.double().mean(1)


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
                _fitted(split.train_inputs, bins) if given is None else given
                for given, split in zip(self._given, self._splits, strict=True)
            ]
        return self._fitted[bins]


def _fitted(inputs: Tensor, bins: int | None) -> NoiseModel:
    if min(inputs.shape) > LARGEST_GRAM:
        return NoiseModel.isotropic(inputs)
    return NoiseModel.fit(inputs, bins=bins)


def _check_alike(model: nn.Module, seed: int, first: nn.Module) -> None:
    """Check that a network is of the architecture of the first one.

    Raises:
        ValueError: if it is not.
    """
    expected = {name: p.shape for name, p in first.named_parameters()}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if shapes != expected or str(model) != str(first):
        raise ValueError(
            f"run_trials: the networks of all trials must be of one architecture, but that of "
            f"seed {seed} is {model}, and that of the first {first}"
        )
