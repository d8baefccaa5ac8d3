"""What the examples in docstrings begin with, in tests and in ``pytest --doctest-modules dd``."""

from typing import Any

import pytest
import torch
from torch import nn

import dd


@pytest.fixture
def doctest_namespace() -> dict[str, Any]:
    """Two Gaussian classes, and a network that has seen nothing of them; see ``help(dd)``."""
    torch.manual_seed(0)
    X, X_test = torch.randn(500, 50), torch.randn(2000, 50)
    y, y_test = torch.arange(500) % 2, torch.arange(2000) % 2
    for inputs, labels in ((X, y), (X_test, y_test)):
        inputs[:, 0] += 1.5 * (2 * labels - 1)
    names = {"torch": torch, "dd": dd, "X": X, "y": y, "X_test": X_test, "y_test": y_test}
    model = nn.Sequential(nn.Linear(50, 4), nn.Tanh(), nn.Linear(4, 2))
    return {**names, "model": model, "criterion": nn.CrossEntropyLoss()}
