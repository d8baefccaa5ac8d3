"""Compiled models, losses and training steps: the eager run, or an error that says why."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import dd
from dd.watch import model_watch
from tests.optimizer.test_optimizer import C, D, K, N, create_graph_warns, make_problem
from tests.optimizer.test_precision import SINGLE, require_close

pytestmark = [
    # The compiler itself looks at the .grad of tensors that have none.
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
    create_graph_warns,
]

STEPS = 20
SIZES = [40, 33, 17, N, 5, 64]

# Compiled code sums over N rows or D inputs in another order: that many roundings a step, and no
# step enlarges what came before.
TOLERANCE = STEPS * (N + D) * SINGLE


class Net(nn.Module):
    """Something follows the decoupled layer in its own frame, unlike in nn.Sequential."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(D, K), nn.Linear(K, C)

    def head(self, preactivation):
        return self.last(torch.tanh(preactivation) * 2)

    def forward(self, inputs):
        preactivation = self.first(inputs)
        return self.head(preactivation)


def make_model():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def problem():
    inputs, targets = make_problem(dtype=torch.float32)
    noise = dd.NoiseModel.isotropic(inputs, targets)
    g = torch.Generator().manual_seed(1)
    plan = [torch.randperm(N, generator=g)[: SIZES[step % len(SIZES)]] for step in range(STEPS)]
    return inputs, targets, noise, plan


def mean_loss(output, targets):
    return F.cross_entropy(output * 1.5, targets)


def attached(model, problem, curvature="stein"):
    return dd.DecoupledDescent(model, lr=0.1, momentum=0.5, noise=problem[2], curvature=curvature)


def train(forward, optimizer, problem, loss_fn=mean_loss):
    inputs, targets, _, plan = problem
    for batch in plan:
        optimizer.zero_grad()
        loss_fn(forward(inputs[batch]), targets[batch]).backward(create_graph=optimizer.needs_graph)
        optimizer.step()


def eager(problem, curvature):
    model = make_model()
    optimizer = attached(model, problem, curvature)
    train(model, optimizer, problem)
    return model, optimizer


def compiled_before(model, problem, curvature, **how):
    compiled = torch.compile(model, **how)
    return compiled, attached(compiled, problem, curvature), mean_loss


def original_given(model, problem, curvature, **how):
    return torch.compile(model, **how), attached(model, problem, curvature), mean_loss


def compiled_after(model, problem, curvature, **how):
    optimizer = attached(model, problem, curvature)
    return torch.compile(model, **how), optimizer, mean_loss


def in_place_before(model, problem, curvature, **how):
    model.compile(**how)
    return model, attached(model, problem, curvature), mean_loss


def in_place_after(model, problem, curvature, **how):
    optimizer = attached(model, problem, curvature)
    model.compile(**how)
    return model, optimizer, mean_loss


def head_alone(model, problem, curvature, **how):
    optimizer = attached(model, problem, curvature)
    head = torch.compile(model.head, **how)
    return lambda inputs: head(model.first(inputs)), optimizer, mean_loss


def layer_alone(model, problem, curvature, **how):
    optimizer = attached(model, problem, curvature)
    model.first.compile(**how)
    return model, optimizer, mean_loss


def loss_alone(model, problem, curvature, **how):
    return model, attached(model, problem, curvature), torch.compile(mean_loss, **how)


def loss_with_model(model, problem, curvature, **how):
    optimizer = attached(model, problem, curvature)
    compiled = torch.compile(lambda inputs, targets: mean_loss(model(inputs), targets), **how)
    return lambda inputs: inputs, optimizer, compiled


SLOW = pytest.mark.slow
WHOLE = [
    compiled_before,
    pytest.param(original_given, marks=SLOW),
    compiled_after,
    pytest.param(in_place_before, marks=SLOW),
    in_place_after,
    layer_alone,
    loss_with_model,
]
BEHIND = [head_alone, loss_alone]


def compare(way, problem, curvature, **how):
    model = make_model()
    forward, optimizer, loss_fn = way(model, problem, curvature, **how)
    train(forward, optimizer, problem, loss_fn)
    require_close((model, optimizer), eager(problem, curvature), TOLERANCE)


@pytest.mark.parametrize("curvature", ["stein", pytest.param("probe", marks=SLOW)])
@pytest.mark.parametrize("way", [*WHOLE, *BEHIND])
def test_compiled_training_is_the_eager_one(way, curvature, problem):
    compare(way, problem, curvature, backend="aot_eager")


@pytest.mark.parametrize("curvature", ["stein", pytest.param("probe", marks=SLOW)])
@pytest.mark.parametrize("way", [compiled_before, *BEHIND])
def test_without_autograd_in_the_backend(way, curvature, problem):
    compare(way, problem, curvature, backend="eager")


@SLOW
@pytest.mark.parametrize("curvature", ["stein", "probe", "probe_create_graph"])
@pytest.mark.parametrize("way", [*WHOLE, *BEHIND])
def test_default_backend(way, curvature, problem):
    compare(way, problem, curvature)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("curvature", ["probe_create_graph", pytest.param("exact", marks=SLOW)])
@pytest.mark.parametrize("way", [compiled_after, *BEHIND])
def test_second_derivatives_are_not_lost_in_compiled_code(way, curvature, frozen, problem):
    """Compiled code saves values without a graph: its second derivative would be taken for zero."""
    results = []
    for compiles in (True, False):
        model = make_model()
        model.last.requires_grad_(not frozen)
        if compiles:
            forward, optimizer, loss_fn = way(model, problem, curvature, backend="aot_eager")
        else:
            forward, optimizer, loss_fn = model, attached(model, problem, curvature), mean_loss
        train(forward, optimizer, problem, loss_fn)
        results.append((model, optimizer))
    require_close(*results, TOLERANCE)


def stripped(loss_fn):
    """A loss that takes the mark off the scores, as a custom function in the head would."""
    return lambda output, targets: loss_fn(output.as_subclass(Tensor), targets)


def test_a_mark_that_is_lost_before_compiled_code_is_missed_aloud(problem):
    model = make_model()
    optimizer = attached(model, problem, "probe")
    loss_fn = stripped(torch.compile(mean_loss, backend="aot_eager"))
    try:
        train(model, optimizer, problem, loss_fn)
    except RuntimeError as error:
        message = str(error)
    else:
        require_close((model, optimizer), eager(problem, "probe"), TOLERANCE)
        return
    assert "was not met" in message
    assert optimizer.shadow is None


# --- One graph -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", BEHIND)
def test_what_follows_the_layer_is_one_graph_under_stein(way, problem):
    compare(way, problem, "stein", backend="aot_eager", fullgraph=True)
    assert not counters["graph_break"]


@pytest.mark.parametrize("curvature", ["stein", "probe"])
@pytest.mark.parametrize("way", WHOLE)
def test_the_layer_itself_is_no_part_of_one_graph(way, curvature, problem):
    forward, optimizer, loss_fn = way(
        make_model(), problem, curvature, backend="eager", fullgraph=True
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"DecoupledDescent looks.*fullgraph"):
        train(forward, optimizer, problem, loss_fn)
    assert optimizer.shadow is None


@pytest.mark.parametrize("curvature", ["probe", "probe_create_graph"])
@pytest.mark.parametrize("way", BEHIND)
def test_second_derivatives_are_no_part_of_one_graph(way, curvature, problem):
    model = make_model()
    forward, optimizer, loss_fn = way(model, problem, curvature, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"compiler\.disable"):
        train(forward, optimizer, problem, loss_fn)
    optimizer.drop_forward()
    assert optimizer.shadow is None
    train(model, optimizer, problem)
    require_close((model, optimizer), eager(problem, curvature), TOLERANCE)


@pytest.mark.parametrize("kind", ["eval", "copy", "detached"])
def test_what_is_not_corrected_is_one_graph(kind, problem):
    model = make_model()
    optimizer = attached(model, problem)
    train(model, optimizer, problem)
    if kind == "detached":
        optimizer.detach()
    plain = copy.deepcopy(model).train(kind != "eval")
    model = plain if kind == "copy" else model.train(kind != "eval")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = plain.head(F.linear(problem[0], plain.first.weight, plain.first.bias))
    torch.testing.assert_close(compiled(problem[0]), expected)
    assert not counters["graph_break"]


# --- The whole step --------------------------------------------------------------------------


def whole_step(model, optimizer, compile_):
    @compile_
    def step(inputs, targets):
        optimizer.zero_grad()
        loss = mean_loss(model(inputs), targets)
        loss.backward(create_graph=optimizer.needs_graph)
        optimizer.step()
        return loss.detach()

    return step


def whole_closure(model, optimizer, compile_):
    @compile_
    def step(inputs, targets):
        def closure():
            optimizer.zero_grad()
            loss = mean_loss(model(inputs), targets)
            loss.backward(create_graph=optimizer.needs_graph)
            return loss

        return optimizer.step(closure).detach()

    return step


def step_alone(model, optimizer, compile_):
    update = compile_(optimizer.step)

    def step(inputs, targets):
        optimizer.zero_grad()
        mean_loss(model(inputs), targets).backward(create_graph=optimizer.needs_graph)
        update()

    return step


def backward_and_told(model, optimizer, compile_):
    @compile_
    def forward_and_backward(inputs, targets, batch):
        optimizer.batch(batch)
        optimizer.zero_grad()
        mean_loss(model(inputs), targets).backward(create_graph=optimizer.needs_graph)

    def step(inputs, targets, batch):
        forward_and_backward(inputs, targets, batch)
        optimizer.step()

    return step


@pytest.mark.parametrize("whole", [True, False], ids=["full batch", "mini-batches"])
@pytest.mark.parametrize("curvature", ["stein", pytest.param("probe", marks=SLOW)])
@pytest.mark.parametrize("make", [whole_step, whole_closure, step_alone, backward_and_told])
def test_compiled_training_steps(make, curvature, whole, problem):
    inputs, targets, _, plan = problem
    plan = [torch.arange(N)] * 8 if whole else plan[:8]
    results = []
    for compile_ in (lambda f: torch.compile(f, backend="aot_eager"), lambda f: f):
        model = make_model()
        optimizer = attached(model, problem, curvature)
        step = make(model, optimizer, compile_)
        for batch in plan:
            told = (batch,) if make is backward_and_told else ()
            step(inputs[batch], targets[batch], *told)
        results.append((model, optimizer))
    require_close(*results, TOLERANCE)


@pytest.mark.parametrize("make", [whole_step, whole_closure, step_alone])
def test_a_training_step_is_not_one_graph(make, problem):
    inputs, targets, _, _ = problem
    model = make_model()
    optimizer = attached(model, problem)
    step = make(model, optimizer, lambda f: torch.compile(f, backend="eager", fullgraph=True))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"DecoupledDescent\.(step|zero_grad)"):
        step(inputs, targets)
    assert optimizer.shadow is None


@pytest.mark.parametrize("make", [whole_step, whole_closure])
def test_what_runs_inside_compiled_code_is_not_audited(make, problem, monkeypatch):
    audits = []
    monkeypatch.setattr(model_watch, "Audit", lambda *arguments, **_: audits.append(arguments))
    inputs, targets, _, _ = problem
    for compile_ in (lambda f: torch.compile(f, backend="eager"), lambda f: f):
        model = make_model()
        step = make(model, attached(model, problem), compile_)
        assert not audits
        step(inputs, targets)
    assert len(audits) == 1


@pytest.mark.filterwarnings("ignore::dd.UnattachedWarning")
def test_unattached_it_is_sgd_in_a_compiled_step():
    inputs, targets = make_problem(dtype=torch.float32)
    models = []
    for kind in (dd.DecoupledDescent, torch.optim.SGD):
        model = make_model()
        optimizer = kind(model.parameters(), lr=0.1, momentum=0.5)
        ours = kind is dd.DecoupledDescent
        update = torch.compile(optimizer.step, backend="eager") if ours else optimizer.step
        for _ in range(4):
            optimizer.zero_grad()
            mean_loss(model(inputs), targets).backward()
            update()
        models.append(model)
    for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(ours, theirs)


# --- Compiled and run before attaching -------------------------------------------------------


@pytest.mark.parametrize("curvature", ["stein", pytest.param("probe", marks=SLOW)])
def test_code_compiled_without_the_correction_leads_to_no_step(curvature, problem):
    inputs, targets, _, plan = problem
    model = make_model()
    compiled = torch.compile(model, backend="aot_eager")
    for batch in (plan[0], plan[1]):
        mean_loss(compiled(inputs[batch]), targets[batch]).backward()
    model.zero_grad()
    optimizer = attached(compiled, problem, curvature)
    with pytest.raises(
        RuntimeError, match=r"step\(\) without a training forward.*compiled and run"
    ):
        train(compiled, optimizer, problem)
    assert optimizer.shadow is None
    torch._dynamo.reset()
    train(compiled, optimizer, problem)
    require_close((model, optimizer), eager(problem, curvature), TOLERANCE)


def test_micro_batches_of_which_compiled_code_hides_one(problem):
    inputs, targets, _, _ = problem
    model = make_model()
    compiled = torch.compile(model, backend="aot_eager")
    mean_loss(compiled(inputs), targets).backward()
    model.zero_grad()
    optimizer = attached(model, problem)
    mean_loss(model(inputs[:50]), targets[:50]).backward()
    mean_loss(compiled(inputs), targets).backward()
    with pytest.raises(RuntimeError, match=r"not the one that the last backward"):
        optimizer.step()


# --- What it costs ---------------------------------------------------------------------------


def test_graph_breaks_and_recompilations_are_bounded(problem):
    """The graph breaks in the layer, in its hook, and where the model comes back from the layer.

    Code is made for the first batch size, for batches of any size, and for a batch of all samples
    where the compiler knows that number already.
    """
    model = make_model()
    optimizer = attached(model, problem)
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled, optimizer, problem)
    sites = {reason.split("\n")[0] for reason in counters["graph_break"]}
    graphs = counters["stats"]["unique_graphs"]
    assert len(sites) <= 3
    assert graphs <= 6
    train(compiled, optimizer, problem)
    assert counters["stats"]["unique_graphs"] == graphs
    optimizer.drop_forward()
    explained = torch._dynamo.explain(model)(problem[0])
    assert explained.graph_count <= 2
    assert explained.graph_break_count <= 3


def test_compiled_evaluation_is_the_eager_one(problem):
    inputs, targets, _, plan = problem
    model = make_model()
    optimizer = attached(model, problem)
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled, optimizer, problem)
    values = [
        optimizer.evaluate(plan[:3], lambda b, f=f: mean_loss(f(inputs[b]), targets[b]))
        for f in (compiled, model)
    ]
    torch.testing.assert_close(*values)
    assert model.training


def test_detached_compiled_training_is_sgd(problem):
    inputs, targets, _, plan = problem
    model = make_model()
    optimizer = attached(model, problem)
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled, optimizer, problem)
    optimizer.detach()
    plain = copy.deepcopy(model)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.5)
    sgd.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for forward, stepping in ((compiled, optimizer), (plain, sgd)):
        for batch in plan:
            stepping.zero_grad()
            mean_loss(forward(inputs[batch]), targets[batch]).backward()
            stepping.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours - theirs).norm() <= TOLERANCE * theirs.norm()
