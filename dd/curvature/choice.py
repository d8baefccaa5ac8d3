"""Estimators of the curvature by their names."""

from torch import nn

from dd.curvature.estimators import Curvature, Exact, GraphProbe, Probe, Stein
from dd.noise.model import NoiseModel

__all__ = ["ESTIMATORS", "build", "check_name", "has_leaky_kinks"]


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
        name: one of :data:`ESTIMATORS`; ``"auto"`` is the probe, component ids or not.
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


_LEAKY = (nn.LeakyReLU, nn.PReLU, nn.RReLU)


def has_leaky_kinks(module: nn.Module | None) -> bool:
    """Whether a module has activations with a kink at 0 that are not zero below."""
    return module is not None and any(isinstance(part, _LEAKY) for part in module.modules())
