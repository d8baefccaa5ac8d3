"""Sizes at which the theory of decoupled descent is strained."""

__all__ = [
    "StrainWarning",
    "copies_strain_message",
    "head_strain_message",
    "means_strain_message",
    "pooled_strain_message",
    "strain_messages",
]

# Beyond these the mean gap was found to be 1.5 to 6 times its sampling floor, within them at most
# 1.6 times (docs/when-to-trust.md).
MIN_SAMPLES_PER_INPUT = 0.75
MAX_SQUARED_WIDTH_PER_SAMPLE = 4.0
MAX_HEAD_PER_SAMPLE = 0.25
MAX_CORRECTED_PER_SAMPLE = 1.0
# Four tables are beyond this share of the inputs' dimensions; a search reported errors on them that
# were too low by 0.011 to 0.024, where other tables that are not warned of had 0.010 on the mean.
MOST_MEANS_PER_INPUT = 0.5
# From here on the shadows are too small for their masses to matter.
MANY_FOR_TAILS = 10
# One copy in twenty samples took the gap to twice its floor.
MAX_COPIES_PER_SAMPLE = 0.01


class StrainWarning(UserWarning):
    """The training error may be off, because the sizes are far from those of the theory.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", dd.StrainWarning)  # end such a run at once
        >>> optimizer = dd.DecoupledDescent(model, lr=0.5)
        >>> model(X[:30])
        Traceback (most recent call last):
            ...
        dd.watch.strain.StrainWarning: DecoupledDescent: 30 samples of dimension 50 ...
    """


def strain_messages(
    n: int,
    d: int,
    k: int,
    head: int,
    copies: int,
    *,
    rows: float | None = None,
    corrected: int = 0,
    ignores_heavy_tails: bool = False,
) -> list[str]:
    """Say what to expect where samples are few for the network.

    Args:
        n: training samples.
        d: inputs of the decoupled layer.
        k: its width.
        head: trained numbers that all samples share and that are not corrected.
        copies: samples that equal another, or nearly.
        rows: independent rows that say as much of the noise, where a sample has several.
        corrected: trained numbers that all samples share and that are.
        ignores_heavy_tails: whether the noise model does.

    Returns:
        One sentence for every number that is out of range, and for an unfit noise model.
    """
    sentences = []
    known = n if rows is None else rows
    if known < MIN_SAMPLES_PER_INPUT * d:
        what = "samples" if rows is None else "independent rows' worth of samples"
        sentences.append(
            f"{known:.0f} {what} of dimension {d} (n/d = {known / d:.2g}): the noise spectrum is "
            "known poorly and the correction is coarse; expect the training error to be off by "
            "several points."
        )
    if k * k > MAX_SQUARED_WIDTH_PER_SAMPLE * n:
        sentences.append(
            f"a decoupled layer of width {k} on {n} samples (k²/n = {k * k / n:.3g}): the "
            "curvature is estimated with much noise; expect the training loss to drift from the "
            "test loss, less so with fewer units."
        )
    uncorrected = head_strain_message(head, n)
    if uncorrected is not None:
        sentences.append(uncorrected)
    if corrected > MAX_CORRECTED_PER_SAMPLE * n:
        sentences.append(
            f"{corrected} parameters that all samples share on {n} samples ({corrected / n:.2g} a "
            "sample) are corrected, but by the response to small changes, and one sample of so few "
            "makes a large one; expect the training error to be off by several points, less so "
            "with fewer units."
        )
    repeated = copies_strain_message(copies, n)
    if repeated is not None:
        sentences.append(repeated)
    if ignores_heavy_tails and n < MANY_FOR_TAILS * d:
        sentences.append(
            "the samples' noise norms vary far more than this noise model says: the noise is "
            "heavy-tailed, or of few directions; expect the training error to be off, to either "
            "side. Fit its spectrum and a mass for every sample, NoiseModel.fit(inputs, "
            "components), or clip the inputs at a few deviations."
        )
    return sentences


def head_strain_message(head: int, n: int) -> str | None:
    """Say what to expect where what all samples share is not corrected.

    Args:
        head: trained numbers that all samples share and that are not corrected.
        n: training samples.

    Returns:
        A sentence, or None where they are few enough.
    """
    if head <= MAX_HEAD_PER_SAMPLE * n:
        return None
    return (
        f"{head} parameters that all samples share on {n} samples ({head / n:.2g} a sample), "
        "those beside the decoupled weight and its own along the class means, are not "
        "corrected and over-fit; expect a training error that is too low, less so with a "
        "smaller head, or with head=True and NoiseModel.fit(inputs, labels)."
    )


def means_strain_message(means: int, d: int) -> str | None:
    """Say what to expect where a search corrects the layer along many component means.

    Args:
        means: dimensions that they span.
        d: inputs of the decoupled layer.

    Returns:
        A sentence, or None where they are few enough.
    """
    if means <= MOST_MEANS_PER_INPUT * d:
        return None
    return (
        f"the component means span {means} of {d} dimensions of the inputs, along which samples "
        'are corrected by the response to small changes, and the steps of lr="auto" are large; '
        "expect a training error that is too low by one to three points, mostly less so with a "
        "numeric lr."
    )


def copies_strain_message(copies: int, n: int) -> str | None:
    """Say what to expect where samples are copies.

    Args:
        copies: samples that equal another, or nearly.
        n: training samples.

    Returns:
        A sentence, or None where they are few enough.
    """
    if copies <= MAX_COPIES_PER_SAMPLE * n:
        return None
    return (
        f"{copies} of {n} samples are copies of others, or nearly: each leaves its imprint on its "
        "twins, and only its own is removed; expect a training error that is too low. Keep each "
        "sample once, and weigh it in the loss by its count; or leave what belongs together out "
        "together, NoiseModel.fit(inputs, components, groups=ids)."
    )


def pooled_strain_message(layer: str, rows: int, outputs: int) -> str:
    """Say what to expect where several rows make one output.

    Args:
        layer: name of the decoupled layer.
        rows: that it received.
        outputs: that the model made of them.
    """
    return (
        f"layer {layer!r} received {rows} rows and the model returned {outputs}, so that "
        f"{rows // outputs} rows seem to be one sample: their noise and their gradients go "
        "together, each is corrected as if it stood alone, and the training error is too low. Hand "
        f"the layer inputs of shape (samples, {rows // outputs}, d), which nn.Linear takes as they "
        "are, and fit NoiseModel.fit on inputs of that shape."
    )
