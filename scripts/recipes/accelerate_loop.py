"""Decoupled descent in a loop with accelerate: the training error estimates the test error.

accelerate launch scripts/recipes/accelerate_loop.py                   # decoupled descent
accelerate launch scripts/recipes/accelerate_loop.py --plain           # plain SGD
accelerate launch scripts/recipes/accelerate_loop.py --adamw           # AdamW and dd.decouple
accelerate launch scripts/recipes/accelerate_loop.py --adamw --plain   # plain AdamW
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import make_blobs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dd

BATCH_SIZE = 200


def main(arguments: Sequence[str] | None = None) -> tuple[nn.Module, float, float]:
    """Train; print and return the training and the test error, after the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adamw", action="store_true", help="train by AdamW, not SGD")
    parser.add_argument("--plain", action="store_true", help="train without correction")
    parser.add_argument("--samples", type=int, default=2000, help="training samples")
    parser.add_argument("--dimension", type=int, default=500, help="inputs of a sample")
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args(arguments)

    set_seed(0)
    n, d = options.samples, options.dimension
    X, y = make_blobs(n + 2000, d, centers=4, center_box=(-0.15, 0.15), random_state=0)
    X, y = torch.from_numpy(X).float(), torch.from_numpy(y)
    train = DataLoader(TensorDataset(X[:n], y[:n]), BATCH_SIZE, shuffle=True)
    test = DataLoader(TensorDataset(X[n:], y[n:]), 1000)

    model = nn.Sequential(nn.Linear(d, 8), nn.GELU(), nn.Linear(8, 4))
    noise = None if options.plain else dd.NoiseModel.fit(X[:n], y[:n])
    if options.adamw:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        if noise is not None:
            dd.decouple(model, optimizer, noise=noise)
    elif noise is not None:
        optimizer = dd.DecoupledDescent(model, lr=0.2, noise=noise)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)

    for _ in range(options.epochs):
        for inputs, labels in train:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    @torch.no_grad()
    def error(loader: DataLoader) -> float:
        wrong = [
            accelerator.gather_for_metrics(model(inputs).argmax(1) != labels)
            for inputs, labels in loader
        ]
        return float(torch.cat(wrong).float().mean())

    model.train()
    train_error = error(train)
    model.eval()
    test_error = error(test)
    accelerator.print(f"train error {train_error:.3f}, test error {test_error:.3f}")
    return accelerator.unwrap_model(model), train_error, test_error


if __name__ == "__main__":
    main()
