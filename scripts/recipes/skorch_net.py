"""Decoupled descent in a skorch net: the training error of its table estimates the test error.

python scripts/recipes/skorch_net.py                    # decoupled descent
python scripts/recipes/skorch_net.py --plain            # plain SGD
python scripts/recipes/skorch_net.py --adamw            # AdamW and dd.decouple
python scripts/recipes/skorch_net.py --adamw --plain    # plain AdamW
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.datasets import make_blobs
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback, EpochScoring
from torch import Tensor, nn

import dd

BATCH_SIZE = 200


class TwoLayer(nn.Module):
    """A two-layer classifier."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(dimension, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, X: Tensor) -> Tensor:
        """Return the scores."""
        return self.network(X)


class Decoupling(Callback):
    """Shows the module to the optimizer, to which skorch gives its parameters alone."""

    followed = None

    def on_train_begin(self, net: NeuralNetClassifier, X: np.ndarray, y: np.ndarray) -> None:
        """Attach the optimizer to the first linear layer."""
        # A second partial_fit goes on with the optimizer of the first.
        if net.optimizer_ is self.followed:
            return
        self.followed = optimizer = net.optimizer_
        noise = dd.NoiseModel.fit(torch.from_numpy(X), torch.from_numpy(y))
        if isinstance(optimizer, dd.DecoupledDescent):
            optimizer.attach(net.module_, noise=noise)
        else:
            dd.decouple(net.module_, optimizer, noise=noise)


def main(arguments: Sequence[str] | None = None) -> tuple[nn.Module, float, float]:
    """Train; print and return the training and the test error, after the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adamw", action="store_true", help="train by AdamW, not SGD")
    parser.add_argument("--plain", action="store_true", help="train without correction")
    parser.add_argument("--samples", type=int, default=2000, help="training samples")
    parser.add_argument("--dimension", type=int, default=500, help="inputs of a sample")
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    n, d = options.samples, options.dimension
    X, y = make_blobs(n + 2000, d, centers=4, center_box=(-0.15, 0.15), random_state=0)
    X = X.astype(np.float32)

    def error(net: NeuralNetClassifier, X: Any, y: np.ndarray) -> float:
        return float(np.mean(net.predict(X) != y))

    by_sgd = torch.optim.SGD if options.plain else dd.DecoupledDescent
    decoupling = [] if options.plain else [Decoupling()]
    net = NeuralNetClassifier(
        TwoLayer,
        module__dimension=d,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW if options.adamw else by_sgd,
        lr=3e-3 if options.adamw else 0.2,
        batch_size=BATCH_SIZE,
        iterator_train__shuffle=True,
        max_epochs=options.epochs,
        train_split=None,
        callbacks=[*decoupling, EpochScoring(error, name="train_error", on_train=True)],
    )
    net.fit(X[:n], y[:n])
    train_error, test_error = net.history[-1, "train_error"], error(net, X[n:], y[n:])
    print(f"train error {train_error:.3f}, test error {test_error:.3f}")
    return net.module_, train_error, test_error


if __name__ == "__main__":
    main()
