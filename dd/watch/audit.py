"""Now and then, Stein's curvature against a probe: where its lemma fails must be noticed."""

import contextlib
import os
import sys
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_map_only

from dd.curvature.custom import CurvatureWarning
from dd.curvature.estimators import Stein
from dd.curvature.transparent_tensor import TransparentTensor
from dd.functional import (
    kink_signs,
    kink_terms,
    rademacher,
    scaled_by_mass,
    stein_excess,
    stein_mismatch,
)
from dd.noise.units import Units
from dd.samples.placement import Placement
from dd.support.user_warning import warn_user
from dd.watch.audit_result import AuditResult, of_ids, of_matrices, one_row_is_pushed

__all__ = [
    "Audit",
    "AuditedForward",
    "AuditedTensor",
    "ComponentWarning",
    "CurvatureWarning",
    "is_due",
    "is_safe",
]

_COMPILER = os.path.join("_dynamo", "eval_frame.py")
_PAUSE = os.path.join("torch", "_compile.py")


# With fewer rows a unit the inverses of K and VᵀV are too uncertain for errors to first order.
ROWS_A_UNIT = 8


class ComponentWarning(CurvatureWarning):
    """The component ids of the noise model are not the mixture components of the inputs.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", dd.ComponentWarning)  # end such a run at once
        >>> noise = dd.NoiseModel.isotropic(3 * X, torch.zeros_like(y))  # one id for two clusters
        >>> optimizer = dd.DecoupledDescent(model, lr=0.5, noise=noise, curvature="stein")
        >>> for step in range(5):
        ...     optimizer.zero_grad()
        ...     criterion(model(3 * X), y).backward()
        ...     optimizer.step()
        Traceback (most recent call last):
            ...
        dd.watch.audit.ComponentWarning: DecoupledDescent: at training forward ...
    """


def is_due(forward: int) -> bool:
    """Whether a training forward is audited: number 1, 2, 5, 10, 20, 50, 100 and so on."""
    return str(forward).rstrip("0") in {"1", "2", "5"}


def is_safe(module: nn.Module) -> bool:
    """Whether one more pass through the graph of ``module`` would go unnoticed.

    It would not where hooks see gradients, processes exchange them, the graph is compiled, or a
    forward-mode level is open.
    """
    hooked = any(
        m._backward_hooks or m._backward_pre_hooks or m._compiled_call_impl is not None
        for m in module.modules()
    )
    hooked |= any(type(m).__name__ == "OptimizedModule" for m in module.modules())
    hooked |= _is_called_compiled()
    hooked |= bool(nn.modules.module._global_backward_hooks)
    hooked |= bool(nn.modules.module._global_backward_pre_hooks)
    level = torch.autograd.forward_ad._current_level >= 0
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not (hooked or level or parallel or torch.is_anomaly_enabled())


class AuditedTensor(TransparentTensor):
    """A tensor that leads from an audited pre-activation to the loss and to its backward.

    The graph of the forward is that of a plain tensor. Right before the backward pass the pending
    audits differentiate it twice; the backward pass itself is the one that would have run.
    """

    @classmethod
    def _run(cls, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Run ``func``, and the audits before a backward pass."""
        if torch.compiler.is_compiling():
            return super()._run(func, types, args, kwargs)
        return cls._run_watched(func, types, args, kwargs)

    # A backward pass called from a compiled function must not compile the audits.
    @classmethod
    @_disable_dynamo
    def _run_watched(cls, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func in SEES_GRADIENTS or _recomputes():
            Audit.abandon_all()
        if any(not issubclass(cls, kind) for kind in types):
            # Another subclass decides what becomes of a mixed operation.
            Audit.abandon_all()
            args, kwargs = tree_map_only(cls, _plain, (args, kwargs))
            return func(*args, **kwargs)
        if func is Tensor.backward:
            Audit.run_all(_plain(args[0]), ordinary=_is_ordinary(*args, **kwargs))
        return super()._run(func, types, args, kwargs)


SEES_GRADIENTS = {
    Tensor.register_hook,
    Tensor.retain_grad,
    Tensor.register_post_accumulate_grad_hook,
}


class AuditedForward(Protocol):
    """A training forward as an audit takes it."""

    @property
    def placement(self) -> Placement:
        """The samples of its batch."""

    @property
    def node(self) -> Any:
        """Node of R in the autograd graph."""

    def undisturbed(self) -> AbstractContextManager[tuple[Tensor, GradientEdge]]:
        """Let gradients pass by R uncounted; yields what was observed, and R's place."""


class Audit:
    """One training forward under audit.

    Args:
        capture: the forward.
        estimator: its estimator of the curvature.
        relative_mass: noise mass of each row over the mean, shape (m,), or None.
        units: rows that share noise, or None.
        leaky: whether kinks at 0 may be other than a ReLU's.
        seed: of the probe; the global generators are left alone.
        forward: number of the forward.
        report: is called where the curvature was found to be wrong.
    """

    _pending: ClassVar["weakref.WeakSet[Audit]"] = weakref.WeakSet()

    def __init__(
        self,
        capture: AuditedForward,
        estimator: Stein,
        relative_mass: Tensor | None,
        seed: int,
        forward: int,
        report: Callable[[], None],
        *,
        units: Units | None = None,
        leaky: bool = False,
    ) -> None:
        self._units = units
        self._capture = weakref.ref(capture)
        self._estimator, self._relative_mass, self._leaky = estimator, relative_mass, leaky
        self._seed, self._forward, self._report = seed, forward, report
        Audit._pending.add(self)

    @staticmethod
    def abandon_all() -> None:
        """Give up every pending audit."""
        Audit._pending.clear()

    @staticmethod
    def run_all(loss: Tensor, *, ordinary: bool) -> None:
        """Run the pending audits of a loss that is about to be differentiated."""
        captures = [audit._capture() for audit in Audit._pending]
        # What lies behind R is not differentiated twice.
        nodes = _nodes(loss, {capture.node for capture in captures if capture is not None})
        # Behind a custom node stands Python or a compiled region, which might count its calls.
        if not ordinary or any(isinstance(node, BackwardCFunction) for node in nodes):
            Audit.abandon_all()
        for audit in list(Audit._pending):
            capture = audit._capture()
            # One loss of several may lead elsewhere.
            if capture is not None and capture.node in nodes:
                Audit._pending.discard(audit)
                audit._run(loss)

    def _run(self, loss: Tensor) -> None:
        found = AuditResult()
        # An operation without second derivative is none of the user's concern.
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = self._measure(loss)
        told, falls_back = (self._forward, found), self._estimator.may_fall_back
        if found.are_wrong_ids(self._forward):
            self._report()
            warn_user(of_ids(*told, falls_back=falls_back), ComponentWarning)
        elif found.are_apart:
            self._report()
            warn_user(of_matrices(*told, falls_back=falls_back), CurvatureWarning)

    def _measure(self, loss: Tensor) -> AuditResult:
        """Hold Stein's curvature against a probe's."""
        capture = self._capture()
        assert capture is not None
        with capture.undisturbed() as (observed, edge):
            (gradient,) = torch.autograd.grad(loss, edge, create_graph=True)
            generator = torch.Generator(gradient.device).manual_seed(self._seed)
            probe = rademacher(gradient.detach(), generator)
            (product,) = torch.autograd.grad(gradient, edge, probe, retain_graph=True)
        with torch.no_grad():
            index, unit = capture.placement.index, None
            rows = observed, gradient.detach(), probe, product
            if self._units is None:
                # Stein's lemma weighs every sample by its noise mass.
                mass = self._relative_mass
                rows = (*rows[:3], scaled_by_mass(product, mass))
            else:
                rows, index, unit = self._of_units(self._units, index, rows)
                mass = self._units.mass[index]
            return self._compared(rows, index, mass, unit)

    def _compared(
        self,
        rows: tuple[Tensor, Tensor, Tensor, Tensor],
        index: Tensor | None,
        mass: Tensor | None,
        unit: Tensor | None,
    ) -> AuditResult:
        """Both comparisons.

        Args:
            rows: R, G, V and the products, each of shape (m, k).
            index: of the rows, shape (m,); None for all.
            mass: of each over the mean, shape (m,), or None.
            unit: of each, from 0, shape (m,), where rows of one are not independent.
        """
        observed, gradient, probe, product = rows
        estimator = self._estimator
        centred = estimator.centred(observed, index)
        excess = stein_excess(centred, gradient, probe, product, unit)
        count = len(centred) if unit is None else int(unit.max()) + 1
        # Where rows tie for a maximum a probe is no yardstick.
        is_blind = unit is not None and one_row_is_pushed(gradient, unit)
        if is_blind or count < ROWS_A_UNIT * centred.shape[1]:
            share, errors = (float(value) for value in excess)
            return AuditResult(share, errors, is_blind=is_blind)
        signs = kink_signs(observed, gradient)
        kinks = kink_terms(observed, gradient, signs, mass, leaky=self._leaky)
        around, ridge = estimator.centred(gradient, index), estimator.ridge
        mismatch = stein_mismatch(centred, around, probe, product, kinks, ridge, unit=unit)
        return AuditResult(*torch.stack([*excess, *mismatch]).tolist())

    def _of_units(
        self, units: Units, index: Tensor | None, rows: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]:
        """The rows that are more than padding, which these are, and of which unit each is."""
        observed, gradient, probe, product = rows
        product = units.weighted(product, index)
        if index is None:
            index = torch.arange(units.count, device=observed.device)
        there = units.has_noise[index]
        index = index[there]
        unit = torch.unique(units.unit[index], return_inverse=True)[1]
        return (observed[there], gradient[there], probe[there], product[there]), index, unit


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)


def _is_ordinary(
    loss: Tensor,
    gradient: Any = None,
    retain_graph: Any = None,
    create_graph: Any = False,
    inputs: Any = None,
) -> bool:
    return loss.dim() == 0 and gradient is None and not create_graph and inputs is None


def _recomputes() -> bool:
    # Activation checkpointing would run parts of the forward once more.
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def _is_called_compiled() -> bool:
    """Whether a compiled function is on the stack, beside the pause that our own hook makes."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_back
        pause = caller is not None and caller.f_code.co_filename.endswith(_PAUSE)
        if frame.f_code.co_filename.endswith(_COMPILER) and not pause:
            return True
        frame = caller
    return False


def _nodes(loss: Tensor, ends: set[Any]) -> set[Any]:
    """Every node of the graph behind a loss, up to some ends."""
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if node not in ends:
                waiting.extend(parent for parent, _ in node.next_functions)
    return seen
