"""What a step costs, in numbers that no clock enters."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dd.correction.attachment import Attachment
from dd.samples import repeated


def _product(total: Any, left: Any, right: Any, **other: Any) -> int:
    """Operations of a product of matrices of these shapes that is added to a third."""
    return 2 * math.prod(left) * right[-1]


# The counter knows products by the names of their out-of-place forms alone.
_IN_PLACE = {torch.ops.aten.addmm_: _product, torch.ops.aten.baddbmm_: _product}
# Operations that make the host wait for a device, or send it a number of its own.
_WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "item",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "unique_dim",
}


def operations(step: Callable[[], None]) -> int:
    """Floating-point operations of the matrix products of one step."""
    with FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as counter:
        step()
    return counter.get_total_flops()


def peak_bytes(make: Callable[[], Callable[[], None]], device: str, warm: int = 3) -> int:
    """Most bytes alive at once in a step, with all that model and optimizer keep.

    Args:
        make: builds model and optimizer, and returns what makes one step.
        device: where.
        warm: steps before the one that is looked at.
    """
    if torch.device(device).type == "cuda":
        return _peak_on_cuda(make, device, warm)
    holder: list[Callable[[], None]] = []

    def begin() -> None:
        holder.append(make())
        for _ in range(warm):
            holder[0]()

    before, _ = _allocated(begin)
    _, most = _allocated(holder[0])
    return before + most


def _peak_on_cuda(make: Callable[[], Callable[[], None]], device: str, warm: int) -> int:
    given = torch.cuda.memory_allocated(device)
    step = make()
    for _ in range(warm):
        step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - given


def _allocated(work: Callable[[], None]) -> tuple[int, int]:
    """Bytes that are alive after some work and were not before, and the most during it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    assert found.profiler is not None
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return alive, most


class _Waiting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and take it down where it waits."""
        name = func.overloadpacket.__name__
        if name in _WAITING:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def as_on_a_device() -> Iterator[None]:
    """Let optimizers on the CPU take themselves for ones on an accelerator."""
    with (
        patch.object(Attachment, "stalls", True),
        patch.object(repeated, "_changes_unseen", lambda inputs: False),
    ):
        yield


def host_reads(step: Callable[[], None]) -> list[str]:
    """The operations of one step for which the host would wait on an accelerator."""
    with _Waiting() as waiting:
        step()
    return waiting.seen
