"""Decoupled descent in Lightning: the training error that is logged estimates the test error.

python scripts/recipes/lightning_module.py                    # decoupled descent
python scripts/recipes/lightning_module.py --plain            # plain SGD
python scripts/recipes/lightning_module.py --adamw            # AdamW and dd.decouple
python scripts/recipes/lightning_module.py --adamw --plain    # plain AdamW

With --manual the module makes the steps itself, under manual optimisation.
"""

import argparse
from collections.abc import Sequence

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import make_blobs
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dd

BATCH_SIZE = 200


class TwoLayer(lightning.LightningModule):
    """A two-layer classifier.

    Args:
        dimension: number of inputs.
        noise: noise model of the training inputs; None trains without correction.
        by_adamw: whether AdamW trains, not SGD.
        manually: whether training_step makes the step, not the trainer.
    """

    def __init__(
        self, dimension: int, noise: dd.NoiseModel | None, *, by_adamw: bool, manually: bool
    ) -> None:
        super().__init__()
        self.by_adamw, self.automatic_optimization = by_adamw, not manually
        self.network = nn.Sequential(nn.Linear(dimension, 8), nn.GELU(), nn.Linear(8, 4))
        self.noise = noise

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        if self.by_adamw:
            optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
            if self.noise is not None:
                dd.decouple(self, optimizer, noise=self.noise)
            return optimizer
        if self.noise is not None:
            return dd.DecoupledDescent(self, lr=0.2, noise=self.noise)
        return torch.optim.SGD(self.parameters(), lr=0.2)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the loss of a training batch, after its step where that is to be made here."""
        loss = self._loss(batch, "train_error")
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        """Log the error on new data."""
        self._loss(batch, "test_error")

    def _loss(self, batch: list[Tensor], name: str) -> Tensor:
        inputs, labels = batch
        scores = self.network(inputs)
        error = (scores.argmax(1) != labels).float().mean()
        self.log(name, error, on_step=False, on_epoch=True, prog_bar=True)
        return F.cross_entropy(scores, labels)


def main(arguments: Sequence[str] | None = None) -> tuple[nn.Module, float, float]:
    """Train; print and return the training and the test error, after the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adamw", action="store_true", help="train by AdamW, not SGD")
    parser.add_argument("--plain", action="store_true", help="train without correction")
    parser.add_argument("--manual", action="store_true", help="optimise manually")
    parser.add_argument("--samples", type=int, default=2000, help="training samples")
    parser.add_argument("--dimension", type=int, default=500, help="inputs of a sample")
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args(arguments)

    lightning.seed_everything(0, verbose=False)
    n, d = options.samples, options.dimension
    X, y = make_blobs(n + 2000, d, centers=4, center_box=(-0.15, 0.15), random_state=0)
    X, y = torch.from_numpy(X).float(), torch.from_numpy(y)
    train = DataLoader(TensorDataset(X[:n], y[:n]), BATCH_SIZE, shuffle=True)
    test = DataLoader(TensorDataset(X[n:], y[n:]), 1000)

    noise = None if options.plain else dd.NoiseModel.fit(X[:n], y[:n])
    model = TwoLayer(d, noise, by_adamw=options.adamw, manually=options.manual)
    trainer = lightning.Trainer(
        max_epochs=options.epochs, logger=False, enable_checkpointing=False, log_every_n_steps=1
    )
    trainer.fit(model, train, test)
    errors = [float(trainer.callback_metrics[name]) for name in ("train_error", "test_error")]
    print(f"train error {errors[0]:.3f}, test error {errors[1]:.3f}")
    return model, *errors


if __name__ == "__main__":
    main()
