"""What is said to the user while an attached optimizer trains; it changes nothing."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dd.curvature.choice import has_leaky_kinks
from dd.curvature.custom import CurvatureWarning
from dd.curvature.estimators import Curvature, Stein
from dd.noise.copies import CopyWatch, count_copies
from dd.noise.model import NoiseModel
from dd.samples.placement import Placement
from dd.samples.recognition import Samples
from dd.support.user_warning import warn_user
from dd.watch.audit import Audit, AuditedForward, AuditedTensor, is_due, is_safe
from dd.watch.audit_result import one_row_is_pushed
from dd.watch.shadow_size import (
    MARGIN,
    ShadowSizeWatch,
    ShadowWarning,
    largest_shadow_ratio,
    shadow_size_message,
)
from dd.watch.strain import (
    StrainWarning,
    copies_strain_message,
    head_strain_message,
    pooled_strain_message,
    strain_messages,
)

__all__ = ["ModelWatch", "WatchedModel"]

# Steps in which what pools the rows is looked at.
_FORWARDS_LOOKED_AT = 3
_OF_A_MAXIMUM = (
    "A probe does not see the curvature of a maximum over rows.",
    "behind the decoupled layer a maximum over the rows of a sample is taken, and where rows tie "
    "no second derivative sees its curvature: the training error may be off by several points. A "
    "smooth maximum (logsumexp) has one.",
)
_BY_A_PROBE = (
    "The curvature of samples of several rows goes by a probe.",
    "samples have several rows, and the curvature is found by second derivatives, by which the "
    "training error was up to 0.03 off (docs/several-rows.md).",
)
_BY_STEIN = (
    "Where the inputs are Gaussian within known components, noise=dd.NoiseModel.fit(inputs, "
    "components) and the default curvature do better."
)

logger = logging.getLogger("dd")


@dataclass(frozen=True, eq=False)
class WatchedModel:
    """What is looked after.

    Attributes:
        module: the model.
        layer: its decoupled layer.
        name: dotted name of that.
        noise: the noise model in use, or None before it is fitted.
        given_noise: the one that was given, or None.
        estimator: of the curvature.
        samples: the training samples of this process.
        total: gives their number over all processes, or None before it is known.
        width: of the decoupled layers, k.
        stalls: whether to look at a number waits for work that is queued on a device.
        corrected: trained numbers that all samples share and that are corrected.
        uncorrected: gives the number of those that are not.
    """

    module: nn.Module
    layer: nn.Linear
    name: str
    noise: NoiseModel | None
    given_noise: NoiseModel | None
    estimator: Curvature
    samples: Samples
    total: Callable[[], int | None]
    width: int
    stalls: bool
    corrected: int
    uncorrected: Callable[[], int]


class ModelWatch:
    """Looks after one subject: its noise model, its sizes and Stein's curvature.

    Attributes:
        is_suspicious: set it to have the next training forward audited that can be, besides those
            that are by their number.
    """

    def __init__(self) -> None:
        self.is_suspicious = False
        self._forwards = 0
        self._audit: Audit | None = None
        self._has_looked = self._has_found = False
        self._poolings = 0
        self._copies: CopyWatch | None = None
        self._size = ShadowSizeWatch()
        self._limit: float | None = None
        self._limit_for = 0
        self._has_grown = False
        self._closely = False
        self._most = math.inf
        # What is found elsewhere, such as a correction that diverges.
        self._told: list[str] = []

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why the training error is not to be believed, a sentence each."""
        found = list(self._told)
        if self._has_found:
            found.append("Stein's curvature is not that of the loss.")
        if self._size.found is not None:
            found.append(shadow_size_message(self._size.found))
        return tuple(found)

    def expect_shadows_below(self, share: float) -> None:
        """Warn of shadows that are a smaller share of the pre-activations than the theory's."""
        self._most, self._limit = share, None

    def forget_limit(self) -> None:
        """Look at the noise model anew for the size of shadows."""
        self._limit = None

    def doubt(self, sentence: str) -> bool:
        """Add to the doubts, once; returns whether it is new."""
        if sentence in self._told:
            return False
        self._told.append(sentence)
        return True

    @contextmanager
    def closely(self) -> Iterator[None]:
        """Look at every forward, on an accelerator too."""
        before, self._closely = self._closely, True
        try:
            yield
        finally:
            self._closely = before

    def state_dict(self) -> dict[str, Any]:
        """Return what was said so far, between two training forwards."""
        has = {"has_looked": self._has_looked, "has_found": self._has_found}
        more: dict[str, Any] = {"size": self._size.state_dict(), "told": list(self._told)}
        return {"forwards": self._forwards, **has, **more}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._forwards = state["forwards"]
        self._has_looked, self._has_found = state["has_looked"], state["has_found"]
        self._size.load_state_dict(state["size"])
        self._told = list(state["told"])

    def looks_at_shadows(self, subject: WatchedModel) -> bool:
        """Whether the size of shadows is looked at in the next training forward."""
        # To look at a number waits for an accelerator.
        return not subject.stalls or self._closely or is_due(self._forwards + 1)

    def look_at_shadows(self, subject: WatchedModel, shadow: Tensor, preactivation: Tensor) -> None:
        """Warn once of shadows that the theory cannot explain.

        Args:
            subject: with its noise model fitted and the samples known.
            shadow: what corrects some samples' pre-activations, shape (m, k).
            preactivation: R of these, shape (m, k).

        Warns:
            ShadowWarning: if there are.
        """
        if not self.looks_at_shadows(subject):
            return
        if subject.noise is None or (count := subject.total()) is None:
            return
        if self._limit is None or self._limit_for != count:
            self._limit_for = count
            self._limit = min(largest_shadow_ratio(subject.noise, count), self._most)
        found = self._size.look(shadow, preactivation, self._limit, count)
        if not self._has_grown and self._size.latest > self._limit / MARGIN:
            # What may still be chance deserves another look at Stein's curvature.
            self._has_grown = self.is_suspicious = True
        if found:
            warn_user(
                f"DecoupledDescent: at training forward {self._forwards + 1} the shadows are "
                f"{self._size.found:.2g} of the pre-activations in size, where the theory explains "
                f"{self._limit:.2g} at most: the network learns from its shadows more than from "
                "its samples, and the training error is not to be believed from here on. Start "
                'again with a lower learning rate, the default curvature (curvature="auto") and a '
                "noise model fitted on these inputs; of heavy-tailed inputs, clip the tails.",
                ShadowWarning,
            )

    @property
    def has_found(self) -> bool:
        """Whether an audit has found Stein's curvature wrong; there are no more audits then."""
        return self._has_found

    def look(self, subject: WatchedModel, placement: Placement, inputs: Tensor) -> None:
        """Log the noise model and warn of strained sizes and of copies, once.

        Copies are told at the end of the first pass where nobody has seen all samples before.

        Args:
            subject: with its noise model fitted and the samples known.
            placement: of a batch.
            inputs: of the batch, shape (m, d).
        """
        if self._has_looked:
            self._look_for_copies(subject, placement, inputs)
            return
        self._has_looked = True
        logger.info("%s", subject.noise)
        layer, head = subject.layer, subject.uncorrected()
        total = subject.total()
        assert total is not None
        units = None if subject.noise is None else subject.noise.units
        rows = None
        if units is not None:
            total, rows = len(units), units.effective_rows
        copies = self._copies_at_once(subject, placement, inputs)
        if copies is None:
            self._copies = CopyWatch()
            self._look_for_copies(subject, placement, inputs)
        for sentence in strain_messages(
            total,
            layer.in_features,
            subject.width,
            head,
            0 if copies is None else round(copies * total),
            rows=rows,
            corrected=subject.corrected,
            ignores_heavy_tails=subject.noise is not None and subject.noise.ignores_heavy_tails,
        ):
            warn_user(f"DecoupledDescent: {sentence}", StrainWarning)

    def look_at_head(self, subject: WatchedModel) -> None:
        """Warn of a large head whose correction has ended after :meth:`look`."""
        if not self._has_looked or (total := subject.total()) is None:
            return
        sentence = head_strain_message(subject.uncorrected(), total)
        if sentence is not None:
            warn_user(f"DecoupledDescent: {sentence}", StrainWarning)

    def _copies_at_once(
        self, subject: WatchedModel, placement: Placement, inputs: Tensor
    ) -> float | None:
        """Share of copies among the samples, or None where a first batch does not show it."""
        noise, samples = subject.noise, subject.samples
        of_samples = subject.given_noise is None or samples.are_fitted
        if noise is not None and noise.copies is not None and noise.fitted_on and of_samples:
            return noise.copies / (noise.fitted_on if noise.units is None else len(noise.units))
        if placement.index is not None or math.isinf(samples.total(subject.given_noise)):
            return None
        return count_copies(placement.fingerprints, inputs.__getitem__) / len(inputs)

    def _look_for_copies(self, subject: WatchedModel, placement: Placement, inputs: Tensor) -> None:
        known = subject.samples.known
        if self._copies is None or known is None:
            return
        index = placement.index
        index = torch.arange(len(inputs)) if index is None else index.cpu()
        copies = self._copies.see(index, inputs, known)
        if copies is None:
            return
        self._copies = None
        sentence = copies_strain_message(copies, known.count)
        if sentence is not None:
            warn_user(f"DecoupledDescent: {sentence}", StrainWarning)

    def look_at_output(self, subject: WatchedModel, rows: int, output: Tensor) -> None:
        """Warn once of a model that makes one output of several rows, which are then one unit.

        Args:
            subject: the model.
            rows: that the decoupled layer received.
            output: of the model, any shape.

        Warns:
            StrainWarning: if it does.
        """
        outputs = len(output) if output.dim() > 0 else 0
        if outputs == 0 or outputs == rows or rows % outputs != 0:
            return
        sentence = pooled_strain_message(subject.name, rows, outputs)
        if self.doubt("Rows of one sample are taken for samples."):
            warn_user(f"DecoupledDescent: {sentence}", StrainWarning)

    def look_at_pooling(self, gradient: Tensor) -> None:
        """Warn once of samples of several rows whose curvature is by second derivatives.

        Args:
            gradient: G of the rows of some samples, shape (m, P, k).

        Warns:
            CurvatureWarning: that the estimate is coarse, or, where in each sample one row at most
                has a gradient, unit for unit, that it misses the ties of a maximum.
        """
        self._poolings += 1
        if self._poolings > _FORWARDS_LOOKED_AT:
            return
        samples, rows = gradient.shape[:2]
        unit = torch.arange(samples, device=gradient.device).repeat_interleave(rows)
        is_maximum = one_row_is_pushed(gradient.flatten(0, 1), unit)
        if self._has_found and not is_maximum:
            # The audit has said so.
            return
        doubt, sentence = _OF_A_MAXIMUM if is_maximum else _BY_A_PROBE
        if self.doubt(doubt):
            warn_user(f"DecoupledDescent: {sentence} {_BY_STEIN}", CurvatureWarning)

    def outgoing(
        self, subject: WatchedModel, capture: AuditedForward, preactivation: Tensor, seed: int
    ) -> Tensor:
        """Return what the following layers receive, marked for an audit where one is due.

        Args:
            subject: with its noise model fitted.
            capture: the training forward.
            preactivation: R, shape (m, k).
            seed: of the audit's probe.
        """
        self._forwards += 1
        estimator = subject.estimator
        is_wanted = self.is_suspicious or is_due(self._forwards)
        if self._has_found or not isinstance(estimator, Stein) or not is_wanted:
            return preactivation
        if not is_safe(subject.module):
            return preactivation
        self.is_suspicious = False
        mass = None if subject.noise is None else subject.noise.relative_mass
        index = capture.placement.index
        if mass is not None and index is not None:
            mass = mass[index]
        leaky = has_leaky_kinks(subject.module)
        units = None if subject.noise is None else subject.noise.units
        given = capture, estimator, mass, seed, self._forwards, self._found
        self._audit = Audit(*given, units=units, leaky=leaky)
        return preactivation.as_subclass(AuditedTensor)

    def _found(self) -> None:
        self._has_found = True
