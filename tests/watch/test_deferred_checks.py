"""Steps that do not wait for a device: what was wrong with one is told later, and it moved nothing.

On the CPU optimizers are made to take it for a device that stalls.
"""

import copy
import importlib
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dd
from dd.correction.attachment import Attachment
from dd.watch.deferred_checks import DeferredChecks
from tests.correction.test_mini_batches import RULES
from tests.optimizer.test_optimizer import make_model, make_problem, parameters_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def host_reads(monkeypatch):
    """Return what lists the operations of a call for which a host would wait on a device."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("_counts").host_reads


@pytest.fixture
def stalling(monkeypatch):
    """The CPU as a device that stalls where a number is looked at."""
    monkeypatch.setattr(Attachment, "stalls", True)
    monkeypatch.setattr("dd.samples.repeated._changes_unseen", lambda inputs: False)


def attached(curvature="stein", bins=2, dtype=torch.float64, **settings):
    inputs, targets = make_problem(dtype=dtype)
    model = make_model(dtype=dtype)
    noise = dd.NoiseModel(
        torch.tensor([2.0, 0.5][:bins], dtype=dtype),
        torch.tensor([20.0, 40.0] if bins == 2 else [60.0], dtype=dtype),
        components=targets,
    )
    settings = {"lr": 0.3} | settings
    optimizer = dd.DecoupledDescent(model, noise=noise, curvature=curvature, **settings)
    return model, optimizer, inputs, targets


def step(model, optimizer, inputs, targets, edit=lambda model: None, factor=1.0):
    optimizer.zero_grad()
    loss = factor * F.cross_entropy(model(inputs), targets)
    loss.backward()
    edit(model)
    optimizer.step()
    return loss


def state_of(model, optimizer):
    """Copies of all that a step moves, read without asking for what is still to be told."""
    kept = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor) and key != "shadow_weight":
                kept.append(value.clone())
    return kept


def require_same(before, after):
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# --- Nothing waits ---------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [1, 2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_step_reads_a_number_back(stalling, host_reads, momentum, bins):
    """By the default curvature: Stein's solution waits for an accelerator's eigenvalues."""
    loop = attached("auto", bins, momentum=momentum)
    for _ in range(2):
        step(*loop)
    assert host_reads(lambda: step(*loop)) == []
    assert host_reads(lambda: step(*loop)) == []
    assert loop[1]._attachment.verdicts._sent


def test_the_watcher_of_reads_can_see_one(host_reads):
    loop = attached()
    step(*loop)
    assert "_local_scalar_dense" in host_reads(lambda: step(*loop))


@pytest.mark.cuda
def test_no_step_waits_for_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model, optimizer, inputs, targets = attached("auto", dtype=torch.float32)
    inputs, targets, model = inputs.cuda(), targets.cuda(), model.cuda()
    for _ in range(2):
        step(model, optimizer, inputs, targets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, optimizer, inputs, targets)
        step(model, optimizer, inputs, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    optimizer.state_dict()


# --- Nothing else changes --------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["stein", "probe"])
@pytest.mark.parametrize("rule", RULES)
def test_the_path_is_that_of_steps_that_wait(monkeypatch, rule, curvature):
    """Torch's fused update may round once less in each of its sums: n roundings a step at most."""
    ends = []
    for stalls in (False, True):
        monkeypatch.setattr(Attachment, "stalls", stalls)
        model, optimizer, inputs, targets = attached(curvature, **RULES[rule][0])
        for number in range(6):
            optimizer.param_groups[0].update(RULES[rule][number % len(RULES[rule])])
            step(model, optimizer, inputs, targets)
        ends.append([*parameters_of(model), optimizer.shadow])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_mini_batches_go_on_without_waiting_too(monkeypatch):
    ends = []
    g = torch.Generator().manual_seed(1)
    batches = [torch.randperm(120, generator=g)[:40] for _ in range(8)]
    for stalls in (False, True):
        monkeypatch.setattr(Attachment, "stalls", stalls)
        model, optimizer, inputs, targets = attached(momentum=0.5)
        for batch in batches:
            optimizer.batch(batch)
            step(model, optimizer, inputs[batch], targets[batch])
        ends.append([*parameters_of(model), optimizer.shadow])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_a_clipped_gradient_is_followed(monkeypatch):
    ends = []
    for stalls in (False, True):
        monkeypatch.setattr(Attachment, "stalls", stalls)
        loop = attached()
        for _ in range(4):
            step(*loop, edit=lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.02))
        ends.append([*parameters_of(loop[0]), loop[1].shadow])
    for a, b in zip(*ends, strict=True):
        # The scale is read off sums of 120 · 60 products.
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --- What is wrong is told later -------------------------------------------------------------


def spoil(model):
    model[2].bias.grad[0] = float("inf")


def nudge(model):
    model[0].weight.grad[1] += 1e-3


FAILURES = {
    "loss": (
        {"factor": float("nan")},
        FloatingPointError,
        r"output of '0'.* is not finite at step",
    ),
    "gradient": ({"edit": spoil}, FloatingPointError, r"gradient of 2\.bias is not finite at step"),
    "edit": ({"edit": nudge}, RuntimeError, r"not the one that the last backward passes delivered"),
}
NOTE = r".*\(Found at step 3, which changed nothing\.\)"


@pytest.mark.parametrize(
    "rule", ["plain", "momentum", "nesterov", "weight decay", "decoupled, momentum"]
)
@pytest.mark.parametrize("failure", FAILURES)
def test_a_step_that_is_refused_changes_nothing(stalling, failure, rule):
    wrong, error, message = FAILURES[failure]
    loop = model, optimizer, inputs, _ = attached(**RULES[rule][0])
    for _ in range(3):
        step(*loop)
    before = state_of(model, optimizer)
    step(*loop, **wrong)
    require_same(before, state_of(model, optimizer))
    with pytest.raises(error, match=message + NOTE):
        model(inputs)
    # Told once, and training goes on.
    optimizer.zero_grad()
    step(*loop)
    optimizer.state_dict()
    assert not torch.equal(before[0], model[0].weight)


def test_mini_batches_skip_a_refused_step_and_keep_their_maps(stalling):
    """The steps after it are those of a run that never made it."""
    ends = []
    g = torch.Generator().manual_seed(1)
    batches = [torch.randperm(120, generator=g)[:40] for _ in range(6)]
    for fails in (False, True):
        model, optimizer, inputs, targets = attached(momentum=0.5, weight_decay=0.1)
        for number, batch in enumerate(batches):
            if fails and number == 3:
                optimizer.batch(batches[0])
                some = inputs[batches[0]], targets[batches[0]]
                step(model, optimizer, *some, factor=float("nan"))
                with pytest.raises(FloatingPointError, match="at step 3"):
                    optimizer.state_dict()
                optimizer.drop_forward()
            optimizer.batch(batch)
            step(model, optimizer, inputs[batch], targets[batch])
        ends.append([*parameters_of(model), optimizer.shadow])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "ask",
    [
        lambda optimizer, batch: optimizer.state_dict(),
        lambda optimizer, batch: optimizer.shadow,
        lambda optimizer, batch: copy.deepcopy(optimizer),
        lambda optimizer, batch: optimizer.evaluate([batch], lambda b: torch.zeros(())),
        lambda optimizer, batch: optimizer.step(),
    ],
    ids=["state_dict", "shadow", "deepcopy", "evaluate", "step"],
)
def test_whoever_asks_for_results_is_told(stalling, ask):
    loop = attached()
    for _ in range(3):
        step(*loop)
    step(*loop, edit=spoil)
    with pytest.raises(FloatingPointError, match=r"2\.bias is not finite at step 3"):
        ask(loop[1], loop[2])


def test_weights_changed_outside_are_told_and_not_moved(stalling):
    loop = model, optimizer, inputs, _ = attached()
    for _ in range(3):
        step(*loop)
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    before = state_of(model, optimizer)
    step(*loop)
    require_same(before, state_of(model, optimizer))
    with pytest.raises(RuntimeError, match=r"weight was changed outside step\(\)" + NOTE):
        model(inputs)


@pytest.mark.parametrize(
    "settings",
    [
        {"foreach": True},
        {"fused": False},
        {"head": True},
        {"momentum": 0.9},
    ],
    ids=str,
)
def test_what_cannot_be_told_to_stay_waits(stalling, settings):
    """The first step with momentum, too: torch's fused update leaves new momenta undefined."""
    inputs, targets = make_problem()
    noise = dd.NoiseModel.fit(inputs, targets, separate_means="head" in settings)
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.3, noise=noise, **settings)
    with pytest.raises(FloatingPointError, match=r"2\.bias is not finite at step 0; nothing was"):
        step(model, optimizer, inputs, targets, edit=spoil)


def test_conditions_are_told_in_their_order():
    verdicts = DeferredChecks()
    verdicts.require(torch.tensor([True, True]), lambda flags: AssertionError)
    with pytest.raises(ValueError, match="second of 2"):
        verdicts.require(
            torch.tensor([True, False]),
            lambda flags: ValueError(f"second of {len(flags)}" if flags[0] else "first"),
        )
    verdicts.defer(7)
    assert verdicts.refusal is None
    for name, up in (("a", True), ("b", False), ("c", False)):
        verdicts.require(torch.tensor(up), partial(lambda name, flags: KeyError(name), name))
    assert float(verdicts.refusal) == 1.0
    verdicts.end()
    with pytest.raises(KeyError, match=r"b.*Found at step 7"):
        verdicts.settle()
    verdicts.settle(wait=True)


# --- What does not wait is withdrawn with its step --------------------------------------------


def test_a_step_that_is_searched_for_is_told_at_once(stalling):
    model, optimizer, inputs, targets = attached(lr="auto", curvature="probe")

    def closure(spoils=False):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        if spoils:
            spoil(model)
        return loss

    optimizer.step(closure)
    before = state_of(model, optimizer)
    with pytest.raises(FloatingPointError, match="not finite"):
        optimizer.step(partial(closure, spoils=True))
    require_same(before, state_of(model, optimizer))
    assert not optimizer._attachment.verdicts.defers


def test_a_checkpoint_loaded_after_a_refused_step_goes_on(stalling):
    loop = model, optimizer, _, _ = attached()
    for _ in range(3):
        step(*loop)
    kept = copy.deepcopy(model.state_dict()), optimizer.state_dict()
    step(*loop, factor=float("nan"))
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    before = model[0].weight.detach().clone()
    step(*loop)
    optimizer.state_dict()
    assert not torch.equal(before, model[0].weight)


def test_a_forward_given_up_takes_its_conditions_along(stalling):
    loop = model, optimizer, inputs, _ = attached()
    for _ in range(3):
        step(*loop)
    kept = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.mul_(2)
    model(inputs)
    optimizer.drop_forward()
    with torch.no_grad():
        model[0].weight.copy_(kept)
    step(*loop)
    optimizer.state_dict()
    assert not torch.equal(kept, model[0].weight)


def test_the_last_step_is_told_when_the_optimizer_is_detached(stalling):
    loop = attached()
    for _ in range(3):
        step(*loop)
    step(*loop, factor=float("nan"))
    with pytest.raises(FloatingPointError, match="at step 3"):
        loop[1].detach()
    assert loop[1].layer is None


def test_gradients_that_lie_otherwise_and_half_precision_wait(stalling):
    def transpose(model):
        model[2].weight.grad = model[2].weight.grad.t().contiguous().t()

    ends = []
    for edit in (lambda model: None, transpose):
        loop = attached()
        for _ in range(4):
            step(*loop, edit=edit)
        ends.append(parameters_of(loop[0]))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    loop = attached(bins=1, dtype=torch.bfloat16, damping=0.5)
    for _ in range(3):
        step(*loop)
    assert not loop[1]._attachment.verdicts._sent


def test_a_first_step_that_is_not_finite_says_so_though_the_spectrum_is_watched(stalling):
    """Fewer samples than inputs, where the feedback of the correction is followed."""
    inputs, targets = make_problem()
    inputs, targets = inputs[:30], targets[:30]
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.3, noise=dd.NoiseModel.isotropic(inputs, targets))
    with pytest.raises(FloatingPointError, match="is not finite at step 0"):
        step(model, optimizer, inputs, targets, factor=float("nan"))
