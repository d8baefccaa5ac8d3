"""Numbers of numpy as Python's own, which ``torch.load(weights_only=True)`` reads."""

from typing import Any

import numpy as np
import torch

__all__ = ["PlainGroups", "as_plain"]


def as_plain(value: Any) -> Any:
    """Return a value in which numpy's scalars are Python's, in dicts, lists and tuples too.

    Whatever else there is, tensors for one, is returned as it is; an array of more than one number
    becomes a list.
    """
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, dict):
        return {as_plain(key): as_plain(item) for key, item in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(as_plain(item) for item in value)
    return value


class PlainGroups(torch.optim.Optimizer):
    """An optimizer whose parameter groups, and so its state, hold no numbers of numpy."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; numbers of numpy become Python's.

        Args:
            param_group: as in ``torch.optim.SGD``.

        Example:
            >>> import numpy as np
            >>> optimizer = dd.DecoupledDescent(model[0].parameters(), lr=0.5)
            >>> rate = np.geomspace(0.1, 0.001, 3)[1]
            >>> optimizer.add_param_group({"params": list(model[-1].parameters()), "lr": rate})
            >>> type(optimizer.param_groups[1]["lr"])
            <class 'float'>
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.update({key: as_plain(value) for key, value in group.items() if key != "params"})

    def state_dict(self) -> dict[str, Any]:
        """Return the state; numbers of numpy that schedulers left in its groups become Python's."""
        state = super().state_dict()
        state["param_groups"] = [as_plain(group) for group in state["param_groups"]]
        return state
