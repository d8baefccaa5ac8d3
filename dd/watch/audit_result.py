"""What an audit of Stein's curvature makes of its figures."""

import math
from typing import NamedTuple

from torch import Tensor

__all__ = ["AuditResult", "of_ids", "of_matrices", "one_row_is_pushed"]

# Right ids stayed above -0.20 of the curvature (kinks of ReLU, and finite size), XOR's two labels
# for its four clusters and no ids at all fell below -0.45 within 50 steps of every run.
SHARE = 0.4
STANDARD_ERRORS = 5.0
# Of a maximum over rows the probe is short of the ties, at random weights by much. True clusters
# stayed above -0.4 from the fifth forward on, XOR's two labels fell below -0.65 in each run.
BLIND_SHARE, BLIND_ERRORS, FIRST_BLIND = 0.6, 3.0, 5
# As matrices. True components, and classes where Stein's lemma did well (noisy MNIST, CIFAR-10
# features), stayed below 1.1 times the curvature; of ten public tables, whose training error it
# makes worthless, each went above 1.6 and 13 standard errors by the second forward.
MISMATCH = 1.25
MISMATCH_ERRORS = 10.0


class AuditResult(NamedTuple):
    """What an audit measured.

    Attributes:
        excess: of the trace of Stein's curvature over that of the probe's, as a share of it.
        excess_errors: the same in standard errors.
        mismatch: of the two as matrices, beyond chance, as a share of the probe's.
        mismatch_errors: how far beyond chance it is, in standard errors.
        is_blind: whether the probe misses the ties of a maximum over rows.
    """

    excess: float = 0.0
    excess_errors: float = 0.0
    mismatch: float = 0.0
    mismatch_errors: float = 0.0
    is_blind: bool = False

    def are_wrong_ids(self, forward: int) -> bool:
        """Whether the curvature falls short as it does where components are several clusters.

        Args:
            forward: number of the training forward.
        """
        if self.is_blind:
            falls_short = self.excess < -BLIND_SHARE and self.excess_errors < -BLIND_ERRORS
            return falls_short and forward >= FIRST_BLIND
        return self.excess < -SHARE and self.excess_errors < -STANDARD_ERRORS

    @property
    def are_apart(self) -> bool:
        """Whether the curvatures differ as matrices."""
        measured = math.isfinite(self.mismatch) and math.isfinite(self.mismatch_errors)
        return measured and self.mismatch > MISMATCH and self.mismatch_errors > MISMATCH_ERRORS


# Rows whose values are equal in single precision share a gradient.
_TIES = 0.01


def one_row_is_pushed(gradient: Tensor, unit: Tensor) -> bool:
    """Whether of all but few units one row at most has a gradient, as where a maximum is taken.

    Args:
        gradient: G, shape (m, k).
        unit: of each row, from 0, shape (m,).
    """
    pushed = (gradient != 0).long()
    count = pushed.new_zeros(int(unit.max()) + 1, gradient.shape[1]).index_add_(0, unit, pushed)
    rows = len(unit) / len(count)
    return (
        rows > 1
        and float((count > 1).double().mean()) < _TIES
        and float(count.double().mean()) >= 0.5
    )


_FALLS_BACK = (
    "From here on it is found by a probe, by which the training error of samples of several rows "
    "was up to 0.03 off (docs/several-rows.md)."
)


def of_ids(forward: int, found: AuditResult, *, falls_back: bool) -> str:
    """What to say of wrong component ids found at a forward; whether a probe is used from then."""
    return (
        f"DecoupledDescent: at training forward {forward} the curvature by the component ids falls "
        f"short of a probe's by {-found.excess:.0%} ({-found.excess_errors:.0f} standard errors). "
        "The ids are not the mixture components of the inputs, as when a class holds several "
        "clusters"
        + (
            f". {_FALLS_BACK} Remedy: "
            if falls_back
            else '; the training error comes out too high. Remedy: curvature="probe", or '
        )
        + "the right ids in the noise model; dd.find_components(inputs, labels) looks for clusters "
        "within classes."
    )


def of_matrices(forward: int, found: AuditResult, *, falls_back: bool) -> str:
    """What to say of curvatures that differ as matrices, likewise."""
    return (
        f"DecoupledDescent: at training forward {forward} the curvature by Stein's lemma is "
        f"away from a probe's by {found.mismatch:.2g} times the latter's size "
        f"({found.mismatch_errors:.0f} standard errors). The lemma asks that pre-activations "
        "are Gaussian within each component, and these are not"
        + (
            f". {_FALLS_BACK}"
            if falls_back
            else '; the training error is not to be relied on. Remedy: curvature="probe".'
        )
    )
