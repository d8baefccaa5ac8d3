"""Muon and AdamW in a plain loop, followed by dd.decouple: the training error is an estimate.

python scripts/recipes/muon_and_adamw.py            # followed
python scripts/recipes/muon_and_adamw.py --plain    # as they are
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import make_blobs
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dd

BATCH_SIZE = 200


def main(arguments: Sequence[str] | None = None) -> tuple[nn.Module, float, float]:
    """Train; print and return the training and the test error, after the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", action="store_true", help="train without correction")
    parser.add_argument("--samples", type=int, default=2000, help="training samples")
    parser.add_argument("--dimension", type=int, default=500, help="inputs of a sample")
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    n, d = options.samples, options.dimension
    X, y = make_blobs(n + 2000, d, centers=4, center_box=(-0.15, 0.15), random_state=0)
    X, y = torch.from_numpy(X).float(), torch.from_numpy(y)
    train = DataLoader(TensorDataset(X[:n], y[:n]), BATCH_SIZE, shuffle=True)

    model = nn.Sequential(nn.Linear(d, 8), nn.GELU(), nn.Linear(8, 4))
    rest = [model[0].bias, *model[2].parameters()]
    optimizers = torch.optim.Muon([model[0].weight], lr=0.02), torch.optim.AdamW(rest, lr=3e-3)
    tracker = None
    if not options.plain:
        tracker = dd.decouple(model, *optimizers, noise=dd.NoiseModel.fit(X[:n], y[:n]))

    for _ in range(options.epochs):
        for inputs, labels in train:
            for optimizer in optimizers:
                optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            for optimizer in optimizers:
                optimizer.step()

    def wrong(batch: list[Tensor]) -> Tensor:
        return (model(batch[0]).argmax(1) != batch[1]).float()

    model.eval()
    with torch.no_grad():
        test_error = float(wrong([X[n:], y[n:]]).mean())
        train_error = float(wrong([X[:n], y[:n]]).mean())
    if tracker is not None:
        estimate = tracker.estimate(train, wrong)
        print(f"tracked error {estimate}")
        train_error = float(estimate.value)
    print(f"train error {train_error:.3f}, test error {test_error:.3f}")
    return model, train_error, test_error


if __name__ == "__main__":
    main()
