#!/usr/bin/env bash
# torch 2.9.1: what @once_differentiable forbids is silently done, and wrong, by torch.autograd.grad and functional.hessian.
#
# The decorator marks a backward that must not be differentiated: "trying to differentiate a function that was decorated with
# @once_differentiable" is raised by a second backward(). But the error sits in a node of its own, behind each gradient that the
# function returns, and torch.autograd.grad with inputs only runs nodes that lead to these inputs. Where the input is also
# reached another way, as in x * f(x), that node is left out together with its error, and a second derivative comes back that
# lacks every term through f. torch.autograd.functional.hessian, hvp and the like ask in the same way. A custom kernel whose
# author has excluded double backward so gives wrong Hessians, Laplace approximations and gradient penalties without a word.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.9.1 numpy==2.3.5
"$folder/env/bin/python" - <<'PYTHON'
import math

import torch
from torch.autograd.function import once_differentiable


class Exp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
true = 2.5 * math.exp(0.5)
(first,) = torch.autograd.grad(x * Exp.apply(x), x, create_graph=True)
(by_grad,) = torch.autograd.grad(first, x, retain_graph=True)
by_hessian = torch.autograd.functional.hessian(lambda x: x * Exp.apply(x), x.detach())
print(f"torch {torch.__version__}: second derivative of x exp(x) at 0.5 is {true:.4f}")
print(f"torch.autograd.grad: {by_grad:.4f}; functional.hessian: {by_hessian:.4f}; neither raises")
assert abs(by_grad - math.exp(0.5)) < 1e-12 and abs(by_hessian - math.exp(0.5)) < 1e-12
try:
    first.backward()
except RuntimeError as error:
    print(f"backward() raises: {str(error).splitlines()[0]}")
    assert "once_differentiable" in str(error)
else:
    raise SystemExit("backward() does not raise: the finding no longer holds")
PYTHON
