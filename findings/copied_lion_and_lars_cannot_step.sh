#!/usr/bin/env bash
# lion-pytorch 0.2.5, pytorch-optimizer 4.1.0, torch 2.9.1: a deep copy of these optimizers cannot make a step.
#
# torch.optim.Optimizer copies and pickles its defaults, its state and its parameter groups, and nothing else. Optimizers that
# keep a setting as an attribute of their own therefore lose it with copy.deepcopy or pickle, without a word: Lion its
# decoupled_wd, LARS of pytorch-optimizer its maximize, AdEMAMix the step that it compiled. The copy looks whole, prints its groups, gives its
# state_dict, and raises AttributeError at its first step. AdamW of torch, whose settings are all in its groups, steps as
# before. Copies are what averaging, population-based training and process pools make of an optimizer.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.9.1 numpy==2.3.5 lion-pytorch==0.2.5 pytorch-optimizer==4.1.0
"$folder/env/bin/python" - <<'PYTHON'
import copy
from importlib.metadata import version

import torch
from lion_pytorch import Lion
from pytorch_optimizer import LARS, AdEMAMix


def step(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def copied(rule):
    """What a deep copy of an optimizer that has made a step says at its own first step."""
    optimizer = rule([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)
    step(optimizer)
    twin = copy.deepcopy(optimizer)
    twin.state_dict()
    try:
        step(twin)
    except AttributeError as error:
        return str(error)
    return "steps"


print(*(f"{name} {version(name)}" for name in ("torch", "lion-pytorch", "pytorch-optimizer")))
found = {rule.__name__: copied(rule) for rule in (torch.optim.AdamW, Lion, LARS, AdEMAMix)}
for name, said in found.items():
    print(f"copy of {name}: {said}")
assert found["AdamW"] == "steps"
assert "decoupled_wd" in found["Lion"], "the finding no longer holds"
assert "maximize" in found["LARS"] and "_compiled" in found["AdEMAMix"], "the finding no longer holds"
PYTHON
