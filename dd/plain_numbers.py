"""Numbers of numpy as Python's own."""

from typing import Any

import numpy as np

__all__ = ["as_plain"]


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
