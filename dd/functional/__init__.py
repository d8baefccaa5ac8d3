"""The mathematics of decoupled descent as pure functions of tensors.

Equation and section numbers are those of ``docs/theory.md``. Leading batch dimensions are allowed
everywhere and are written ``...``. The symbols:

=====  ==========  ==========================================================================
n                  samples
k                  width of the decoupled layer
B                  eigenvalue bins of the noise covariance; one bin when the noise is isotropic
R      (n, k)      corrected pre-activations
L                  the loss that is differentiated, however it is reduced over samples
G      (n, k)      ∂L/∂R, one row a sample
H      (k, k)      Σ_i ∂²L/∂r_i², the curvature of L in the pre-activations
Q      (B, n, k)   shadows: how far each sample's pre-activation would move without that sample
λ      (B,)        noise variance per coordinate
τ      (B,)        noise mass E‖z‖² of each bin, λ times the bin's dimension
C                  scores, the outputs of the network's last linear layer, the *head*
U      (n, m)      coordinates of the inputs along the component means, and 1 for a bias
Φ      (n, f)      inputs of the head, and 1 for its bias
=====  ==========  ==========================================================================

Everything is written for the loss as it is differentiated. When L is a mean over n samples, G and H
are the per-sample gradient over n and the mean curvature; when L is a sum they are n times larger,
and so is the gradient of the weights. No formula below has to know which.

In: tensors. Out: tensors; nothing is kept, and nothing but numbers is looked at.
"""

from dd.functional.arithmetic import all_finite, at_least_single, rademacher, scaled_by_mass
from dd.functional.audit import stein_excess, stein_mismatch
from dd.functional.components import centre_within_components, component_counts, component_sums
from dd.functional.curvature import (
    kink_curvature,
    kink_signs,
    kink_terms,
    probe_curvature,
    solved_curvature,
    stein_curvature,
    symmetric_curvature,
)
from dd.functional.head import (
    shared_curvature,
    shared_sample_gradient,
    shared_shadow_gradient,
    softmax_curvature,
)
from dd.functional.shadows import (
    correct_preactivation_,
    corrected_preactivation,
    damped_weight_gradient,
    driven,
    shadow_decay,
    shadow_gradient,
)

__all__ = [
    "all_finite",
    "at_least_single",
    "centre_within_components",
    "component_counts",
    "component_sums",
    "correct_preactivation_",
    "corrected_preactivation",
    "damped_weight_gradient",
    "driven",
    "kink_curvature",
    "kink_signs",
    "kink_terms",
    "probe_curvature",
    "rademacher",
    "scaled_by_mass",
    "shadow_decay",
    "shadow_gradient",
    "shared_curvature",
    "shared_sample_gradient",
    "shared_shadow_gradient",
    "softmax_curvature",
    "solved_curvature",
    "stein_curvature",
    "stein_excess",
    "stein_mismatch",
    "symmetric_curvature",
]
