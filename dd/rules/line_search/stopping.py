"""When training has stopped improving, and the best weights that it had."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dd.functional import at_least_single

__all__ = ["Outputs", "StopRule"]

SCORES, GRADIENT = "shadow_scores", "shadow_score_gradient"
CHANGE = "shadow_loss_change"

# Training stops after this many steps without an improvement of this many standard errors, and of
# this share of the first loss: samples that are all told apart have an error of next to nothing,
# beside which any improvement is large.
PATIENCE, STANDARD_ERRORS, SHARE = 5, 2.0, 1e-4


class Outputs:
    """What a module returns in one training forward, and the gradient that arrives there."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []
        self._gradients: dict[int, Tensor] = {}

    @contextmanager
    def watched(self, module: nn.Module) -> Iterator[None]:
        """Watch the forwards of a module for a while."""
        handle = module.register_forward_hook(self._watch)
        try:
            yield
        finally:
            handle.remove()

    def _watch(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return None
        return tree_map_only(Tensor, self._follow, output)

    def _follow(self, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        number = len(self._found)
        self._found.append(tensor.detach().clone())
        # One output may be made of another, whose own gradient would then count it twice.
        apart = tensor.view_as(tensor)
        apart.register_hook(lambda gradient: self._receive(number, gradient))
        return apart

    def _receive(self, number: int, gradient: Tensor) -> None:
        gradient = gradient.detach()
        earlier = self._gradients.get(number)
        self._gradients[number] = gradient if earlier is None else earlier + gradient

    @property
    def scores(self) -> Tensor:
        """Every number that a sample gets, shape (n, m)."""
        return self._joined([self._found[number] for number in sorted(self._gradients)])

    @property
    def gradient(self) -> Tensor:
        """∂L/∂scores, shape (n, m)."""
        return self._joined([self._gradients[number] for number in sorted(self._gradients)])

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(
            [at_least_single(tensor.reshape(len(tensor), -1)) for tensor in tensors], 1
        )

    def require(self, num_samples: int) -> None:
        """Check that every sample has its scores.

        Args:
            num_samples: n.

        Raises:
            RuntimeError: if the loss does not come from the module's output, or that has no row for
                each sample.
        """
        shapes = [tuple(self._found[number].shape) for number in sorted(self._gradients)]
        if not shapes or any(len(s) == 0 or s[0] != num_samples for s in shapes):
            found = ", ".join(map(str, shapes)) or "none"
            raise RuntimeError(
                'DecoupledDescent: stop="auto" follows the loss of every sample through what the '
                f"attached module returns, a tensor with one row for each of {num_samples} samples "
                f"from which the loss is computed; found outputs of shape {found}. Attach the "
                "module that computes the scores, or use stop=None"
            )


class StopRule:
    """Whether the tracked loss still improves by more than its own statistical error.

    A sample's loss changes by ½(e + e')·(f' − f) from one step to the next, f its scores and e the
    loss's derivative there, up to the third order of the step. Improvements are those of the mean
    loss since a step of reference; their standard error is that of the mean of the samples'
    changes. An improvement of more than two standard errors, and not of next to nothing, makes the
    present step the reference.

    Args:
        state: of the decoupled weight; keeps scores and changes.
        memory: of the policy; keeps plain numbers. Before its search there is nothing to stop, and
            what it passes before it is informed is not the best of anything.
    """

    def __init__(self, state: dict[str, Any], memory: dict[str, float]) -> None:
        self._state, self._memory = state, memory

    @property
    def stopped(self) -> bool:
        """Whether training has stopped."""
        return bool(self._memory.get("stopped"))

    def look(self, loss: float, outputs: Outputs) -> bool:
        """Take a step's state into account; return whether it is the best so far.

        Args:
            loss: the tracked loss of the state.
            outputs: of the forward that gave it.
        """
        memory = self._memory
        searching = bool(memory.get("searching"))
        scores, gradient = outputs.scores, outputs.gradient
        change = self._changed(scores, gradient)
        least = SHARE * abs(memory.setdefault("first", loss))
        needed = max(STANDARD_ERRORS * self.standard_error(change), least)
        if not searching or memory.get("reference", math.inf) - loss > needed:
            memory["reference"], memory["stalled"] = loss, 0.0
            change = torch.zeros_like(change)
        else:
            memory["stalled"] += 1
        memory["stopped"] = float(memory["stalled"] >= PATIENCE or bool(memory.get("lost")))
        self._state[SCORES], self._state[GRADIENT] = scores, gradient
        self._state[CHANGE] = change
        known = searching or bool(memory.get("informed"))
        best = known and loss < memory.get("best", math.inf)
        if best:
            memory["best"] = loss
        return best

    def _changed(self, scores: Tensor, gradient: Tensor) -> Tensor:
        """Change of every sample's loss since the reference, shape (n,)."""
        before = self._state.get(SCORES)
        if before is None or before.shape != scores.shape:
            return scores.new_zeros(len(scores))
        moved = (self._state[GRADIENT] + gradient) * (scores - before)
        change: Tensor = self._state[CHANGE] + len(scores) / 2 * moved.sum(1)
        return change

    @staticmethod
    def standard_error(change: Tensor) -> float:
        """Standard error of the mean of samples' changes, shape (n,)."""
        return float(change.std()) / math.sqrt(len(change)) if len(change) > 1 else 0.0
