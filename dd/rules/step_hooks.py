"""What is called around an optimizer's own step."""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["StepHooks", "inner_optimizer"]


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that makes the steps, of one that hands them on, as accelerate's does."""
    found = optimizer
    while isinstance(inner := getattr(found, "optimizer", None), torch.optim.Optimizer):
        found = inner
    return found


class StepHooks:
    """Calls a method before and another after each step of an optimizer, by its own hooks.

    A closure runs first, and once.

    Args:
        optimizer: is stepped.
        before: called where all gradients of the step are there and nothing has moved.
        after: called where the step is made.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        before: Callable[[], None],
        after: Callable[[], None],
    ) -> None:
        self._before, self._after = before, after
        self._depth, self._is_due, self._runs_closure = 0, False, False
        self._handles = [
            optimizer.register_step_pre_hook(self._enter),
            optimizer.register_step_post_hook(self._leave),
        ]

    def remove(self) -> None:
        """Leave the optimizer alone."""
        for handle in self._handles:
            handle.remove()

    def forward_begins(self) -> None:
        """Forget a step that an exception has ended, as a forward outside of any begins."""
        if not self._runs_closure:
            self._depth = 0

    def _enter(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # An optimizer's step may call that of its base class, which has hooks of its own.
        self._depth += 1
        if self._depth > 1:
            return None
        try:
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if closure is None:
                self._call_before()
                return None
            self._is_due = False
            if len(args) > 1:
                return (args[0], self._once(closure), *args[2:]), kwargs
            return args, {**kwargs, "closure": self._once(closure)}
        except BaseException:
            self._depth = 0
            raise

    def _leave(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        self._depth = 0
        if not self._is_due:
            raise RuntimeError(
                "dd.decouple: step(closure) never called its closure, so that it is not known "
                "what the optimizer saw; call backward() before step() without a closure"
            )
        self._is_due = False
        self._after()

    def _call_before(self) -> None:
        self._before()
        self._is_due = True

    def _once(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluated() -> Any:
            if self._is_due:
                raise RuntimeError(
                    "dd.decouple: the optimizer evaluates its closure more than once a step, as "
                    "line searches do; a step that depends on several gradients cannot be "
                    "followed. Use an optimizer of one gradient a step, or "
                    'dd.DecoupledDescent(model, lr="auto"), which searches'
                )
            self._runs_closure = True
            try:
                loss = closure()
            finally:
                self._runs_closure = False
            self._call_before()
            return loss

        return evaluated
