"""Many trials of training on all samples as one computation: many seeds, many optimizers."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F

from dd.support.checks import check_count
from dd.support.progress import progress_bar
from dd.support.user_warning import warn_user
from dd.trials.chunk import Chunk, FirstTrial, MakeModel, MakeNoise, MakeSplit, Plan, first_trial
from dd.trials.inputs import MakeOptimizer, checked_optimizers
from dd.trials.results import Trials
from dd.trials.stacked import Loss
from dd.watch.shadow_size import ShadowWarning

__all__ = ["run_trials", "trial_chunks"]

# Bytes of training inputs in a chunk on a CPU: enough trials that what a call costs is small.
_AT_ONCE = 2**26
# Share of a device's free memory that a chunk may take.
_SHARE = 0.5


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

    :func:`dd.trials.trial_chunks` yields trials as they are done, where none is to be lost.

    Every trial comes out as it would by itself, with an optimizer of its own and all samples in
    every step, up to rounding. All optimizers of a trial start from the same weights and share
    every pass over its inputs. Of the warnings of :class:`DecoupledDescent` one is given: of
    shadows that the theory cannot explain, once an optimizer; :attr:`Trials.doubts` has all.

    Args:
        make_split: makes the data of a seed, such as a :class:`dd.data.Split`; of one shape in all
            trials.
        make_model: makes the network of a seed and its data on the CPU: an ``nn.Sequential`` that
            begins with the decoupled ``nn.Linear``; of one architecture in all trials. All but
            the parameters is that of the first trial's.
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

    Warns:
        ShadowWarning: of the first trial of an optimizer whose training error is not to be
            believed.

    Example:
        >>> from functools import partial
        >>> from dd.data import generator, xor
        >>> from dd.experiments.models import two_layer
        >>> trials = dd.run_trials(
        ...     lambda seed: xor(dimension=20, num_train=200, num_test=200, seed=seed),
        ...     lambda seed, split: two_layer(20, 4, 2, generator=generator(seed, "start")),
        ...     {"gd": partial(torch.optim.SGD, lr=1), "dd": partial(dd.DecoupledDescent, lr=1)},
        ...     seeds=range(3),
        ...     steps=5,
        ... )
        >>> trials.metrics["dd"]["test_error"].mean(0).shape  # of every step
        torch.Size([6])
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

    Warns:
        ShadowWarning: as :func:`run_trials`.

    Example:
        >>> from functools import partial
        >>> from dd.data import xor
        >>> from dd.experiments.models import two_layer
        >>> from dd.trials import trial_chunks
        >>> chunks = trial_chunks(
        ...     lambda seed: xor(dimension=20, num_train=200, num_test=200, seed=seed),
        ...     lambda seed, split: two_layer(20, 4, 2),
        ...     {"gd": partial(torch.optim.SGD, lr=0.5)},
        ...     seeds=range(3),
        ...     steps=3,
        ...     memory=1,  # no room for two trials at once
        ... )
        >>> [found.seeds for found in chunks]
        [(0,), (1,), (2,)]
    """
    if not isinstance(seeds, Iterable):
        raise TypeError(
            f"run_trials: seeds must be some integers, got {seeds!r}; try range({seeds})"
        )
    if noise is not None and not callable(noise):
        raise TypeError(
            "run_trials: noise must make a noise model from a trial's data, got "
            f"{type(noise)}; try noise=lambda split: dd.NoiseModel.isotropic(split.train_inputs)"
        )
    chosen = tuple(seeds)
    if not chosen:
        raise ValueError("run_trials: seeds is empty; give at least one, such as range(100)")
    check_count("run_trials: steps", steps)
    check_count("run_trials: record_every", record_every)
    if memory is not None:
        check_count("run_trials: memory", memory)
    plan = Plan(
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


def _chunks(
    plan: Plan, seeds: tuple[int, ...], memory: int | None, *, progress: bool
) -> Iterator[Trials]:
    steps, warned = plan.recorded[-1], set[str]()
    with progress_bar(f"{len(seeds)} trials", len(seeds) * steps, show=progress) as advance:
        first = first_trial(plan, seeds[0])
        size = _chunk_size(plan, first, memory)
        for start in range(0, len(seeds), size):
            found = Chunk(plan, seeds[start : start + size], first).run(advance)
            _warn_of_doubts(found, warned)
            yield found


def _warn_of_doubts(found: Trials, warned: set[str]) -> None:
    for doubt in found.doubts:
        if doubt.name not in warned:
            warned.add(doubt.name)
            warn_user(
                f"run_trials: {doubt.name}, seed {doubt.seed}: after {doubt.step} updates the "
                f"shadows are {doubt.share:.2g} of the pre-activations in size, more than the "
                "theory explains, and the training error of the trial is not to be believed; "
                ".doubts of the result has all such trials",
                ShadowWarning,
            )


def _chunk_size(plan: Plan, first: FirstTrial, memory: int | None) -> int:
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
