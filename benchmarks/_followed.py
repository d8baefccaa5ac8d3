"""Error and loss of a model that may be followed by ``dd.decouple``."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dd


def figures(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Error and loss of a batch."""
    scores = model(batch[0])
    return torch.stack(
        [(scores.argmax(1) != batch[1]).float().mean(), F.cross_entropy(scores, batch[1])]
    )


def reported_figures(
    tracker: dd.ErrorTracker | None, model: nn.Module, train: tuple[Tensor, Tensor]
) -> Tensor:
    """Error and loss on the training samples: the tracked ones, or those of the plain network."""
    if tracker is not None:
        return tracker.evaluate([train], lambda batch: figures(model, batch))
    model.eval()
    with torch.no_grad():
        found = figures(model, train)
    model.train()
    return found
