"""What a batched computation of many trials is given, checked."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dd.correction.head_choice import AUTO
from dd.noise.model import NoiseModel
from dd.optimizer import DecoupledDescent
from dd.rules.line_search.settings import chooses_rate
from dd.samples.fitted import fitted_samples, refuse_others
from dd.support.fingerprint import fingerprint

__all__ = [
    "MakeOptimizer",
    "TrialSplit",
    "check_model",
    "check_noise",
    "check_scores",
    "check_split",
    "checked_optimizers",
    "made",
]

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]

ESTIMATORS = ("auto", "stein", "probe")


class TrialSplit(Protocol):
    """The data of one trial, such as a :class:`dd.data.Split`.

    Attributes:
        train_inputs: shape (n, d).
        train_targets: class of each training sample, shape (n,), integers.
        test_inputs: shape (n_test, d).
        test_targets: class of each test sample, shape (n_test,), integers.
    """

    @property
    def train_inputs(self) -> Tensor: ...  # noqa: D102

    @property
    def train_targets(self) -> Tensor: ...  # noqa: D102

    @property
    def test_inputs(self) -> Tensor: ...  # noqa: D102

    @property
    def test_targets(self) -> Tensor: ...  # noqa: D102


def made(name: str, make: MakeOptimizer, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Make an optimizer of some parameters.

    Raises:
        ValueError: if it cannot be one of many trials at once.
        TypeError: if it is no optimizer that can.
    """
    try:
        optimizer = make(parameters)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"run_trials: optimizers[{name!r}] could not be made from a list of parameters: "
            f"{error}. Give what makes one, such as functools.partial(dd.DecoupledDescent, "
            "lr=0.5), and the noise models through noise= of run_trials"
        ) from error
    # The class itself: what a subclass does to W may not be what moves Q.
    if type(optimizer) not in {torch.optim.SGD, DecoupledDescent}:
        raise TypeError(
            f"run_trials: optimizers[{name!r}] must make a torch.optim.SGD or a "
            f"dd.DecoupledDescent, got a {type(optimizer).__name__}; train others one trial at a "
            "time"
        )
    if len(optimizer.param_groups) != 1:
        raise ValueError(
            f"run_trials: optimizers[{name!r}] must keep its parameters in one group, got "
            f"{len(optimizer.param_groups)}; leave per-parameter settings to one trial at a time"
        )
    group = optimizer.param_groups[0]
    if [id(p) for p in group["params"]] != [id(p) for p in parameters]:
        raise ValueError(
            f"run_trials: optimizers[{name!r}] must make an optimizer of all the parameters that "
            "it is given, and of no others, such as functools.partial(dd.DecoupledDescent, lr=0.5)"
        )
    if group["differentiable"]:
        raise ValueError(
            f"run_trials: optimizers[{name!r}]: differentiable=True keeps every step in a graph; "
            "train it one trial at a time"
        )
    # The fused rule takes numbers as they lie in memory; these are parts of larger tensors.
    group["fused"] = False
    if isinstance(optimizer, DecoupledDescent):
        _check_settings(name, optimizer)
        # Its steps are plain on purpose: the correction of all trials stands beside it.
        optimizer.detach()
    return optimizer


def _check_settings(name: str, optimizer: DecoupledDescent) -> None:
    obstacle = None
    if chooses_rate(optimizer):
        obstacle = 'lr="auto" searches every step of a trial by itself; give a number'
    elif optimizer._head not in {False, AUTO}:
        obstacle = "head= corrects the head in one trial at a time; use head=False"
    elif optimizer._curvature not in ESTIMATORS:
        obstacle = (
            f"curvature must be one of {ESTIMATORS}, got {optimizer._curvature!r}; "
            '"probe" differentiates the same products'
        )
    if obstacle is not None:
        raise ValueError(f"run_trials: optimizers[{name!r}]: {obstacle}")


def checked_optimizers(optimizers: Mapping[str, MakeOptimizer]) -> dict[str, MakeOptimizer]:
    """Return what makes the optimizers, each tried once.

    Raises:
        ValueError: if there are none, or one cannot be one of many trials at once.
        TypeError: if one is not what makes an optimizer.
    """
    if not isinstance(optimizers, Mapping) or not optimizers:
        raise ValueError(
            "run_trials: optimizers must map at least one name to what makes an optimizer, got "
            f'{optimizers!r}; for example {{"dd": functools.partial(dd.DecoupledDescent, lr=0.5)}}'
        )
    for name, make in optimizers.items():
        if not callable(make):
            raise TypeError(
                f"run_trials: optimizers[{name!r}] must be callable with parameters, got "
                f"{make!r}; for example functools.partial(torch.optim.SGD, lr=0.5)"
            )
        made(name, make, [nn.Parameter(torch.zeros(1))])
    return dict(optimizers)


def check_split(split: TrialSplit, seed: int, like: TrialSplit) -> None:
    """Check the data of a trial, and that they fit those of the first one.

    Raises:
        ValueError: if a shape or a kind is wrong, or an input not finite.
    """
    for name in ("train", "test"):
        inputs, targets = _part(split, name)
        where = f"run_trials: {name}_inputs of seed {seed}"
        if inputs.dim() != 2 or inputs.numel() == 0 or not inputs.is_floating_point():
            raise ValueError(
                f"{where} must be a floating-point matrix (samples, dimension), got shape "
                f"{tuple(inputs.shape)} of {inputs.dtype}; flatten each sample into a row"
            )
        if not bool(inputs.isfinite().all()):
            raise ValueError(f"{where} contain NaN or infinity; drop or repair those samples")
        if targets.shape != inputs.shape[:1] or targets.dtype != torch.int64:
            raise ValueError(
                f"run_trials: {name}_targets of seed {seed} must be {len(inputs)} classes, int64, "
                f"got shape {tuple(targets.shape)} of {targets.dtype}"
            )
        expected, _ = _part(like, name)
        if inputs.shape != expected.shape or inputs.dtype != expected.dtype:
            raise ValueError(
                f"{where} have shape {tuple(inputs.shape)} of {inputs.dtype}, those of the first "
                f"trial {tuple(expected.shape)} of {expected.dtype}; trials that are computed at "
                "once need data of one shape and kind"
            )


def _part(split: TrialSplit, name: str) -> tuple[Tensor, Tensor]:
    return getattr(split, f"{name}_inputs"), getattr(split, f"{name}_targets")


def check_model(model: Any, seed: int, split: TrialSplit) -> None:
    """Check that a network is one whose trials can be computed at once.

    Raises:
        TypeError: if it is not an ``nn.Sequential`` that begins with an ``nn.Linear``.
        ValueError: if it does not fit the data, has buffers, dropout or shared parameters.
    """
    whose = f"run_trials: the network of seed {seed}"
    modules = list(model) if isinstance(model, nn.Sequential) else []
    if not modules or type(modules[0]) is not nn.Linear:
        got = type(modules[0] if modules else model).__name__
        raise TypeError(
            f"{whose} must be an nn.Sequential whose first module, the decoupled layer, is an "
            f"nn.Linear, got {got}; train other networks one trial at a time"
        )
    inputs, layer = split.train_inputs, modules[0]
    if layer.in_features != inputs.shape[1]:
        raise ValueError(
            f"{whose} takes {layer.in_features} inputs, but the data have {inputs.shape[1]}"
        )
    if not layer.weight.requires_grad:
        raise ValueError(f"{whose} has a frozen first layer; there is nothing to decouple")
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dtype != inputs.dtype:
            raise ValueError(
                f"{whose} holds {name} in {parameter.dtype}, but the inputs are {inputs.dtype}; "
                "convert one of them"
            )
    shared = len(list(model.named_parameters(remove_duplicate=False)))
    buffers = [name for name, _ in model.named_buffers()]
    dropout = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    obstacle = None
    if buffers:
        obstacle = f"buffers ({', '.join(buffers)}), which a batch of trials would share"
    elif dropout:
        obstacle = f"{dropout[0]}, which is drawn anew at every forward"
    elif shared != len(list(model.parameters())):
        obstacle = "parameters that several modules share"
    if obstacle is not None:
        raise ValueError(f"{whose} has {obstacle}; train it one trial at a time")


def check_scores(
    model: nn.Sequential, loss: Callable[[Tensor, Tensor], Tensor], seed: int, split: TrialSplit
) -> None:
    """Check what a network and the loss return for two samples.

    Raises:
        ValueError: if it is no score for each of several classes, or no loss of one number.
    """
    with torch.no_grad():
        scores = model(split.train_inputs[:2])
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise ValueError(
            f"run_trials: the network of seed {seed} must return scores of two classes or more, "
            f"shape (samples, classes), got {tuple(scores.shape)} for two samples"
        )
    value = loss(scores, split.train_targets[:2])
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else str(type(value))
        raise ValueError(
            f"run_trials: loss must return the mean over samples, one number in a tensor, got {got}"
        )


def check_noise(
    name: str,
    optimizer: DecoupledDescent,
    models: Sequence[NoiseModel],
    inputs: Sequence[Tensor],
    width: int,
) -> None:
    """Check the noise models of some trials against a decoupled optimizer and the data.

    Args:
        name: of the optimizer.
        optimizer: that takes them.
        models: one a trial.
        inputs: of each trial, shape (n, d).
        width: k.

    Raises:
        ValueError: if they do not go with either.
    """
    samples, dimension = inputs[0].shape
    for model, rows in zip(models, inputs, strict=True):
        if model.dimension != dimension or model.num_samples not in {None, samples}:
            raise ValueError(
                f"run_trials: a noise model describes {model.num_samples or samples} samples of "
                f"{model.dimension} inputs, but a trial has {samples} of {dimension}; fit it on "
                "the training inputs of its own trial"
            )
        found = fingerprint(rows)
        if fitted_samples(found, model, rows.dtype) is None:
            refuse_others(found, model)
        if model.units is not None:
            raise ValueError(
                "run_trials: a noise model has groups of rows that are left out together, which "
                "run_trials does not follow; train each trial with dd.DecoupledDescent"
            )
        if model.mean_directions is not None:
            raise ValueError(
                "run_trials: a noise model leaves out the directions of the component means, "
                "which only head=True follows; use NoiseModel.fit without separate_means"
            )
        if len(model.eigenvalues) > 1 and optimizer._damping != 1.0:
            raise ValueError(
                f"run_trials: optimizers[{name!r}]: damping={optimizer._damping} is defined for "
                f"isotropic noise, got a noise model of {len(model.eigenvalues)} bins; use "
                "damping=1 or NoiseModel.isotropic"
            )
    known = [model.components is not None for model in models]
    if any(known) and not all(known):
        raise ValueError(
            "run_trials: the noise models of some trials know the components and those of others "
            "do not; give components in all trials or in none"
        )
    if optimizer._curvature == "stein" and not any(known):
        raise ValueError(
            f'run_trials: optimizers[{name!r}]: curvature="stein" needs the mixture component of '
            "every sample; pass noise=lambda split: dd.NoiseModel.isotropic(split.train_inputs, "
            'components), or use curvature="probe"'
        )
    if samples < width and optimizer._curvature != "stein":
        raise ValueError(
            f"run_trials: optimizers[{name!r}]: {samples} samples do not resolve the curvature of "
            f"{width} units; use fewer units or more samples"
        )
