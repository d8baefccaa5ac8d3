"""Estimates at the minimum of a convex loss, found by a solver of its own, as in ``_peer_methods``.

They know nothing of a path: there is one record.
"""

import copy

import torch
from _peer_methods import Look, folds
from _peer_problems import Problem
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn

TOLERANCE = 1e-6


def solved(problem: Problem, look: Look) -> Tensor:
    """The minimum and its training error."""
    model = _fitted(problem, slice(None))
    look(model)
    return _errors(problem, model, slice(None)).mean()[None]


def cross_validation(problem: Problem, look: Look) -> Tensor:
    """The minimum, and that of all samples but a fold in turn."""
    look(_fitted(problem, slice(None)))
    held_out = [_errors(problem, _fitted(problem, kept), held) for held, kept in folds(problem)]
    return torch.cat(held_out).mean()[None]


def leave_one_out(problem: Problem, look: Look) -> Tensor:
    """The minimum, and that of all samples but one in turn, by refitting."""
    look(_fitted(problem, slice(None)))
    everyone = torch.arange(len(problem.inputs))
    held_out = [_errors(problem, _fitted(problem, everyone != i), [i]) for i in everyone.tolist()]
    return torch.cat(held_out).mean()[None]


def leave_one_out_ridge(problem: Problem, look: Look) -> Tensor:
    """The same for ridge regression, in closed form.

    A sample's residual without it is its residual over 1 − h, h its entry on the diagonal of the
    matrix that takes the targets to the predictions.
    """
    inputs, n = problem.inputs, len(problem.inputs)
    gram = inputs.T @ inputs
    gram.diagonal().add_(n * problem.weight_decay)
    factor = torch.linalg.cholesky(gram)
    weight = torch.cholesky_solve(inputs.T @ problem.targets, factor)
    look(_model(problem, weight[:, 0]))
    leverage = torch.linalg.solve_triangular(factor, inputs.T, upper=False).square().sum(0)
    residuals = (problem.targets - inputs @ weight)[:, 0]
    return (residuals / (1 - leverage)).square().mean()[None]


def randomised(problem: Problem, look: Look) -> Tensor:
    """The minimum, and approximate leave-one-out by randalo (arXiv 2409.09781), as it comes."""
    import randalo

    model = _fitted(problem, slice(None))
    look(model)
    targets, outputs = problem.targets[:, 0], model(problem.inputs).detach()[:, 0]
    # Its losses are means over samples: of (y − r)², and of log(1 + e^{−yr}). RandALO.from_sklearn
    # would derive the same from the solver, were it not for an option that newer ones name anew.
    loss = randalo.MSELoss() if problem.square else randalo.LogisticLoss()
    scale = problem.weight_decay * (1.0 if problem.square else 0.5)
    jacobian = randalo.Jacobian(
        targets,
        problem.inputs,
        lambda: next(model.parameters()).detach()[0],
        loss,
        scale * randalo.SquareRegularizer(),
    )
    estimator = randalo.RandALO(loss, jacobian, targets, outputs, rng=problem.generator("randalo"))
    found = estimator.evaluate(
        lambda targets, outputs: problem.errors(outputs[:, None], targets[:, None]).mean()
    )
    return torch.tensor([float(found)])


def _fitted(problem: Problem, rows: slice | Tensor) -> nn.Sequential:
    inputs, targets = problem.inputs[rows], problem.targets[rows][:, 0]
    # The solvers sum the loss over samples.
    penalty = len(inputs) * problem.weight_decay
    solver = (
        Ridge(penalty, fit_intercept=False)
        if problem.square
        else LogisticRegression(C=1 / penalty, fit_intercept=False, tol=TOLERANCE, max_iter=1000)
    )
    solver.fit(inputs.numpy(), targets.numpy())
    return _model(problem, torch.from_numpy(solver.coef_).reshape(-1))


def _model(problem: Problem, weight: Tensor) -> nn.Sequential:
    model = copy.deepcopy(problem.model)
    with torch.no_grad():
        next(model.parameters()).copy_(weight)
    return model


@torch.no_grad()
def _errors(problem: Problem, model: nn.Module, rows: slice | Tensor | list[int]) -> Tensor:
    return problem.errors(model(problem.inputs[rows]), problem.targets[rows])
