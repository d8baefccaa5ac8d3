"""State that is saved, loaded or copied: the run goes on as if it had never been interrupted."""

import copy
import io
import pickle
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dd
from dd.noise.model import NoiseModel

N, D, K, C = 48, 20, 3, 3
# Batches of 7: the break lies in the middle of the first epoch.
STEPS, BREAK, ROWS = 9, 4, 7


def make_problem(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % C
    inputs = torch.randn(C, D, generator=g)[labels] + torch.randn(N, D, generator=g)
    return inputs.to(dtype), labels


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, K), nn.Tanh(), nn.Linear(K, C)).to(dtype)


def epochs():
    g = torch.Generator().manual_seed(1)
    return [b for _ in range(2) for b in torch.randperm(N, generator=g).split(ROWS)][:STEPS]


NOISE = {
    "fitted by the optimizer": lambda inputs, labels: None,
    "isotropic": lambda inputs, labels: NoiseModel.isotropic(inputs),
    "components": lambda inputs, labels: NoiseModel.isotropic(inputs, labels),
    "masses": lambda inputs, labels: NoiseModel.fit(inputs, labels, bins=2, per_sample=True),
    "means apart": lambda inputs, labels: NoiseModel.fit(inputs, labels, separate_means=True),
    "nameless": lambda inputs, labels: NoiseModel(torch.tensor([1.1]), torch.tensor([D])),
}


@dataclass
class Case:
    """One kind of training run."""

    settings: dict[str, Any] = field(default_factory=dict)
    noise: str = "fitted by the optimizer"
    batches: list[Tensor] | None = None
    told: bool = False
    dtype: torch.dtype = torch.float32

    def build(self, seed=0):
        model = make_model(self.dtype, seed)
        return model, self.attach_to(model, dd.DecoupledDescent(model.parameters(), **self.all))

    @property
    def all(self):
        return {"lr": 0.2, "momentum": 0.8} | self.settings

    def attach_to(self, model, optimizer):
        inputs, labels = make_problem(self.dtype)
        optimizer.attach(model, noise=NOISE[self.noise](inputs.float(), labels))
        return optimizer

    def forward(self, model, optimizer, step):
        inputs, labels = make_problem(self.dtype)
        batch = torch.arange(N) if self.batches is None else self.batches[step]
        if self.told:
            optimizer.batch(batch)
        return F.cross_entropy(model(inputs[batch]), labels[batch])

    def run(self, pair, steps):
        model, optimizer = pair
        losses = []
        for step in steps:
            optimizer.zero_grad()
            loss = self.forward(model, optimizer, step)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses


CASES = {
    "full batch, probe": Case(),
    "full batch, Stein": Case(
        {"nesterov": True, "weight_decay": 0.1, "curvature": "stein"}, "components"
    ),
    "damped": Case({"damping": 0.5, "lr": torch.tensor(0.2)}, "isotropic"),
    "mini-batches, probe": Case({"curvature": "probe", "seed": 3}, "isotropic", epochs()),
    "mini-batches, Stein": Case({"fused": True, "curvature": "stein"}, "masses", epochs()),
    "without momentum": Case({"momentum": 0.0, "weight_decay": 0.1}, "components", epochs()),
    "told by index": Case({"decoupled_weight_decay": True}, "nameless", epochs(), told=True),
    "a whole batch first": Case(batches=[torch.arange(N), *epochs()[1:]]),
    "corrected head": Case({"head": True}, "means apart", epochs()),
    "bfloat16 weights": Case({}, "components", epochs(), dtype=torch.bfloat16),
}


def through_a_file(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def load_into(pair, states):
    for target, state in zip(pair, states, strict=True):
        target.load_state_dict(state)
    return pair


def states_of(pair):
    return [part.state_dict() for part in pair]


def after_a_forward(case, pair):
    fresh = case.build(seed=1)
    case.forward(*fresh, 0)
    return load_into(fresh, copy.deepcopy(states_of(pair)))


def after_other_steps(case, pair):
    fresh = case.build(seed=1)
    case.run(fresh, range(2))
    return load_into(fresh, copy.deepcopy(states_of(pair)))


def before_attaching(case, pair):
    model = make_model(case.dtype, seed=1)
    optimizer = dd.DecoupledDescent(model.parameters(), **case.all)
    load_into((model, optimizer), copy.deepcopy(states_of(pair)))
    return model, case.attach_to(model, optimizer)


def save_the_pair(case, pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


LOADED = {
    # Uncopied: what is loaded must not be shared with where it came from.
    "state_dict": lambda case, pair: load_into(case.build(1), states_of(pair)),
    "file": lambda case, pair: load_into(case.build(1), through_a_file(states_of(pair))),
    "after a forward": after_a_forward,
    "after other steps": after_other_steps,
    "before attaching": before_attaching,
}
COPIED = {
    "deepcopy": lambda case, pair: copy.deepcopy(pair),
    "pickle": lambda case, pair: pickle.loads(pickle.dumps(pair)),  # noqa: S301
    "save": save_the_pair,
}
WAYS = LOADED | COPIED


def require_identical(one, other):
    """Tensors bit for bit and of one dtype, whatever holds them."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        # Not a number where a sample was not yet seen.
        assert torch.equal(one.nan_to_num(nan=1e30), other.nan_to_num(nan=1e30))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            require_identical(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            require_identical(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_every_way_to_go_on_is_the_uninterrupted_run_bit_for_bit(name, way):
    """The copy and its origin both go on, one after the other: neither may see the other's steps.

    The uninterrupted run calls state_dict() at the same step, which brings all shadows up to date
    and so fixes where their decay is rounded.
    """
    case = CASES[name]
    uninterrupted, origin = case.build(), case.build()
    for pair in (uninterrupted, origin):
        case.run(pair, range(BREAK))
        pair[1].state_dict()
    twin = WAYS[way](case, origin)
    rest = range(BREAK, STEPS)
    expected = case.run(uninterrupted, rest)
    for pair in (twin, origin):
        assert case.run(pair, rest) == expected
        require_identical(states_of(pair), states_of(uninterrupted))


def test_a_state_of_other_samples_brings_its_own_noise():
    """Twice the inputs have four times the variance; what a forward on them fitted is forgotten."""
    case = CASES["full batch, probe"]
    pair, other = case.build(), case.build(seed=1)
    case.run(pair, range(2))
    inputs, labels = make_problem()
    F.cross_entropy(other[0](2 * inputs), labels).backward()
    other[1].step()
    assert float(other[1].noise.mass.sum() / pair[1].noise.mass.sum()) == pytest.approx(4)
    load_into(other, copy.deepcopy(states_of(pair)))
    assert case.run(other, range(2, 4)) == case.run(pair, range(2, 4))
    assert torch.equal(other[1].noise.mass, pair[1].noise.mass)


def test_a_dropped_first_forward_leaves_no_noise_behind():
    case = CASES["full batch, probe"]
    pair, undisturbed = case.build(), case.build()
    pair[0](make_problem()[0][:9])
    pair[1].drop_forward()
    assert pair[1].noise is None
    assert case.run(pair, range(3)) == case.run(undisturbed, range(3))


def test_hooks_may_exchange_the_state_that_is_loaded():
    case = CASES["bfloat16 weights"]
    pair, fresh = case.build(), case.build(seed=1)
    case.run(pair, range(BREAK))
    states = copy.deepcopy(states_of(pair))
    fresh[1].register_load_state_dict_pre_hook(lambda _, given: given["wrapped"])
    fresh[0].load_state_dict(states[0])
    empty = {"state": {}, "param_groups": states[1]["param_groups"]}
    fresh[1].load_state_dict({**empty, "wrapped": states[1]})
    require_identical(states_of(fresh), states_of(pair))


NUMPY_SETTINGS = {
    "lr": {"lr": np.geomspace(0.01, 1, 4)[1]},
    "array": {"lr": np.array(0.1), "momentum": np.array(0.5), "weight_decay": np.array(0.1)},
    "integer": {"lr": np.int64(1), "weight_decay": np.int64(0)},
    "single": {"momentum": np.float32(0.5), "dampening": np.float32(0.1)},
    "switch": {"nesterov": np.bool_(True), "seed": np.int64(3), "damping": np.float64(1)},
}


@pytest.mark.parametrize("kind", NUMPY_SETTINGS)
def test_settings_of_numpy_make_a_state_that_loads_by_default(kind):
    case = Case({"momentum": 0.5} | NUMPY_SETTINGS[kind])
    pair = case.build()
    case.run(pair, range(2))
    again = load_into(case.build(1), through_a_file(states_of(pair)))
    assert case.run(again, range(2, 4)) == case.run(pair, range(2, 4))


def test_a_schedule_of_numpy_and_a_group_of_numpy_make_a_state_that_loads_by_default():
    model = make_model()
    layers = [{"params": model[0].parameters(), "lr": np.float64(0.2)}]
    optimizer = dd.DecoupledDescent(layers, lr=0.1)
    optimizer.add_param_group({"params": model[2].parameters(), "weight_decay": np.float32(0.1)})
    optimizer.attach(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.exp(-step / 10))
    Case().run((model, optimizer), range(2))
    state = through_a_file(optimizer.state_dict())
    assert [group["lr"] for group in state["param_groups"]] == [0.2, 0.1]
    assert state["param_groups"][1]["weight_decay"] == pytest.approx(0.1)


def test_a_state_of_other_groups_is_refused_and_leaves_no_hook():
    case = CASES["full batch, probe"]
    pair = case.build()
    state = {"state": {}, "param_groups": []}
    for _ in range(2):
        with pytest.raises(ValueError, match="different number of parameter groups"):
            pair[1].load_state_dict(state)
    assert not pair[1]._optimizer_load_state_dict_pre_hooks


@pytest.mark.parametrize("group", [None, False])
def test_copies_train_alone_where_their_origin_did(group):
    model = make_model()
    optimizer = dd.DecoupledDescent(model, lr=0.1, process_group=group)
    _, twin = copy.deepcopy((model, optimizer))
    assert twin._process_group is group


def test_a_copy_made_between_backward_and_step_has_no_pending_forward():
    case = CASES["mini-batches, Stein"]
    pair = case.build()
    case.run(pair, range(2))
    case.forward(*pair, 2).backward()
    twin = copy.deepcopy(pair)
    pair[1].zero_grad()
    rest = range(2, 6)
    assert case.run(twin, rest) == case.run(pair, rest)


def test_a_running_average_of_the_model_is_plain():
    case = CASES["mini-batches, Stein"]
    model, optimizer = pair = case.build()
    average = torch.optim.swa_utils.AveragedModel(model)
    for step in range(4):
        case.run(pair, [step])
        average.update_parameters(model)
    inputs, _ = make_problem()
    plain = make_model(seed=1)
    plain.load_state_dict(average.module.state_dict())
    assert torch.equal(average(inputs), plain(inputs))
    assert not optimizer._attachment.pending


def test_a_copy_of_the_optimizer_alone_belongs_to_a_copy_of_the_model():
    case = CASES["mini-batches, Stein"]
    model, optimizer = pair = case.build()
    case.run(pair, range(2))
    alone = copy.deepcopy(optimizer)
    states = copy.deepcopy(states_of(pair))
    alone.step()
    require_identical(states_of(pair), states)
    assert alone.layer is not model[0]


def test_generations_of_copies_carry_one_hook_each():
    case = CASES["full batch, probe"]
    pair = case.build()
    for _ in range(3):
        pair = copy.deepcopy(pair)
    assert len(pair[0][0]._forward_hooks) == 1
    pair[1].detach()
    assert not pair[0][0]._forward_hooks


def test_a_state_passes_through_the_meta_device():
    case = CASES["bfloat16 weights"]
    pair = case.build()
    case.run(pair, range(BREAK))
    states = copy.deepcopy(states_of(pair))
    model = make_model(case.dtype).to("meta")
    early = case.attach_to(model, dd.DecoupledDescent(model.parameters(), **case.all))
    early.load_state_dict(states[1])
    shadow = early.shadow
    assert shadow.is_meta
    assert shadow.dtype == torch.float32
    # The parameters that the meta ones make room for are not the optimizer's.
    model.to_empty(device="cpu").load_state_dict(states[0])
    with pytest.raises(RuntimeError, match=r"layer '0' has another weight.*to_empty"):
        case.run((model, early), [BREAK])
    early.detach()
    late = case.attach_to(model, dd.DecoupledDescent(model.parameters(), **case.all))
    late.load_state_dict(states[1])
    assert case.run((model, late), range(BREAK, STEPS)) == case.run(pair, range(BREAK, STEPS))


@pytest.mark.parametrize("steps", [0, 3])
def test_weights_made_double_later_follow_the_run_that_was_double(steps):
    """Half the run in single precision: its rounding, 2^-24 each step, is all that differs."""
    case = CASES["without momentum"]
    single, double = case.build(), case.build()
    double[0].double()
    wide = replace(case, dtype=torch.float64)
    wide.run(double, range(steps))
    case.run(single, range(steps))
    single[0].double()
    # Each of a step's few dozen sums rounds once, and no step enlarges what came before.
    tolerance = {"rtol": 64 * STEPS * 2.0**-24, "atol": 64 * STEPS * 2.0**-24}
    losses = [wide.run(pair, range(steps, STEPS)) for pair in (single, double)]
    torch.testing.assert_close(*losses, **tolerance)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["full batch, probe", "mini-batches, Stein", "bfloat16 weights"])
def test_a_state_of_the_cpu_goes_on_on_cuda(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    case = CASES[name]
    pair = case.build()
    case.run(pair, range(BREAK))
    states = copy.deepcopy(states_of(pair))
    model = make_model(case.dtype, seed=1).cuda()
    optimizer = case.attach_to(model, dd.DecoupledDescent(model.parameters(), **case.all))
    load_into((model, optimizer), states)
    assert optimizer.shadow.is_cuda
    inputs, labels = (t.cuda() for t in make_problem(case.dtype))
    for step in range(BREAK, BREAK + 2):
        batch = torch.arange(N) if case.batches is None else case.batches[step]
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[batch]), labels[batch]).backward()
        optimizer.step()
    back = case.build(seed=1)
    load_into(back, [copy.deepcopy(state) for state in states_of((model, optimizer))])
    assert not back[1].shadow.is_cuda
    case.run(back, range(BREAK + 2, STEPS))
