"""The head's stability edge against the full Hessian and against gradient descent itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dd.training.stability import EdgeWatch, HeadSharpness


def problem(n: int = 80, k: int = 5, classes: int = 3):
    torch.manual_seed(0)
    return (
        torch.randn(n, k),
        torch.randint(classes, (n,)),
        nn.Sequential(nn.Tanh(), nn.Linear(k, classes)),
    )


def largest_eigenvalue(head, preactivation, targets) -> float:
    shapes = {name: p.shape for name, p in head.named_parameters()}

    def loss(flat):
        parts = flat.split([s.numel() for s in shapes.values()])
        named = {n: p.reshape(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(head, named, (preactivation,)), targets)

    flat = torch.cat([p.detach().flatten() for p in head.parameters()])
    return float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))[-1])


def test_sharpness_is_the_largest_eigenvalue_of_the_hessian():
    preactivation, targets, head = problem()
    sharpness = HeadSharpness(head, iterations=200)(preactivation, targets)
    assert sharpness == pytest.approx(largest_eigenvalue(head, preactivation, targets), rel=1e-3)


def test_sharpness_converges_over_calls():
    preactivation, targets, head = problem()
    follow = HeadSharpness(head, iterations=8)
    values = [follow(preactivation, targets) for _ in range(30)]
    assert values[-1] == pytest.approx(largest_eigenvalue(head, preactivation, targets), rel=1e-3)
    assert all(p.grad is None for p in head.parameters())


@pytest.mark.parametrize(("factor", "crosses"), [(0.9, False), (1.1, True)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_edge_is_twice_one_plus_momentum_over_the_curvature(factor, crosses, momentum):
    preactivation, targets, head = problem()
    edge = 2 * (1 + momentum) / largest_eigenvalue(head, preactivation, targets)
    model = nn.Sequential(nn.Identity(), *head)
    optimizer = torch.optim.SGD(head.parameters(), lr=factor * edge, momentum=momentum)
    watch = EdgeWatch(model, optimizer, preactivation, targets)
    for step in range(30):
        watch.look(step)
    assert (watch.crossing is not None) == crosses
    if crosses:
        assert "past the head's stability edge" in watch.crossing
