"""Half precision, scaled and clipped gradients, micro-batches, forwards without gradients.

Tolerances are a number format's relative rounding error u times a stated growth: the number of
roundings that a step adds times the number of steps, since no step enlarges what came before.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dd
from dd.correction.capture import StepGradients
from dd.samples.placement import Placement
from tests.optimizer.test_optimizer import C, D, K, N, create_graph_warns, make_model, make_problem
from tests.optimizer.test_state import CASES, STEPS, require_identical, states_of

SINGLE, DOUBLE = 2.0**-24, 2.0**-53

WHOLE = [torch.arange(N)] * 6


def shuffled(rows=40, steps=6):
    g = torch.Generator().manual_seed(1)
    return [torch.randperm(N, generator=g)[:rows] for _ in range(steps)]


PLANS = {"full batch": WHOLE, "mini-batches": shuffled()}


def attached(model, inputs, targets, curvature="stein", **settings):
    noise = dd.NoiseModel.fit(inputs, targets, bins=2)
    settings = {"lr": 0.3, "momentum": 0.5} | settings
    return dd.DecoupledDescent(model, noise=noise, curvature=curvature, **settings)


def train(model, optimizer, inputs, targets, plan, context=nullcontext):
    for batch in plan:
        optimizer.zero_grad()
        # Autocast keeps its casts of the weights until it is left.
        with context():
            loss = F.cross_entropy(model(inputs[batch]), targets[batch])
        loss.backward(create_graph=optimizer.needs_graph)
        optimizer.step()


def require_close(one, other, tolerance):
    """Weights and shadows of two models and their optimizers, relative to their size."""
    values = []
    for model, optimizer in (one, other):
        optimizer.state_dict()
        values.append([optimizer.shadow, *model.parameters()])
    for a, b in zip(*values, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


# --- Half and double precision ---------------------------------------------------------------


HALVES = {
    "bfloat16 model": (torch.bfloat16, None, 2.0**-8),
    "bfloat16 autocast": (torch.float32, torch.bfloat16, 2.0**-8),
    "float16 model": (torch.float16, None, 2.0**-11),
    "float16 autocast": (torch.float32, torch.float16, 2.0**-11),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("curvature", ["probe", "stein"])
@pytest.mark.parametrize("form", HALVES)
def test_half_precision_follows_single(form, curvature, plan):
    """A step rounds inputs, weights, R, the scores and G, by u/2 each: 15 u in six steps."""
    weights, autocast, u = HALVES[form]
    inputs, targets = make_problem(dtype=torch.float32)
    inputs = inputs.to(weights).float()
    shadows = []
    for half in (False, True):
        model = make_model(dtype=weights if half else torch.float32)
        optimizer = attached(model, inputs, targets, curvature, lr=0.1, momentum=0.0)

        def context(enabled=half and autocast is not None):
            return torch.autocast("cpu", autocast or torch.bfloat16, enabled=enabled)

        x = inputs.to(weights) if half else inputs
        train(model, optimizer, x, targets, PLANS[plan], context)
        optimizer.state_dict()
        assert optimizer.shadow.dtype == torch.float32
        shadows.append(optimizer.shadow)
    assert (shadows[0] - shadows[1]).norm() < 15 * u * shadows[0].norm()


@pytest.mark.parametrize("curvature", ["probe", "stein"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_state_is_in_single_precision_at_least(dtype, curvature):
    inputs, targets = make_problem(dtype=dtype)
    model = make_model(dtype=dtype)
    optimizer = attached(model, inputs, targets, curvature)
    train(model, optimizer, inputs, targets, shuffled())
    kinds = {
        key: value.dtype
        for key, value in optimizer.state[model[0].weight].items()
        if isinstance(value, torch.Tensor)
    }
    wide = torch.promote_types(dtype, torch.float32)
    assert kinds.pop("momentum_buffer") == dtype
    assert set(kinds.values()) == {wide}


# --- Gradient scalers ------------------------------------------------------------------------

CLEARING = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "model, zeros": lambda model, optimizer: model.zero_grad(set_to_none=False),
}


def train_scaled(pair, problem, plan, scales, clear, told):
    """Every batch until its step is made, from a scale of its own or from that of the last one."""
    (model, optimizer), (inputs, targets) = pair, problem
    scaler = torch.amp.GradScaler("cpu")
    losses, used, skipped = [], [], 0
    for batch, scale in zip(plan, scales, strict=True):
        if scale is not None:
            scaler.scale(torch.zeros(()))
            scaler.update(scale)
        while True:
            clear(model, optimizer)
            if told:
                optimizer.batch(batch)
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(inputs[batch]), targets[batch])
            scaler.scale(loss).backward()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() == before:
                break
            skipped += 1
        losses.append(float(loss.detach()))
        used.append(before)
    return losses, used, skipped


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clear", CLEARING)
@pytest.mark.parametrize("kind", ["full batch, probe", "mini-batches, stein", "told, stein"])
def test_a_skipped_step_loses_nothing_bit_for_bit(kind, clear, fused):
    """Overflow in the first step and in the fourth, against a run at the scales that were left."""
    problem = make_problem(dtype=torch.float32)
    plan, curvature = kind.split(", ")
    plan, told = PLANS.get(plan, shuffled()), plan == "told"
    scales = [2.0**24, None, None, 2.0**23, None, None]
    results = []
    for _ in range(2):
        model = make_model(dtype=torch.float32)
        pair = model, attached(model, *problem, curvature, fused=fused)
        losses, scales, skipped = train_scaled(pair, problem, plan, scales, CLEARING[clear], told)
        results.append((losses, skipped, states_of(pair)))
    (losses, skipped, state), (expected_losses, none, expected) = results
    assert skipped > 3
    assert none == 0
    assert losses == expected_losses
    require_identical(state, expected)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("curvature", ["probe", "stein"])
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**16, 2.0**127])
def test_a_scaled_loss_is_the_plain_one(scale, curvature, head):
    """Even where the sums of what was scaled would be infinite, or nothing at all.

    The scale is read off N rows' sums of D products: N D rounding errors at the very most.
    """
    inputs, targets = make_problem(dtype=torch.float32)
    noise = dd.NoiseModel.fit(inputs, targets, bins=2, separate_means=head)
    pairs = []
    for enabled in (False, True):
        model = make_model(dtype=torch.float32)
        optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise, curvature=curvature, head=head)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=enabled)
        for batch in PLANS["mini-batches"]:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs[batch]), targets[batch])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        pairs.append((model, optimizer))
    require_close(*pairs, len(WHOLE) * (N + D) * SINGLE)


# --- Gradients edited by a scale -------------------------------------------------------------


def clip(model, limit=0.02, **kind):
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit, **kind)
    return min(1.0, float(limit / (norm + 1e-6)))


def compare_clipped_with_scaled(attach, plan, **kind):
    inputs, targets = make_problem()
    pairs, coefficients = [], []
    for clips in (True, False):
        model = make_model()
        optimizer = attach(model)
        for step, batch in enumerate(plan):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs[batch]), targets[batch])
            loss = loss if clips else coefficients[step] * loss
            loss.backward(create_graph=optimizer.needs_graph)
            if clips:
                coefficients.append(clip(model, **kind))
            optimizer.step()
        pairs.append((model, optimizer))
    assert max(coefficients) < 0.5
    require_close(*pairs, 100 * len(plan) * N * DOUBLE)


@create_graph_warns
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", [{}, {"norm_type": 1.0}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("curvature", ["exact", "probe", "stein"])
def test_clipping_by_norm_scales_the_loss(curvature, kind, plan):
    """The twin multiplies its loss by the coefficient. Sums over N rows of either run round.

    Stein's solution enlarges that by the condition of R's covariance, here below 100.
    """
    inputs, targets = make_problem()
    inputs, targets = make_problem()

    def attach(model):
        return attached(model, inputs, targets, curvature)

    compare_clipped_with_scaled(attach, PLANS[plan], **kind)


def test_a_corrected_head_follows_the_norm_of_all_gradients():
    inputs, targets = make_problem()
    noise = dd.NoiseModel.fit(inputs, targets, separate_means=True)

    def attach(model):
        return dd.DecoupledDescent(model, lr=0.3, noise=noise, head=True)

    compare_clipped_with_scaled(attach, shuffled())


def test_clipping_above_the_norm_changes_nothing():
    inputs, targets = make_problem()
    pairs = []
    for limit in (1e6, None):
        model = make_model()
        optimizer = attached(model, inputs, targets)
        for batch in shuffled():
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            if limit is not None:
                clip(model, limit)
            optimizer.step()
        pairs.append((model, optimizer))
    require_identical(*(states_of(pair) for pair in pairs))


# --- Micro-batches ---------------------------------------------------------------------------


def in_parts(batch):
    return batch.split([5, 17, len(batch) - 22])


@create_graph_warns
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("curvature", ["exact", "stein"])
@pytest.mark.parametrize("together", [False, True])
def test_unequal_micro_batches_are_one_batch(together, curvature, plan):
    """A backward each, or one for all; tolerance as for clipping."""
    inputs, targets = make_problem()
    pairs = []
    for split in (in_parts, lambda batch: [batch]):
        model = make_model()
        optimizer = attached(model, inputs, targets, curvature)
        graph = optimizer.needs_graph
        for batch in PLANS[plan]:
            optimizer.zero_grad()
            losses = []
            for part in split(batch):
                loss = F.cross_entropy(model(inputs[part]), targets[part], reduction="sum")
                losses.append(loss / len(batch))
                if not together:
                    losses.pop().backward(create_graph=graph)
            if together:
                sum(losses).backward(create_graph=graph)
            optimizer.step()
        pairs.append((model, optimizer))
    require_close(*pairs, 100 * len(WHOLE) * N * DOUBLE)


def test_micro_batches_scaled_unscaled_and_clipped():
    """Each part's sums round in single precision; the scale is read off them."""
    inputs, targets = make_problem(dtype=torch.float32)
    accumulated, twin = (
        (m, attached(m, inputs, targets))
        for m in (make_model(dtype=torch.float32) for _ in range(2))
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for batch in shuffled():
        model, optimizer = accumulated
        optimizer.zero_grad()
        for part in in_parts(batch):
            loss = F.cross_entropy(model(inputs[part]), targets[part], reduction="sum")
            scaler.scale(loss / len(batch)).backward()
        scaler.unscale_(optimizer)
        coefficient = clip(model)
        scaler.step(optimizer)
        scaler.update()
        model, optimizer = twin
        optimizer.zero_grad()
        (coefficient * F.cross_entropy(model(inputs[batch]), targets[batch])).backward()
        optimizer.step()
    require_close(accumulated, twin, 100 * len(WHOLE) * N * SINGLE)


def test_copies_of_a_sample_add_up_beyond_half_precision():
    """Eight copies whose gradients are each half of the largest float16."""
    index = torch.tensor([3] * 8 + [1])
    placement = Placement.of(torch.zeros(9, 3), index, num_samples=N)
    gradient = torch.full((9, K), 2.0**15, dtype=torch.float16)
    pushes = StepGradients(placement, gradient, gradient, None, [], None, None)
    expected = torch.tensor([[2.0**15], [2.0**18]]).expand(2, K)
    assert torch.equal(pushes.by_sample, expected)


# --- Coarse products of float32 matrices -----------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(("choice", "u"), [("high", 2.0**-10), ("medium", 2.0**-8)])
def test_coarse_matrix_products_are_no_edit(choice, u, device):
    """Hardware may use the liberty or not; growth as in half precision."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    inputs, targets = torch.randn(600, 200), torch.randint(C, (600,))
    noise = dd.NoiseModel.isotropic(inputs, targets)
    pairs = []
    for precision in ("highest", choice):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(200, 32), nn.Tanh(), nn.Linear(32, C)).to(device)
        optimizer = dd.DecoupledDescent(model, lr=0.1, noise=noise)
        try:
            torch.set_float32_matmul_precision(precision)
            train(model, optimizer, inputs.to(device), targets.to(device), [slice(None)] * 6)
        finally:
            torch.set_float32_matmul_precision("highest")
        pairs.append((model, optimizer))
    require_close(*reversed(pairs), 15 * u)


# --- Forwards that lead to no step -----------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", CASES)
def test_forwards_without_gradients_bind_nothing(name, context):
    """Before every step, and where state is made and grown; compared bit for bit."""
    case = CASES[name]
    looked, plain = case.build(), case.build()
    for step in range(STEPS):
        with context():
            seen = case.forward(*looked, step)
        assert case.run(looked, [step]) == case.run(plain, [step]) == [float(seen)]
        with context():
            looked[1].state_dict()
        plain[1].state_dict()
    require_identical(states_of(looked), states_of(plain))


# --- CUDA graphs -----------------------------------------------------------------------------


def test_capture_of_a_cuda_graph_is_refused(monkeypatch):
    inputs, targets = make_problem()
    model = make_model()
    optimizer = attached(model, inputs, targets)
    train(model, optimizer, inputs, targets, WHOLE[:1])
    optimizer.zero_grad()
    loss = F.cross_entropy(model(inputs), targets)
    loss.backward()
    before = copy.deepcopy(states_of((model, optimizer)))
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_initialized", lambda: True)
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match=r"step\(\) while a CUDA graph is captured"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="a training forward while a CUDA graph"):
            model(inputs)
        model.eval()(inputs)
    require_identical(states_of((model, optimizer)), before)
    optimizer.step()


@pytest.mark.cuda
def test_capture_of_a_cuda_graph_is_refused_on_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    inputs, targets = (t.cuda() for t in make_problem(dtype=torch.float32))
    model = make_model(dtype=torch.float32).cuda()
    optimizer = attached(model, inputs, targets)
    plan = [slice(None)]
    train(model, optimizer, inputs, targets, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(RuntimeError, match="a training forward while a"):
        model(inputs)
    train(model, optimizer, inputs, targets, plan)
