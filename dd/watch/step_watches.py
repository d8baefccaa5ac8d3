"""The watches over one attached optimizer that trains on all samples at every step."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dd.functional import at_least_single
from dd.noise.model import NoiseModel
from dd.watch.divergence import DivergenceWatch, SharpnessWatch
from dd.watch.model_watch import ModelWatch

__all__ = ["StepWatches", "Unwatched"]


class StepWatches:
    """Follows training from step to step, where a step is of all samples, on one process."""

    def __init__(self) -> None:
        self._feedback: DivergenceWatch | None = None
        self._edge: SharpnessWatch | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen so far, between two steps."""
        watches = {"feedback": self._feedback, "edge": self._edge}
        return {key: watch.state_dict() for key, watch in watches.items() if watch is not None}

    def load_state_dict(self, state: Mapping[str, Any], noise: NoiseModel | None) -> None:
        """Go on from what :meth:`state_dict` returned.

        Args:
            state: of watches over the same training run.
            noise: its noise model.
        """
        if "feedback" in state and noise is not None:
            seen = state["feedback"]
            self._feedback = DivergenceWatch(
                noise.eigenvalues, noise.multiplicities, seen["samples"]
            )
            self._feedback.load_state_dict(seen)
        if "edge" in state:
            self._edge = SharpnessWatch()
            self._edge.load_state_dict(state["edge"])

    def observe(self, noise: NoiseModel | None, preactivation: Tensor) -> None:
        """Keep R, shape (n, k), of a training forward of all samples."""
        if noise is None:
            return
        if self._feedback is None:
            units = noise.units
            rows = len(preactivation) if units is None else round(units.effective_rows)
            self._feedback = DivergenceWatch(noise.eigenvalues, noise.multiplicities, rows)
        self._feedback.observe(preactivation)

    @property
    def looks(self) -> bool:
        """Whether steps are looked at, which waits for the device."""
        return self._edge is not None or (self._feedback is not None and self._feedback.looks)

    def look(
        self,
        gradient: Tensor,
        scale: float | Tensor,
        curvature: Tensor,
        settings: Mapping[str, Any],
    ) -> None:
        """Take a step of the decoupled layer into account.

        Args:
            gradient: G as delivered, shape (n, k).
            scale: what it is multiplied by.
            curvature: H, shape (k, k).
            settings: of the group that holds the decoupled weight.
        """
        watch = self._feedback
        if watch is not None and watch.looks:
            watch.look(scale * at_least_single(gradient), curvature, settings)

    def look_at_edge(self, curvature: Tensor, groups: Sequence[dict[str, Any]]) -> None:
        """Take a step of the shared parameters into account, with H_ψ, shape (p, p)."""
        if self._edge is None:
            self._edge = SharpnessWatch()
        self._edge.look(curvature, list(groups))

    def tell(self, oversight: ModelWatch) -> None:
        """Issue the warnings that are due, and leave a doubt for each."""
        for watch in (self._feedback, self._edge):
            # A warning may be an error, and the doubt remains.
            if watch is not None and watch.is_due:
                oversight.doubt("The correction feeds back on itself.")
                watch.tell()


class Unwatched(StepWatches):
    """Looks at nothing: what a step of another rule than SGD's does is not known to them."""

    def observe(self, noise: NoiseModel | None, preactivation: Tensor) -> None:
        """Keep nothing."""

    def look_at_edge(self, curvature: Tensor, groups: Sequence[dict[str, Any]]) -> None:
        """Take nothing into account."""
