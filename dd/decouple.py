"""The correction beside any optimizer, whose steps stay its own."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from dd.correction.attachment import Attachment
from dd.correction.hook import Forward
from dd.correction.optimizer_state import OptimizerState
from dd.correction.saved_state import bind_samples
from dd.correction.tracker import Tracker
from dd.correction.training_forward import TrainingForward
from dd.curvature.estimators import Stein
from dd.noise.model import NoiseModel
from dd.rules.averaged_weights import AveragedWeights
from dd.rules.decoupled_optimizers import owner_of
from dd.rules.outside_step import OutsideMoves
from dd.rules.response import Response
from dd.rules.response_shadows import ResponseShadows
from dd.rules.response_step import ResponseStep, require_unmoved
from dd.rules.settings import check_settings
from dd.rules.shared_steps import SharedSteps
from dd.rules.step_hooks import StepHooks
from dd.support.user_warning import warn_user
from dd.watch.response_watch import (
    LARGEST_SHADOWS,
    ResponseWarning,
    few_directions_message,
    optimizer_message,
    regression_message,
    units_message,
)
from dd.watch.step_watches import Unwatched

__all__ = ["ErrorTracker", "decouple"]

_STATE_KEYS = ("layer", "optimizer", "state", "shared", "averages", "response", "oversight")


def decouple(
    model: nn.Module,
    *optimizers: torch.optim.Optimizer,
    layer: nn.Module | str | None = None,
    noise: NoiseModel | None = None,
    curvature: str = "auto",
    head: bool | nn.Module | str = False,
    seed: int = 0,
    process_group: Any = None,
) -> "ErrorTracker":
    """Make the training error of a model estimate its test error, whatever optimizer trains it.

    In train mode the decoupled layer's output becomes R = XW + Q, where the shadow Q removes from
    each sample the imprint that it left on the weights. How an imprint moves is identified from
    each step that the optimizer makes (section 11 of ``docs/theory.md``). Hooks on the layer and on
    the optimizer's own step do it: the loop stays as it is, and so do the optimizers.

    Args:
        model: is trained.
        *optimizers: all that train it; exactly one holds the decoupled weight.
        layer: as in :class:`dd.DecoupledDescent`.
        noise: as in :class:`dd.DecoupledDescent`.
        curvature: as in :class:`dd.DecoupledDescent`, but that ``"auto"`` is ``"stein"`` where
            ``noise`` knows the components: it makes up for errors of a response that was found by
            regression. It takes the inputs to be Gaussian within them, and says where they are not.
        head: as in :class:`dd.DecoupledDescent`, but for ``"auto"``: True corrects the head, the
            biases and the layer along the component means for their own over-fitting, where SGD,
            Adam or another of torch's optimizers with a derivative moves them.
        seed: of the curvature probes.
        process_group: as in :class:`dd.DecoupledDescent`.

    Returns:
        What the corrected error is asked of. The optimizer's hooks keep it alive.

    Raises:
        ValueError: if no optimizer holds the decoupled weight or several do, one cannot be
            followed, or an argument is out of range.
        TypeError: if what is given is no module or no optimizer.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.99))
        >>> tracker = dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X, y))
        >>> for step in range(30):
        ...     optimizer.zero_grad()
        ...     train_loss = criterion(model(X), y)
        ...     train_loss.backward()
        ...     optimizer.step()
        >>> test_loss = criterion(model.eval()(X_test), y_test)
        >>> bool((train_loss - test_loss).abs() < 0.05)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"dd.decouple: expected a module first, got {type(model).__name__}")
    check_settings(1.0, curvature, process_group)
    if head == "auto":
        raise ValueError(
            'dd.decouple: head="auto" is for dd.DecoupledDescent; expected True, False, the layer '
            "or its name"
        )
    if curvature == "auto":
        knows = noise is not None and noise.components is not None
        curvature = "stein" if knows else "probe"
    attachment = Attachment(
        model,
        layer,
        noise,
        curvature,
        head,
        process_group=process_group,
        shadows=ResponseShadows(),
    )
    return ErrorTracker(attachment, optimizers, seed)


class ErrorTracker(Tracker):
    """What :func:`decouple` returns.

    Args:
        attachment: the bond to the model.
        optimizers: all that train it; exactly one holds the decoupled weight.
        seed: of the curvature probes.

    Raises:
        ValueError: as :func:`decouple`.
        TypeError: likewise.

    Example:
        >>> optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01)
        >>> tracker = dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X, y))
        >>> for step in range(20):
        ...     optimizer.zero_grad()
        ...     criterion(model(X), y).backward()
        ...     optimizer.step()
        >>> wrong = lambda batch: (model(batch[0]).argmax(1) != batch[1]).float()
        >>> print(tracker.estimate([(X, y)], wrong))  # of the test error
        0... (90 %: 0.0... to 0..., n = 500)
    """

    def __init__(
        self, attachment: Attachment, optimizers: Sequence[torch.optim.Optimizer], seed: int
    ) -> None:
        self._optimizer, followed = owner_of(attachment, optimizers)
        self._seed, self._has_told = int(seed), False
        self._state: dict[Tensor, dict[str, Any]] = defaultdict(dict)
        self._followed = followed
        self._averages: list[AveragedWeights] = []
        self._groups: list[dict[str, Any]] = []
        self._see_groups()
        self._shared = None
        if attachment.shared is not None:
            self._shared = SharedSteps(attachment, self._store(), followed)
        self._rule = ResponseStep(attachment, self._store(), self._optimizer, self._shared)
        self._moves = OutsideMoves(attachment, self._store(), self._optimizer)
        attachment.oversight.expect_shadows_below(LARGEST_SHADOWS)
        attachment.register(self._correct, self._correct_scores)
        self._hooks = self._hooks_on(followed)
        for hooks in self._hooks:
            attachment.let_go_with(hooks)
        self._attachment: Attachment | None = attachment
        self._tell(attachment, optimizer_message(self._optimizer))

    @property
    def response(self) -> Response | None:
        """How the optimizer answered in its last step, or None before the first.

        Example:
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            >>> tracker = dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X, y))
            >>> criterion(model(X), y).backward()
            >>> optimizer.step()
            >>> tracker.response.exact
            True
        """
        return self._rule.response

    @_disable_dynamo
    def average(self, module: nn.Module) -> Tracker:
        """Track the error of a running average of the weights too.

        Args:
            module: a copy of the model as it is now that will hold the average, such as
                ``torch.optim.swa_utils.AveragedModel(model)``. Update it after steps, at most once
                for each.

        Returns:
            What ``evaluate``, ``estimate`` and ``predict`` of the average are asked of; a step
            with mini-batches then brings all samples up to date.

        Raises:
            ValueError: if detached, or the module is no copy of the model, or the head is
                corrected.

        Example:
            >>> from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
            >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            >>> tracker = dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X, y))
            >>> averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
            >>> average = tracker.average(averaged)
            >>> for step in range(30):
            ...     optimizer.zero_grad()
            ...     criterion(model(X), y).backward()
            ...     optimizer.step()
            ...     averaged.update_parameters(model)
            >>> tracked = average.evaluate([(X, y)], lambda b: criterion(averaged(b[0]), b[1]))
            >>> test_loss = criterion(averaged.eval()(X_test), y_test)
            >>> bool((tracked - test_loss).abs() < 0.05)
            True
        """
        attachment = self._required("average()")
        if self._shared is not None:
            raise ValueError(
                "dd.decouple: average() follows the decoupled layer alone; use head=False"
            )
        self._settle()
        found = AveragedWeights(attachment, self._store(), module)
        self._averages.append(found)
        return found

    def detach(self) -> None:
        """Remove every trace from model and optimizer.

        Example:
            >>> optimizer = torch.optim.AdamW(model.parameters())
            >>> tracker = dd.decouple(model, optimizer)
            >>> tracker.detach()
            >>> print(tracker.layer)
            None
        """
        attachment = self._attachment
        if attachment is None:
            return
        attachment.remove()
        for average in self._averages:
            average.detach()
        self._averages.clear()
        self._attachment = None
        self._state.clear()
        self._rule.drop()

    @_disable_dynamo
    def drop_forward(self) -> None:
        """Forget training forwards that will get no step, after a skipped or interrupted one.

        Example:
            >>> optimizer = torch.optim.AdamW(model.parameters())
            >>> tracker = dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X, y))
            >>> criterion(model(X), y).backward()
            >>> tracker.drop_forward()
        """
        super().drop_forward()
        self._rule.drop()

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on, beside the states of model and optimizers.

        Raises:
            ValueError: if detached.

        Example:
            >>> optimizer = torch.optim.AdamW(model.parameters())
            >>> tracker = dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X, y))
            >>> criterion(model(X), y).backward()
            >>> optimizer.step()
            >>> sorted(tracker.state_dict())
            ['averages', 'layer', 'optimizer', 'oversight', 'response', 'shared', 'state']
        """
        attachment = self._required("state_dict()")
        self._settle()
        state = self._store().of(attachment.weight)
        return {
            "layer": _plain(attachment.name),
            "optimizer": type(self._optimizer).__name__,
            "state": {
                key: value.clone() if isinstance(value, Tensor) else value
                for key, value in state.items()
            },
            "shared": {} if self._shared is None else self._shared.state_dict(),
            "averages": [average.state_dict() for average in self._averages],
            "response": self._rule.identifier.state_dict(),
            "oversight": attachment.oversight.state_dict(),
        }

    @_disable_dynamo
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned; load model and optimizers as well.

        Args:
            state_dict: of a tracker of the same layer, optimizer and samples.

        Raises:
            ValueError: if it is of another layer, optimizer or of other samples.

        Example:
            >>> optimizer = torch.optim.AdamW(model.parameters())
            >>> tracker = dd.decouple(model, optimizer, noise=dd.NoiseModel.fit(X, y))
            >>> criterion(model(X), y).backward()
            >>> optimizer.step()
            >>> saved = tracker.state_dict()
            >>> tracker.load_state_dict(saved)
            >>> torch.equal(tracker.shadow, saved["state"]["shadow"])
            True
        """
        attachment = self._required("load_state_dict()")
        missing = [key for key in _STATE_KEYS if key not in state_dict]
        if missing:
            raise ValueError(
                f"dd.decouple: the state lacks {', '.join(missing)}; expected what a tracker's "
                "state_dict() returned"
            )
        own = {"layer": _plain(attachment.name), "optimizer": type(self._optimizer).__name__}
        for key, value in own.items():
            if _plain(state_dict[key]) != value:
                raise ValueError(
                    f"dd.decouple: the state is of {key} {state_dict[key]!r}, this tracker of "
                    f"{value!r}; load it into a tracker of the same kind"
                )
        if (self._shared is None) != (not state_dict["shared"]):
            raise ValueError(
                "dd.decouple: the state is of a tracker with another head=; load it into one of "
                "the same"
            )
        if len(self._averages) != len(state_dict["averages"]):
            raise ValueError(
                f"dd.decouple: the state follows {len(state_dict['averages'])} averages, this "
                f"tracker {len(self._averages)}; call average() for each before loading"
            )
        attachment.forget()
        self._rule.drop()
        weight = attachment.weight
        self._state[weight] = {
            key: value.to(weight.device, copy=True) if isinstance(value, Tensor) else value
            for key, value in state_dict["state"].items()
        }
        if self._shared is not None:
            self._shared.load_state_dict(state_dict["shared"])
        for average, state in zip(self._averages, state_dict["averages"], strict=True):
            average.load_state_dict(state)
        self._rule.identifier.load_state_dict(state_dict["response"])
        attachment.oversight.load_state_dict(state_dict["oversight"])
        bind_samples(attachment, self._state[weight])

    def _hooks_on(self, optimizers: Sequence[torch.optim.Optimizer]) -> list[StepHooks]:
        """Hooks on the optimizer of the decoupled weight, and on those of a corrected head."""
        hooks, shared = (
            [StepHooks(self._optimizer, self._before_step, self._after_step)],
            self._shared,
        )
        if shared is None:
            return hooks
        beside = (o for o in optimizers if o is not self._optimizer and shared.holds(o))
        calls = ((o, partial(shared.before, o), partial(shared.after, o)) for o in beside)
        return [*hooks, *(StepHooks(*call) for call in calls)]

    def _before_step(self) -> None:
        for average in self._averages:
            average.follow()
        self._rule.before()
        if self._shared is not None:
            self._shared.before(self._optimizer)

    def _after_step(self) -> None:
        self._rule.after()
        if self._shared is not None:
            self._shared.after(self._optimizer)
        self._moves.remember()
        attachment, response = self._attachment, self._rule.response
        if attachment is None or response is None or self._has_told:
            return
        noise = attachment.noise
        rank = float("inf") if noise is None else noise.effective_rank
        if not self._rule.identifier.regresses:
            if response.across_units:
                self._has_told = True
                self._tell(attachment, few_directions_message(self._optimizer, rank))
            return
        self._has_told = True
        by_stein = isinstance(attachment.estimator, Stein)
        weight = attachment.weight
        message = regression_message(self._optimizer, weight, rank, by_stein=by_stein)
        if noise is not None and noise.units is not None:
            message = units_message(self._optimizer)
        self._tell(attachment, message)

    def _tell(self, attachment: Attachment, message: str | None) -> None:
        if message is None:
            return
        # First, as a warning may be an error.
        attachment.oversight.doubt("The optimizer's response is followed coarsely.")
        warn_user(message, ResponseWarning)

    def _correct(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> Tensor | None:
        attachment = self._attachment
        if attachment is None or layer is not attachment.layer:
            return super()._correct(layer, inputs, output)
        for hooks in self._hooks:
            hooks.forward_begins()
        self._see_groups()
        state = self._store().of(attachment.weight)
        if state.get("shadow") is None:
            require_unmoved(self._optimizer, attachment)
        self._moves.follow()
        before = attachment.pending[-1:]
        result = super()._correct(layer, inputs, output)
        # Of the pending ones some may have been given up.
        if attachment.pending and attachment.pending[-1:] != before:
            attachment.pending[-1].inputs = inputs.detach()
        return result

    def _settle(self) -> None:
        super()._settle()
        if self._attachment is not None:
            self._moves.follow()

    def _see_groups(self) -> None:
        # A group may be added at any time.
        self._groups[:] = [g for optimizer in self._followed for g in optimizer.param_groups]

    def _forward(self) -> Forward | None:
        attachment = self._attachment
        if attachment is None:
            return None
        return TrainingForward(attachment, self._store(), Unwatched(), self._seed, defers=False)

    def _store(self) -> OptimizerState:
        return OptimizerState(self._state, self._groups)


def _plain(name: str) -> str:
    """A dotted name without the parts that torch.compile and DistributedDataParallel put in."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module"))
