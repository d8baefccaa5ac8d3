"""Whether a step may be made: known at once, or later where asking would stall the device."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

__all__ = ["DeferredChecks"]

# Makes the error of some flags of which not all are up.
Explain = Callable[[list[bool]], Exception]


@dataclass(eq=False)
class _Step:
    """The flags of one step, in the order in which they were raised."""

    number: int
    flags: list[Tensor] = field(default_factory=list)
    explain: list[Explain] = field(default_factory=list)
    on_host: Tensor | None = None
    arrival: Any = None

    def send(self) -> None:
        """Start the flags on their way to the host."""
        flags = torch.cat(self.flags)
        if not flags.is_cuda:
            self.on_host = flags
            return
        self.on_host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        self.on_host.copy_(flags, non_blocking=True)
        self.arrival = torch.cuda.Event()
        self.arrival.record(torch.cuda.current_stream(flags.device))

    def has_arrived(self, *, wait: bool) -> bool:
        if self.arrival is None:
            return True
        if wait:
            self.arrival.synchronize()
        return self.arrival.query()

    def error(self) -> Exception | None:
        """What the first flag that is down says."""
        assert self.on_host is not None
        known = iter(self.on_host.tolist())
        for flags, explain in zip(self.flags, self.explain, strict=True):
            some = list(islice(known, len(flags)))
            if not all(some):
                return explain(some)
        return None


class DeferredChecks:
    """Conditions of the steps of one optimizer.

    To look at a number on an accelerator waits for all work queued before it. So a condition may be
    left there as a flag: a step of which one flag is down must change nothing, which is for
    :attr:`refusal` to see to, and its error is raised by a later call, once the flags have come.
    """

    def __init__(self) -> None:
        self._now: _Step | None = None
        self._sent: list[_Step] = []

    @property
    def defers(self) -> bool:
        """Whether the conditions of the present step are told later."""
        return self._now is not None

    def defer(self, number: int) -> None:
        """Leave the conditions of a step for later, from here on.

        Args:
            number: of the step, for its errors.
        """
        if self._now is None:
            self._now = _Step(number)

    def withdraw(self) -> None:
        """Forget the conditions of a step that will not be made."""
        self._now = None

    def require(self, condition: Tensor, explain: Explain) -> None:
        """Require that all of some flags are up.

        Args:
            condition: bool, of any shape.
            explain: makes the error of the flags, flattened, if one is down.

        Raises:
            Exception: what ``explain`` made, where the answer is not left for later.
        """
        flags = condition.detach().reshape(-1)
        if self._now is not None:
            self._now.flags.append(flags)
            self._now.explain.append(explain)
            return
        known = flags.tolist()
        if not all(known):
            raise explain(known)

    @property
    def refusal(self) -> Tensor | None:
        """1 where the present step must change nothing, else 0, shape (); None where that is known.

        As ``found_inf`` of torch's fused optimizers.
        """
        if self._now is None or not self._now.flags:
            return None
        return 1.0 - torch.cat(self._now.flags).all().float()

    def end(self) -> None:
        """End a step whose conditions are all named; those of the next are told at once."""
        step, self._now = self._now, None
        if step is not None and step.flags:
            step.send()
            self._sent.append(step)

    def settle(self, *, wait: bool = False) -> None:
        """Raise the error of an earlier step, if one has become known.

        Args:
            wait: for the flags that are still on their way.

        Raises:
            Exception: of the first step that was refused.
        """
        while self._sent and self._sent[0].has_arrived(wait=wait):
            step = self._sent.pop(0)
            error = step.error()
            if error is not None:
                message = f"{error} (Found at step {step.number}, which changed nothing.)"
                raise type(error)(message)
