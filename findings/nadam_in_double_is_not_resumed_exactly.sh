#!/usr/bin/env bash
# torch 2.9.1: NAdam in double precision trains on differently after its own state was saved and loaded.
#
# NAdam keeps the product of its momentum schedule, mu_product, in single precision, whatever the parameters are in.
# load_state_dict() casts every floating-point tensor of the state to the parameter's precision, but for the one called "step";
# so from the first step after a resume the product is rounded in double instead of single precision, and the weights part from
# those of the uninterrupted run, by about 1e-9 of a step at first. Adam, AdamW and RAdam, which keep no such product, resume
# bit for bit in the same loop. Who tests a checkpoint by equality of weights, in double precision so that it is exact, takes
# their own code for the cause.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.9.1 numpy==2.3.5
"$folder/env/bin/python" - <<'PYTHON'
import copy

import torch


def train(weight, optimizer, steps):
    for step in steps:
        weight.grad = torch.sin(torch.arange(6, dtype=torch.float64) + step)
        optimizer.step()


def gap(rule):
    """Largest difference of weights, four steps after a resume, from the uninterrupted run."""
    weight = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer = rule([weight], lr=0.1)
    train(weight, optimizer, range(4))
    again = torch.nn.Parameter(weight.detach().clone())
    resumed = rule([again], lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    dtypes = {k: (v.dtype, resumed.state[again][k].dtype) for k, v in optimizer.state[weight].items()}
    train(weight, optimizer, range(4, 8))
    train(again, resumed, range(4, 8))
    return float((weight - again).detach().abs().max()), dtypes


print(f"torch {torch.__version__}")
for rule in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RAdam):
    off, _ = gap(rule)
    print(f"{rule.__name__}: resumed run is off by {off:.1e}")
    assert off == 0.0
off, dtypes = gap(torch.optim.NAdam)
print(f"NAdam: resumed run is off by {off:.1e}; mu_product was {dtypes['mu_product'][0]}, is {dtypes['mu_product'][1]}")
assert off > 0 and dtypes["mu_product"] == (torch.float32, torch.float64), "the finding no longer holds"
PYTHON
