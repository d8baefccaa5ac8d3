"""Settings of a corrected optimizer that do not go together."""

from typing import Any

from dd.correction.attachment import Attachment
from dd.curvature.choice import check_name
from dd.noise.model import NoiseModel

__all__ = ["check_settings", "refuse_without_module", "require_isotropic"]


def check_settings(damping: float, curvature: str, process_group: Any) -> None:
    """Check what can be known without a module.

    Args:
        damping: ρ.
        curvature: name of the estimator.
        process_group: that shares the samples.

    Raises:
        ValueError: if one is out of range.
    """
    if not 0.0 <= damping <= 1.0:
        raise ValueError(f"DecoupledDescent: damping must lie in [0, 1], got {damping}")
    check_name(curvature)
    if process_group is True:
        raise ValueError(
            "DecoupledDescent: process_group must be a torch.distributed process group, None "
            "for the default one, or False to train alone"
        )


def refuse_without_module(layer: object, noise: NoiseModel | None) -> None:
    """Refuse what says how to attach where there is no module to attach to.

    Raises:
        ValueError: if anything does.
    """
    if layer is not None or noise is not None:
        raise ValueError(
            "DecoupledDescent: layer= and noise= need a module; pass the module in place of "
            "its parameters, or give them to attach(module, layer=..., noise=...)"
        )


def require_isotropic(damping: float, noise: NoiseModel | None, attachment: Attachment) -> None:
    """Check that damping goes with the noise model and with what is corrected.

    Args:
        damping: ρ.
        noise: the noise model as given.
        attachment: of the decoupled layer.

    Raises:
        ValueError: if it does not.
    """
    if noise is not None and len(noise.eigenvalues) > 1 and damping != 1.0:
        raise ValueError(
            f"DecoupledDescent: damping={damping} is defined for isotropic noise, got a "
            f"noise model of {len(noise.eigenvalues)} bins; use damping=1 or "
            "NoiseModel.isotropic"
        )
    if attachment.shared is not None and damping != 1.0:
        raise ValueError("DecoupledDescent: head=True needs damping=1")
