"""Whether the head is corrected for its own over-fitting where nothing is said."""

from torch import nn

from dd.correction.layers import find_head
from dd.noise.model import NoiseModel

__all__ = [
    "AUTO",
    "form_and_head",
    "form_to_correct",
    "form_without_head",
    "require_matching_means",
    "shared_count",
    "uncorrected_count",
    "worth_correcting",
]

AUTO = "auto"

# Below this share of the samples the over-fitting of what all share is within the sampling error
# (docs/when-to-trust.md, the table of the head's choice).
FEWEST_PER_SAMPLE = 0.05
# n p² beyond this takes a large part of a second a step on two cores. A search, whose steps are few
# and take as long for other reasons, may take more.
MOST_WORK, MOST_WORK_OF_SEARCH = 5e8, 2e9
# With fewer samples an input, or more directions of noise for all units together, the samples' own
# part in H_ψ, which the bins' λH does not have, takes off more than bins lose where the noise is
# not Gaussian (docs/theory.md, section 7).
MANY_PER_INPUT = 20
MOST_DIRECTIONS_PER_SAMPLE = 0.5


def form_and_head(
    module: nn.Module,
    layer: nn.Linear,
    noise: NoiseModel | None,
    head: bool | nn.Module | str,
    curvature: str,
    *,
    may_choose: bool,
    searches: bool,
) -> tuple[NoiseModel | None, bool | nn.Module | str]:
    """The noise model in the form to follow, and which head to correct, settled.

    Args:
        module: the model.
        layer: the decoupled layer.
        noise: the noise model as given.
        head: whether the head is corrected, which layer it is, or "auto".
        curvature: as of :func:`worth_correcting`.
        may_choose: whether a head that nobody asked for may be corrected.
        searches: whether steps are searched for.
    """
    if head == AUTO:
        chosen = None
        if may_choose:
            chosen = worth_correcting(module, layer, noise, curvature, searches=searches)
        return chosen or noise, chosen is not None
    if noise is not None and head is not False and noise.is_in_both_forms:
        return form_to_correct(module, layer, head, noise, curvature, searches=searches), head
    return noise, head


def worth_correcting(
    module: nn.Module,
    layer: nn.Linear,
    noise: NoiseModel | None,
    curvature: str = AUTO,
    *,
    searches: bool = False,
) -> NoiseModel | None:
    """The noise model to correct the head with, by the sizes of model and data, or None for not.

    The head is corrected where what all samples share is much for the samples and not too much to
    follow, and the noise model knows the component means, along which the decoupled layer over-fits
    as a head does.

    Args:
        module: the model.
        layer: the decoupled layer.
        noise: the noise model, or None where one will be fitted without components.
        curvature: which estimate the decoupled layer is to go by; what needs none is chosen where
            that is "auto".
        searches: whether steps are searched for, which are too long for what needs none.
    """
    if noise is None or noise.fitted_on is None:
        return None
    if noise.mean_directions is not None:
        # Only the head's correction follows what this model leaves out.
        return noise
    if not noise.is_in_both_forms:
        return None
    try:
        head = find_head(module, layer, choice=True)[1]
    except (ValueError, TypeError):
        return None
    return _most_exact(noise, layer, head, curvature, searches=searches)


def form_to_correct(
    module: nn.Module,
    layer: nn.Linear,
    choice: bool | nn.Module | str,
    noise: NoiseModel,
    curvature: str = AUTO,
    *,
    searches: bool = False,
) -> NoiseModel:
    """The noise model to correct the head with where that was asked for.

    Args:
        module: the model.
        layer: the decoupled layer.
        choice: as in :func:`dd.correction.layers.find_head`.
        noise: in both forms.
        curvature: as of :func:`worth_correcting`, as is the next.
        searches: whether steps are searched for.

    Raises:
        ValueError: if there is no head.
        TypeError: if it is not an ``nn.Linear``.
    """
    head = find_head(module, layer, choice)[1]
    found = _most_exact(noise, layer, head, curvature, searches=searches)
    return noise.with_means_apart() if found is None else found


def _most_exact(
    noise: NoiseModel, layer: nn.Linear, head: nn.Linear, curvature: str, *, searches: bool
) -> NoiseModel | None:
    """The most exact form of a noise model that gains enough and costs little enough, or None."""
    rows = noise.fitted_on or 0
    n = rows if noise.units is None else round(noise.units.effective_rows)
    most = MOST_WORK_OF_SEARCH if searches else MOST_WORK
    forms = [noise.with_means_apart()]
    directions = layer.out_features * noise.effective_rank
    many = n >= MANY_PER_INPUT * layer.in_features and directions <= MOST_DIRECTIONS_PER_SAMPLE * n
    if many and curvature == AUTO and not searches:
        forms.insert(0, noise.with_every_direction_apart())
    for form in forms:
        assert form.mean_directions is not None
        count = shared_count(layer, head, form.mean_directions.shape[1])
        if FEWEST_PER_SAMPLE * n < count and rows * count**2 <= most:
            return form
    return None


def shared_count(layer: nn.Linear, head: nn.Linear, means: int) -> int:
    """Numbers that all samples share: the decoupled layer along the means, its bias, and the head.

    Args:
        layer: the decoupled layer.
        head: the last layer.
        means: dimensions that the component means span.
    """
    along = layer.out_features * (means + _has_trained_bias(layer))
    return along + head.out_features * (head.in_features + _has_trained_bias(head))


def _has_trained_bias(linear: nn.Linear) -> bool:
    return linear.bias is not None and linear.bias.requires_grad


def uncorrected_count(
    module: nn.Module, layer: nn.Linear, noise: NoiseModel | None, corrected: set[int]
) -> int:
    """Trained numbers that over-fit uncounted: beside the decoupled weight, and in it along means.

    Args:
        module: the model.
        layer: the decoupled layer.
        noise: the noise model.
        corrected: ``id`` of every parameter with a shadow.
    """
    others = (p for p in module.parameters() if id(p) not in corrected)
    count = sum(p.numel() for p in others if p.requires_grad)
    if noise is not None and noise.mean_directions is not None:
        return count
    if noise is not None and noise.components is not None:
        components = int(noise.components.max()) + 1
    else:
        # As many classes as the network tells apart.
        linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
        components = linear[-1].out_features
    return count + layer.out_features * min(max(components - 1, 0), layer.in_features)


def form_without_head(noise: NoiseModel | None, whole: NoiseModel | None) -> NoiseModel:
    """A noise model for the bins of another, of as many as the shadows have, and all directions.

    Args:
        noise: that the shadows belong to.
        whole: the noise model as given.
    """
    assert noise is not None
    assert whole is not None
    if noise.is_followed_exactly:
        return whole.in_one_bin()
    return noise if noise.mean_directions is None else noise.spread_over_means()


def require_matching_means(noise: NoiseModel | None, *, corrects_head: bool) -> None:
    """Check that a noise model keeps the component means where the head's correction has them.

    Args:
        noise: the noise model, or None.
        corrects_head: whether the head is corrected.

    Raises:
        ValueError: if both follow the means, or neither.
    """
    if noise is None:
        return
    separated = noise.mean_directions is not None
    if corrects_head and noise.components is not None and not separated:
        raise ValueError(
            "DecoupledDescent: head=True follows the decoupled layer along the component means by "
            "itself; keep them out of the noise model: NoiseModel.fit(inputs, components, "
            "separate_means=True)"
        )
    if separated and not corrects_head:
        raise ValueError(
            "DecoupledDescent: this noise model leaves out the directions of the component means, "
            "which only head=True follows; use head=True, or NoiseModel.fit without separate_means"
        )
