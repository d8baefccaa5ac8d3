"""Every optimizer that ``dd.decouple`` is held against, by name."""

import importlib
from functools import partial

import pytest
import torch

__all__ = ["CASES", "has_found", "make"]


def _torch(name, **settings):
    rule = getattr(torch.optim, name, None)
    return None if rule is None else partial(rule, **settings)


def _package(package, name, **settings):
    try:
        module = importlib.import_module(package)
    except ImportError:
        return None
    return partial(getattr(module, name), **settings)


def _adam_mini(**settings):
    made = _package("adam_mini", "Adam_mini", dim=60, n_heads=1, verbose=False, **settings)
    return made and (lambda parameters: made([("hidden", one) for one in parameters]))


# Rates with which XOR of the tests is learnt in some dozen steps.
CASES = {
    "SGD": _torch("SGD", lr=0.3),
    "SGD nesterov": _torch("SGD", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD dampening": _torch("SGD", lr=0.2, momentum=0.5, dampening=0.2, foreach=True),
    "SGD fused": _torch("SGD", lr=0.1, momentum=0.9, fused=True),
    "SGD tensor rate": _torch("SGD", lr=torch.tensor(0.3)),
    "ASGD": _torch("ASGD", lr=0.3),
    "ASGD averaging": _torch("ASGD", lr=0.3, t0=3, weight_decay=0.01),
    "AdamW": _torch("AdamW", lr=0.01, weight_decay=0.1),
    "AdamW fused": _torch("AdamW", lr=0.01, fused=True),
    "AdamW tensor rate": _torch("AdamW", lr=torch.tensor(0.01), foreach=False),
    "Adam": _torch("Adam", lr=0.01, weight_decay=0.01),
    "Adam amsgrad": _torch("Adam", lr=0.01, amsgrad=True, foreach=True),
    "Adam decoupled": _torch("Adam", lr=0.01, decoupled_weight_decay=True, weight_decay=0.1),
    "NAdam": _torch("NAdam", lr=0.01, decoupled_weight_decay=True, weight_decay=0.1),
    "RAdam": _torch("RAdam", lr=0.03),
    "Adamax": _torch("Adamax", lr=0.01),
    "Adagrad": _torch("Adagrad", lr=0.05, lr_decay=0.01),
    "Adagrad fused": _torch("Adagrad", lr=0.05, fused=True),
    "Adadelta": _torch("Adadelta", lr=5.0),
    "RMSprop": _torch("RMSprop", lr=0.002),
    "RMSprop centred": _torch("RMSprop", lr=0.002, centered=True),
    "Rprop": _torch("Rprop", lr=0.001),
    "Adafactor": _torch("Adafactor", lr=0.05),
    "Muon": _torch("Muon", lr=0.02),
    "Muon without momentum": _torch("Muon", lr=0.02, momentum=0.0, nesterov=False),
    "Lion": _package("lion_pytorch", "Lion", lr=0.002),
    "Schedule-Free SGD": _package("schedulefree", "SGDScheduleFree", lr=0.5),
    "Schedule-Free AdamW": _package("schedulefree", "AdamWScheduleFree", lr=0.01),
    "Adam-mini": _adam_mini(lr=0.01),
    "Prodigy": _package("prodigyopt", "Prodigy", lr=1.0),
    "SOAP": _package("pytorch_optimizer", "SOAP", lr=0.003),
    "Shampoo": _package("pytorch_optimizer", "Shampoo", lr=0.003),
    "AdEMAMix": _package("pytorch_optimizer", "AdEMAMix", lr=0.003),
    "LARS": _package("pytorch_optimizer", "LARS", lr=0.3),
}
# Those whose update is a combination of known quantities at every step, Shampoo's before its
# preconditioning begins; Muon's, whose iterations are in bfloat16, nearly.
EXACT = ("SGD", "ASGD", "Adam-mini", "Schedule-Free", "LARS", "Shampoo")
NEARLY = ("Muon",)


def has_found(name, response):
    """Whether a response is of the kind that an optimizer's has."""
    if name.startswith(NEARLY):
        return response.across_units and response.share > 0.98
    return response.exact == name.startswith(EXACT)


def make(name, parameters):
    """The optimizer of a name; skips where its package or class is missing."""
    rule = CASES[name]
    if rule is None:
        pytest.skip(f"{name}: not in this torch, or its package is not installed")
    parameters = list(parameters)
    if name.startswith("Muon"):
        # Matrices alone.
        parameters = [p for p in parameters if p.dim() == 2]
    optimizer = rule(parameters)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer
