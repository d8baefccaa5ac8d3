"""Warnings that point at the user's own line."""

import os
import sys
import warnings

import torch

__all__ = ["warn_user"]

_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_INTERNAL = tuple(path + os.sep for path in (_PACKAGE, os.path.dirname(torch.__file__)))


def warn_user(message: str, category: type[Warning]) -> None:
    """Issue a warning at the innermost line outside of this package and of torch.

    Args:
        message: the sentence.
        category: kind of the warning.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
