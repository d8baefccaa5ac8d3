"""Whether training samples are those that their noise model was fitted on."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dd.noise.model import NoiseModel
from dd.support.fingerprint import Fingerprints

__all__ = [
    "fitted_samples",
    "refuse_others",
    "require_announced",
    "require_same_order",
    "require_spread",
]

# Rows in their order, computed anew or scaled by another estimate of the same deviation: noise off
# by so little changes the correction by less than its own sampling error.
_SAME_ROW = 0.03
# Fewer rows do not show how much they vary.
_FEWEST = 32
# A ratio of variances beyond this matters; beyond chance as well it is no coincidence.
_OFF, _DEVIATIONS = math.log(1.5), 5.0
# Some samples may be alike, of one class or one file, and vary less than all do.
_FAR_OFF = math.log(16.0)

_REMEDY = (
    "Fit it on what that layer receives, after all scaling and in its precision: "
    "noise=dd.NoiseModel.fit(inputs, components). If it is meant for {these} all the same: "
    "dataclasses.replace(noise, fingerprints=None)."
)


def fitted_samples(found: Tensor, noise: NoiseModel | None, dtype: torch.dtype) -> Tensor | None:
    """What the noise model knows of the training samples, where it knows all of a batch.

    Args:
        found: fingerprints of the batch, shape (m, 3).
        noise: the model.
        dtype: of the inputs.

    Returns:
        Fingerprints of all samples, shape (n, 3), or None. A batch of all samples may differ from
        them by a common shift, which is no part of the noise, and by what precision leaves.
    """
    if noise is None or noise.fingerprints is None:
        return None
    values = noise.fingerprints.to(found.device)
    fitted = Fingerprints(values)
    if bool(fitted.find(found)[1].all()):
        return values
    if len(found) != len(values):
        return None
    off = (found.double() - values.double()).std(0, correction=0)
    if bool((off <= _SAME_ROW * values.double().std(0, correction=0)).all()):
        return found
    index, same = Fingerprints(values, rounding=_rounding(dtype)).find(found)
    if not bool(same.all()) or len(index.unique()) < len(index):
        return None
    return torch.empty_like(found).index_copy_(0, index, found)


def refuse_others(found: Tensor, noise: NoiseModel | None, blame: Callable[[], str] = str) -> None:
    """Refuse training samples that are not those of their noise model.

    Args:
        found: fingerprints, shape (m, 3), that :func:`fitted_samples` does not know.
        noise: the model.
        blame: says what may have changed them, in a sentence or not at all.

    Raises:
        ValueError: if the model was fitted on inputs.
    """
    if noise is None or noise.fingerprints is None:
        return
    fitted = noise.fingerprints.to(found.device)
    unknown = int((~Fingerprints(fitted).find(found)[1]).sum())
    raise ValueError(
        f"DecoupledDescent: the noise model was fitted on {len(fitted)} inputs, and {unknown} of "
        f"the {len(found)} that the decoupled layer receives in training are not among them"
        f"{_times(found, fitted)}: they are other samples, or the same ones in other units."
        f"{blame()} " + _REMEDY.format(these="these inputs")
    )


def require_announced(
    index: Tensor,
    found: Tensor,
    noise: NoiseModel | None,
    dtype: torch.dtype,
    blame: Callable[[], str] = str,
) -> None:
    """Check that announced samples are those that a noise model knows one by one.

    Args:
        index: samples of the first batch, shape (m,).
        found: their fingerprints, shape (m, 3).
        noise: the model.
        dtype: of the inputs.
        blame: as in :func:`refuse_others`.

    Raises:
        ValueError: if none is; where some are, the others may have been augmented.
    """
    if noise is None or noise.fingerprints is None or noise.num_samples is None:
        return
    if int(index.max()) >= len(noise.fingerprints):
        return
    fitted = noise.fingerprints.to(found)
    new, differ = Fingerprints(fitted, rounding=_rounding(dtype)).differ(index, found)
    if bool((differ | new).all()):
        raise ValueError(
            f"DecoupledDescent: the noise model knows {len(fitted)} samples one by one (component "
            f"ids or masses), and none of the {len(found)} announced ones in the first training "
            f"forward has the input that it was fitted on{_times(found, fitted)}: announced are "
            f"other samples, other units or augmented inputs.{blame()} "
            + _REMEDY.format(these="the announced samples in their order")
        )


def require_same_order(
    known: Tensor, noise: NoiseModel | None, dtype: torch.dtype | None = None
) -> None:
    """Check that a state is of the samples that a noise model knows one by one, in their order.

    Args:
        known: fingerprints that the state holds, shape (n, 3), not a number where not yet seen.
        noise: the model.
        dtype: of the inputs, where known; until then nothing is said of samples that are nowhere.

    Raises:
        ValueError: if they stand in another order, or all are other samples.
    """
    if noise is None or noise.fingerprints is None or noise.num_samples is None:
        return
    index = (~known[:, 0].isnan()).nonzero().squeeze(1)
    fitted, found = noise.fingerprints.to(known), known[index]
    if len(index) == 0 or int(index.max()) >= len(fitted):
        return
    off = (found.double() - fitted[index].double()).std(0, correction=0)
    # The first batch may have been shifted, or computed anew.
    if bool((off <= _SAME_ROW * fitted.double().std(0, correction=0)).all()):
        return
    rounding = None if dtype is None else _rounding(dtype)
    _, differ = Fingerprints(fitted, rounding=rounding).differ(index, found)
    moved = int(Fingerprints(fitted).find(found[differ])[1].sum())
    if moved == 0 and (dtype is None or not bool(differ.all())):
        return
    told = (
        f"{moved} of {len(index)} stand in another order"
        if moved
        else "the noise model was fitted on others"
    )
    raise ValueError(
        f"DecoupledDescent: the loaded state holds the shadows of {len(known)} training samples, "
        f"and the noise model knows {len(fitted)} one by one (component ids or masses): {told}. "
        "Fit the noise model on the samples in the order in which the state was made: "
        "noise=dd.NoiseModel.fit(inputs, components); or train on from the start without the state."
    )


def require_spread(seen: Tensor, noise: NoiseModel | None, *, whole: bool) -> None:
    """Check that samples vary as those that the noise model was fitted on.

    The noise of a larger pool goes for some of it, but not in other units.

    Args:
        seen: fingerprints of samples, shape (m, 3).
        noise: the model.
        whole: whether these are all samples.

    Raises:
        ValueError: if they vary more, or less, by far more than chance.
    """
    if noise is None or noise.fingerprints is None or len(seen) < _FEWEST:
        return
    fitted = noise.fingerprints.to(seen.device).double()
    (found, doubt), (expected, fitted_doubt) = _log_variance(seen.double()), _log_variance(fitted)
    off = found - expected
    chance = _DEVIATIONS * math.hypot(doubt, fitted_doubt)
    if off > _OFF + chance or -off > (_OFF if whole else _FAR_OFF) + chance:
        raise ValueError(
            f"DecoupledDescent: the noise model was fitted on {len(fitted)} inputs, and the "
            f"{len(seen)} samples that the decoupled layer has received so far are not among them"
            f"{_times(seen, fitted)}: the noise is that of other samples or other units. "
            + _REMEDY.format(these="these samples")
        )


def _rounding(dtype: torch.dtype) -> float | None:
    """Relative rounding of a fingerprint in low precision, or None for the usual one."""
    # Roundings of the inputs add up at random, so that one unit in the last place is many times
    # their sum.
    eps = torch.finfo(dtype).eps
    return 2 * eps if eps > torch.finfo(torch.float32).eps else None


def _log_variance(values: Tensor) -> tuple[float, float]:
    """Logarithm of the mean variance of three projections, and its standard error."""
    centred = (values - values.mean(0)).square()
    variance = centred.mean(0)
    size = float(variance.mean())
    if size == 0:
        return -math.inf, 0.0
    return math.log(size), float((centred.mean(1) / size).std() / math.sqrt(len(values)))


def _times(found: Tensor, fitted: Tensor) -> str:
    ratio = math.exp((_log_variance(found.double())[0] - _log_variance(fitted.double())[0]) / 2)
    if len(found) < _FEWEST or 0.8 < ratio < 1.25:
        return ""
    return f", and vary {ratio:.2g} times as much"


def _fitted_on(noise: NoiseModel | None) -> int | None:
    if noise is None or noise.fingerprints is None:
        return None if noise is None else noise.num_samples
    return len(noise.fingerprints)


def _by_whom(known: Fingerprints, noise: NoiseModel | None) -> str:
    if noise is not None and noise.fingerprints is not None and len(known) == _fitted_on(noise):
        return ""
    return ", which the first training forward made the whole training set"
