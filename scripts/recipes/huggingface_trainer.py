"""Decoupled descent in transformers.Trainer: the training loss estimates the evaluation loss.

python scripts/recipes/huggingface_trainer.py                    # decoupled descent
python scripts/recipes/huggingface_trainer.py --plain            # plain SGD
python scripts/recipes/huggingface_trainer.py --adamw            # its own AdamW and dd.decouple
python scripts/recipes/huggingface_trainer.py --adamw --plain    # plain AdamW
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import make_blobs
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
    set_seed,
)

import dd

BATCH_SIZE = 200


class TwoLayer(nn.Module):
    """A two-layer classifier that returns its loss, as the models of transformers do."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(dimension, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return loss and scores."""
        scores = self.network(inputs)
        return {"loss": F.cross_entropy(scores, labels), "logits": scores}


class Decoupling(TrainerCallback):
    """Follows the optimizer that the trainer has made.

    Args:
        noise: noise model of the training inputs.
    """

    def __init__(self, noise: dd.NoiseModel) -> None:
        self.noise = noise

    def on_train_begin(self, *_: Any, model: nn.Module, optimizer: Any, **__: Any) -> None:
        """Attach to the model and its optimizer."""
        dd.decouple(model, optimizer, noise=self.noise)


def main(arguments: Sequence[str] | None = None) -> tuple[nn.Module, float, float]:
    """Train; print and return the training and the test error, after the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--adamw", action="store_true", help="train by the trainer's own AdamW, not SGD"
    )
    parser.add_argument("--plain", action="store_true", help="train without correction")
    parser.add_argument("--samples", type=int, default=2000, help="training samples")
    parser.add_argument("--dimension", type=int, default=500, help="inputs of a sample")
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args(arguments)

    set_seed(0)
    n, d = options.samples, options.dimension
    X, y = make_blobs(n + 2000, d, centers=4, center_box=(-0.15, 0.15), random_state=0)
    X, y = torch.from_numpy(X).float(), torch.from_numpy(y)
    samples = [{"inputs": x, "labels": label} for x, label in zip(X, y, strict=True)]

    model = TwoLayer(d)
    noise = None if options.plain else dd.NoiseModel.fit(X[:n], y[:n])
    optimizer, schedule = None, None
    if not options.adamw:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        if noise is not None:
            optimizer = dd.DecoupledDescent(model, lr=0.5, noise=noise)
        steps = options.epochs * -(-n // BATCH_SIZE)
        schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            learning_rate=3e-3,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=BATCH_SIZE,
            logging_strategy="epoch",
            eval_strategy="epoch",
            save_strategy="no",
            report_to="none",
        )
        trainer = Trainer(
            model,
            settings,
            train_dataset=samples[:n],
            eval_dataset=samples[n:],
            optimizers=(optimizer, schedule),
            callbacks=[Decoupling(noise)] if options.adamw and noise is not None else [],
        )
        trainer.train()

    @torch.no_grad()
    def error(inputs: Tensor, labels: Tensor) -> float:
        scores = model(inputs.to(settings.device), labels.to(settings.device))["logits"]
        return float((scores.argmax(1).cpu() != labels).float().mean())

    model.train()
    train_error = error(X[:n], y[:n])
    model.eval()
    test_error = error(X[n:], y[n:])
    print(f"train error {train_error:.3f}, test error {test_error:.3f}")
    return model, train_error, test_error


if __name__ == "__main__":
    main()
