"""Estimators of the curvature by their names."""

from torch import nn

from dd.curvature.estimators import Curvature, Exact, GraphProbe, Probe, Stein
from dd.noise.model import NoiseModel

__all__ = ["ESTIMATORS", "build", "check_name", "falls_back", "has_leaky_kinks"]


ESTIMATORS = ("auto", "stein", "probe", "probe_create_graph", "exact")


def check_name(name: str) -> None:
    """Reject an unknown estimator.

    Raises:
        ValueError: if ``name`` is not one of :data:`ESTIMATORS`.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"DecoupledDescent: curvature must be one of {ESTIMATORS}, got {name!r}")


def build(name: str, noise: NoiseModel | None, module: nn.Module | None = None) -> Curvature:
    """Make the estimator called ``name``.

    Args:
        name: one of :data:`ESTIMATORS`; ``"auto"`` is the probe, component ids or not, but Stein's
            for samples of several rows whose components are known.
        noise: the noise model, or None where it will be fitted without components.
        module: the model, whose activations tell of kinks.

    Returns:
        The estimator.

    Raises:
        ValueError: if the name is unknown, or Stein is asked for without component ids.
    """
    check_name(name)
    components = None if noise is None else noise.row_components
    relative_mass = None if noise is None else noise.relative_mass
    if name == "auto" and components is not None and _has_pairs(noise):
        return Stein(components, may_fall_back=True)
    if name == "stein":
        if components is None:
            raise ValueError(
                'DecoupledDescent: curvature="stein" needs the mixture component of every sample; '
                'pass noise=dd.NoiseModel.isotropic(inputs, components), or curvature="probe"'
            )
        return Stein(components)
    without_ids = {
        "auto": Probe,
        "probe": Probe,
        "probe_create_graph": GraphProbe,
        "exact": Exact,
    }
    return without_ids[name](relative_mass, leaky=has_leaky_kinks(module))


def _has_pairs(noise: NoiseModel | None) -> bool:
    """Whether H holds pairs of a sample's rows.

    The mean second derivative there is up to twice as far from what the correction needs as Stein's
    regression on the samples themselves, however many probes it is taken from, and misses the ties
    of a maximum (``docs/several-rows.md``).
    """
    units = None if noise is None else noise.units
    return units is not None and units.are_samples


def falls_back(estimator: Curvature) -> bool:
    """Whether a probe takes an estimator's place where an audit finds it wrong."""
    return isinstance(estimator, Stein) and estimator.may_fall_back


_LEAKY = (nn.LeakyReLU, nn.PReLU, nn.RReLU)


def has_leaky_kinks(module: nn.Module | None) -> bool:
    """Whether a module has activations with a kink at 0 that are not zero below."""
    return module is not None and any(isinstance(part, _LEAKY) for part in module.modules())
