"""Many trials as one computation, against the same trials one at a time."""

import io
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dd
from dd.training.loop import measure
from dd.trials import trial_chunks
from dd.trials.results import METRICS

N, N_TEST, D, K, C = 200, 50, 60, 4, 2
STEPS = 20

SGD = partial(torch.optim.SGD, lr=0.3)
DD = partial(dd.DecoupledDescent, lr=0.3)
FAST = {"momentum": 0.8, "dampening": 0.0, "weight_decay": 0.02, "nesterov": True}


@dataclass(frozen=True)
class Data:
    train_inputs: Tensor
    train_targets: Tensor
    train_components: Tensor
    test_inputs: Tensor
    test_targets: Tensor


def make_split(seed: int, dtype=torch.float64, scale: Tensor | None = None) -> Data:
    """XOR with four clusters."""
    g = torch.Generator().manual_seed(seed)
    means = 2.5 * torch.linalg.qr(torch.randn(D, 2, generator=g, dtype=dtype)).Q.mT
    means = torch.cat([means, -means])

    def draw(count: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(4, (count,), generator=g)
        noise = torch.randn(count, D, generator=g, dtype=dtype)
        return means[ids] + noise * (1 if scale is None else scale.to(dtype)), ids

    train, ids = draw(N)
    test, test_ids = draw(N_TEST)
    return Data(train, ids % 2, ids, test, test_ids % 2)


def make_model(seed: int, split: Data, activation=nn.GELU, *, bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(D, K, bias=bias), activation(), nn.Linear(K, C))
    return model.to(split.train_inputs.dtype)


def alone(make, seed, *, split=None, model=None, noise=None, steps=STEPS, loss=F.cross_entropy):
    """Figures of every step, shape (steps + 1, 6), and the last weights of one trial by itself."""
    split = make_split(seed) if split is None else split
    model = make_model(seed, split) if model is None else model
    if make.func is dd.DecoupledDescent:
        optimizer = make(model, noise=noise)
    else:
        optimizer = make(model.parameters())
    figures = []
    for step in range(steps + 1):
        figures.append([measure(model, split)[name] for name in METRICS])
        if step == steps:
            break
        optimizer.zero_grad()
        graph = getattr(optimizer, "needs_graph", False)
        loss(model(split.train_inputs), split.train_targets).backward(create_graph=graph)
        optimizer.step()
    return torch.tensor(figures, dtype=torch.float64), {
        k: p.detach() for k, p in model.named_parameters()
    }


@lru_cache
def alone_by_sgd(seed):
    return alone(SGD, seed)


def assert_alike(trials, name, position, figures, weights, rtol=1e-9):
    found = torch.stack([trials.metrics[name][metric][position] for metric in METRICS], 1)
    # An error is a count, and one sample on the border may fall to either side.
    atol = torch.tensor([1e-12, 1e-12, 0, 0, 1e-12, 0]) if rtol < 1e-6 else 1e-2
    assert found.shape == figures.shape
    assert ((found - figures).abs() <= atol + rtol * figures.abs()).all()
    for key, weight in weights.items():
        torch.testing.assert_close(
            trials.weights[name][key][position],
            weight,
            rtol=rtol,
            atol=rtol * float(weight.abs().max()),
        )


def isotropic(split):
    return dd.NoiseModel.isotropic(split.train_inputs)


def with_components(split):
    return dd.NoiseModel.isotropic(split.train_inputs, split.train_components)


def bins_by_seed(split):
    """Two bins, or three, by the parity of the first sample's component."""
    count = 2 + int(split.train_components[0]) % 2
    sizes = torch.tensor([10, D - 10] if count == 2 else [10, 20, D - 30])
    values = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)[:count]
    return dd.NoiseModel(values, sizes)


def with_masses(split):
    """A mass for every sample in every second trial."""
    noise = with_components(split)
    if split.train_components[0] % 2:
        return noise
    g = torch.Generator().manual_seed(5)
    return replace(noise, relative_mass=0.5 + torch.rand(N, generator=g, dtype=torch.float64))


CASES = {
    "sgd": (SGD, None),
    "sgd, fast": (partial(SGD, **FAST), None),
    "probe": (DD, isotropic),
    "fitted by itself": (DD, None),
    "stein": (partial(DD, curvature="stein"), with_components),
    "bins": (DD, bins_by_seed),
    "fast": (partial(DD, **FAST), isotropic),
    "fast, stein": (partial(DD, curvature="stein", **FAST), with_components),
    "known components": (DD, with_components),
    "decoupled decay": (partial(DD, weight_decay=0.1, decoupled_weight_decay=True), isotropic),
    "fused": (partial(DD, fused=True, momentum=0.5), isotropic),
    "half damped": (partial(DD, damping=0.5), isotropic),
    "undamped": (partial(DD, damping=0.0, curvature="stein"), with_components),
    "damped, fitted by itself": (partial(DD, damping=0.5), None),
    "masses, probe": (partial(DD, curvature="probe"), with_masses),
    "masses, stein": (partial(DD, curvature="stein"), with_masses),
    "another seed": (partial(DD, seed=7), isotropic),
    "ascent": (partial(DD, lr=0.01, maximize=True), isotropic),
}


def test_the_cases_mix_trials_of_different_noise():
    """Seeds 0 and 4, which the cases are run on, differ in bins and in masses."""
    splits = [make_split(0), make_split(4)]
    assert {len(bins_by_seed(split).eigenvalues) for split in splits} == {2, 3}
    assert {with_masses(split).relative_mass is None for split in splits} == {True, False}


@pytest.mark.parametrize("case", CASES)
def test_a_trial_comes_out_as_it_does_by_itself(case):
    """Losses, errors and last weights of all steps; double precision leaves rounding alone.

    Rounding of 1e-16 in sums of 200 terms grows over 20 steps by a small power of ten: 1e-9 is far
    above that and far below what any term of the update moves.
    """
    make, noise = CASES[case]
    seeds = [0, 4]
    trials = dd.run_trials(
        make_split, make_model, {"gd": SGD, "it": make}, seeds=seeds, steps=STEPS, noise=noise
    )
    assert trials.failures == ()
    for position, seed in enumerate(seeds):
        given = None if noise is None else noise(make_split(seed))
        assert_alike(trials, "it", position, *alone(make, seed, noise=given))
        assert_alike(trials, "gd", position, *alone_by_sgd(seed))


@pytest.mark.parametrize("make", [SGD, DD], ids=["sgd", "dd"])
def test_single_precision_agrees_to_its_rounding(make):
    """Rounding of 6e-8 in sums of 200 terms, √200 · 6e-8 = 1e-6, over 20 steps: 1e-4 in all."""
    split = partial(make_split, dtype=torch.float32)
    trials = dd.run_trials(split, make_model, {"it": make}, seeds=[3, 4], steps=STEPS)
    for position, seed in enumerate([3, 4]):
        assert_alike(trials, "it", position, *alone(make, seed, split=split(seed)), rtol=1e-4)
    assert trials.weights["it"]["0.weight"].dtype == torch.float32


def deep(seed, split):
    torch.manual_seed(seed)
    head = [nn.Tanh(), nn.Linear(K, 5), nn.LayerNorm(5), nn.ReLU(inplace=True), nn.Linear(5, C)]
    return nn.Sequential(nn.Linear(D, K), *head).to(split.train_inputs.dtype)


def frozen(seed, split):
    model = make_model(seed, split)
    model[2].requires_grad_(False)
    return model


class Loud(nn.Module):
    """Louder in train mode."""

    def forward(self, scores):
        return 1.5 * scores if self.training else scores


MODELS = {
    "relu": partial(make_model, activation=nn.ReLU),
    "in place": partial(make_model, activation=partial(nn.ReLU, inplace=True)),
    "silu": partial(make_model, activation=nn.SiLU),
    "no bias": partial(make_model, bias=False),
    "deep": deep,
    "frozen head": frozen,
    "another in train mode": lambda *which: nn.Sequential(*make_model(*which), Loud()),
}


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("curvature", ["probe", "stein"])
@pytest.mark.parametrize("network", MODELS)
def test_any_network_that_begins_with_a_linear_layer(network, curvature):
    """Kinks included: some networks are of ReLU units."""
    model = MODELS[network]
    together, noise = partial(DD, curvature=curvature), with_components
    # SiLU has no forward-mode derivatives; through the graph the probes are the same.
    make = together if curvature == "stein" else partial(DD, curvature="probe_create_graph")
    trials = dd.run_trials(
        make_split, model, {"gd": SGD, "it": together}, seeds=[0, 1], steps=5, noise=noise
    )
    for position, seed in enumerate([0, 1]):
        split = make_split(seed)
        twin = partial(alone, seed=seed, split=split, steps=5)
        by_dd = twin(make, model=model(seed, split), noise=noise(split))
        assert_alike(trials, "it", position, *by_dd)
        assert_alike(trials, "gd", position, *twin(SGD, model=model(seed, split)))


def smoothed(scores, targets):
    return F.cross_entropy(scores, targets, label_smoothing=0.1)


def squares(scores, targets):
    return (scores - F.one_hot(targets, C)).square().sum(1).mean()


@pytest.mark.parametrize("loss", [smoothed, squares])
def test_another_loss_is_descended_and_recorded(loss):
    trials = dd.run_trials(
        make_split, make_model, {"it": DD}, seeds=[2], steps=8, noise=isotropic, loss=loss
    )
    split = make_split(2)
    _, weights = alone(DD, 2, noise=isotropic(split), steps=8, loss=loss)
    for key, weight in weights.items():
        torch.testing.assert_close(trials.weights["it"][key][0], weight)
    model = make_model(2, split)
    expected = loss(model(split.test_inputs), split.test_targets).detach()
    torch.testing.assert_close(trials.metrics["it"]["test_loss"][0, 0], expected)


def test_probes_of_each_trial_may_have_a_seed_of_their_own():
    seeds = [3, 8]
    trials = dd.run_trials(
        make_split,
        make_model,
        {"it": DD},
        seeds=seeds,
        steps=STEPS,
        noise=isotropic,
        probe_seed=lambda seed: seed + 1,
    )
    for position, seed in enumerate(seeds):
        noise = isotropic(make_split(seed))
        assert_alike(trials, "it", position, *alone(partial(DD, seed=seed + 1), seed, noise=noise))


# --- Chunks ----------------------------------------------------------------------------------


def run(**changes):
    settings = {"seeds": [4, 0, 4, 2, 9], "steps": 12, "record_every": 5, "noise": bins_by_seed}
    return dd.run_trials(make_split, make_model, {"gd": SGD, "dd": DD}, **(settings | changes))


@pytest.mark.parametrize("probe_seed", [None, lambda seed: 3 * seed])
def test_chunks_change_nothing(probe_seed):
    whole = run(memory=2**40, probe_seed=probe_seed)
    parts = run(memory=1, probe_seed=probe_seed)
    assert whole.seeds == parts.seeds == (4, 0, 4, 2, 9)
    assert whole.steps.tolist() == parts.steps.tolist() == [0, 5, 10, 12]
    for name, metrics in whole.metrics.items():
        for key, values in metrics.items():
            assert values.shape == (5, 4)
            assert values.dtype == torch.float64
            torch.testing.assert_close(values, parts.metrics[name][key], rtol=1e-10, atol=1e-12)
            # Seed 4 was given twice.
            torch.testing.assert_close(values[0], values[2])
        for key, weights in whole.weights[name].items():
            torch.testing.assert_close(weights, parts.weights[name][key])


def test_chunks_come_one_by_one_and_can_be_joined():
    made = []

    def counted(seed):
        made.append(seed)
        return make_split(seed)

    chunks = trial_chunks(counted, make_model, {"gd": SGD}, seeds=[1, 2, 3], steps=2, memory=1)
    assert made == []
    first = next(chunks)
    assert first.seeds == (1,)
    assert 3 not in made
    joined = dd.Trials.joined([first, *chunks])
    assert joined.seeds == (1, 2, 3)
    assert joined.seconds > first.seconds > 0
    with pytest.raises(ValueError, match="nothing to join"):
        dd.Trials.joined([])
    other = dd.run_trials(make_split, make_model, {"gd": SGD}, seeds=[1], steps=3)
    with pytest.raises(ValueError, match=r"same optimizers.*\['gd'\] at 3 steps.*at 4"):
        dd.Trials.joined([first, other])


def test_results_are_the_callers_own():
    """The networks and data that were given are left as they are."""
    split = make_split(0)
    model = make_model(0, split)
    before = {k: p.clone() for k, p in model.named_parameters()}
    state = torch.get_rng_state()
    dd.run_trials(lambda seed: split, lambda *_: model, {"dd": DD}, seeds=[0, 0], steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key])


def test_a_trial_that_turns_non_finite_leaves_the_others_alone():
    def unstable(seed, split):
        model = make_model(seed, split)
        if seed == 1:
            with torch.no_grad():
                model[2].weight.mul_(1e160)
        return model

    def go(model):
        return dd.run_trials(
            make_split, model, {"gd": SGD, "dd": DD}, seeds=[0, 1, 2], steps=6, noise=isotropic
        )

    sound, broken = go(make_model), go(unstable)
    assert sound.failures == ()
    assert {(name, seed) for name, seed, _ in broken.failures} == {("gd", 1), ("dd", 1)}
    for name, seed, step in broken.failures:
        values = torch.stack([broken.metrics[name][metric][seed] for metric in METRICS])
        assert values[:, :step].isfinite().all()
        assert values[:, step:].isnan().all()
    assert {failure.step for failure in broken.failures} <= {1, 2}
    for name, metrics in sound.metrics.items():
        for key, values in metrics.items():
            assert torch.equal(broken.metrics[name][key][[0, 2]], values[[0, 2]])


def test_a_failure_at_the_last_state_is_told():
    def overflowing(seed, split):
        model = make_model(seed, split)
        with torch.no_grad():
            model[2].weight.mul_(1e160)
        return model

    trials = dd.run_trials(make_split, overflowing, {"gd": SGD}, seeds=[0], steps=1)
    assert trials.failures == (("gd", 0, 1),)


def test_progress_is_shown_on_request():
    for show in (False, True):
        out = io.StringIO()
        with redirect_stdout(out):
            run(progress=show)
        assert ("5 trials" in out.getvalue()) == show
        assert ("60/60" in out.getvalue()) == show


# --- What is refused -------------------------------------------------------------------------


def refused(kind, match, **changes):
    settings = {
        "make_split": make_split,
        "make_model": make_model,
        "optimizers": {"it": DD},
        "seeds": [0, 1],
        "steps": 2,
    }
    with pytest.raises(kind, match=match):
        dd.run_trials(**(settings | changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seeds": []}, "seeds is empty; give at least one"),
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"record_every": 1.5}, "record_every must be a positive integer, got 1.5"),
        ({"memory": 0}, "memory must be a positive integer, got 0"),
        ({"optimizers": {}}, "must map at least one name"),
        ({"optimizers": [DD]}, "must map at least one name"),
    ],
    ids=str,
)
def test_arguments_out_of_range(changes, match):
    refused(ValueError, match, **changes)


@pytest.mark.parametrize(
    ("make", "kind", "match"),
    [
        ("dd", TypeError, "must be callable with parameters, got 'dd'"),
        (partial(torch.optim.Adam, lr=0.1), TypeError, "must make a torch.optim.SGD.*got a Adam"),
        (partial(DD, lr="auto"), ValueError, 'lr="auto" searches every step'),
        (partial(DD, head=True), ValueError, "use head=False"),
        (partial(DD, curvature="exact"), ValueError, "got 'exact'; \"probe\""),
        (partial(DD, curvature="probe_create_graph"), ValueError, "got 'probe_create_graph'"),
        (partial(DD, layer="0"), ValueError, "could not be made from a list.*noise= of run_trials"),
        (partial(DD, damping=2.0), ValueError, "could not be made.*damping must lie in"),
        (partial(DD, differentiable=True), ValueError, "differentiable=True"),
        (
            lambda p: torch.optim.SGD([{"params": [x]} for x in [*p, torch.zeros(1)]], lr=0.1),
            ValueError,
            "in one group, got 2",
        ),
    ],
)
def test_optimizers_that_cannot_be_batched(make, kind, match):
    """They are refused before any data are made."""

    def unwanted(seed):
        raise AssertionError

    refused(kind, match, optimizers={"it": make}, make_split=unwanted)


def changed(**changes):
    return lambda seed: replace(make_split(seed), **(changes if seed else {}))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            changed(train_inputs=torch.full((N, D), torch.nan).double()),
            "train_inputs of seed 1 contain NaN",
        ),
        (
            changed(test_inputs=torch.full((N_TEST, D), torch.inf).double()),
            "test_inputs of seed 1 contain NaN or infinity",
        ),
        (changed(train_inputs=torch.zeros(N, 2, D).double()), r"matrix.*\(200, 2, 60\).*flatten"),
        (changed(train_inputs=torch.zeros(N, D).long()), "floating-point matrix"),
        (changed(train_targets=torch.zeros(3, dtype=torch.long)), r"200 classes.*shape \(3,\)"),
        (changed(test_targets=torch.zeros(N_TEST)), "int64, got .* of torch.float32"),
        (
            changed(test_inputs=torch.zeros(3, D).double(), test_targets=torch.zeros(3).long()),
            r"test_inputs of seed 1 have shape \(3, 60\).*first trial \(50, 60\)",
        ),
        (changed(train_inputs=torch.zeros(N, D)), "of torch.float32, those of the first trial"),
    ],
)
def test_data_that_do_not_fit(make, match):
    refused(ValueError, match, make_split=make)


def wide(seed, split):
    return (
        make_model(0, split)
        if seed == 0
        else nn.Sequential(nn.Linear(D, 9), nn.Linear(9, C)).double()
    )


def tied(seed, split):
    model = make_model(seed, split)
    again = nn.Linear(C, C).double()
    return nn.Sequential(*model, again, again)


def stuck(seed, split):
    model = make_model(seed, split)
    model[0].weight.requires_grad_(False)
    return model


def frozen_later(seed, split):
    model = make_model(seed, split)
    model[-1].weight.requires_grad_(seed == 0)
    return model


def one_output(seed, split):
    return nn.Sequential(*make_model(seed, split)[:-1], nn.Linear(K, 1).double())


def followed_by(*modules):
    return lambda seed, split: nn.Sequential(*make_model(seed, split), *modules)


@pytest.mark.parametrize(
    ("make", "kind", "match"),
    [
        (lambda *_: nn.Linear(D, C).double(), TypeError, "nn.Sequential whose first.*got Linear"),
        (lambda *_: nn.Sequential(), TypeError, "nn.Sequential whose first.*got Sequential"),
        (lambda *_: nn.Sequential(nn.Flatten(), nn.Linear(D, C)), TypeError, "got Flatten"),
        (lambda *_: nn.Sequential(nn.Linear(7, C)), ValueError, "takes 7 inputs.*data have 60"),
        (lambda *_: nn.Sequential(nn.Linear(D, C)), ValueError, "0.weight in torch.float32, but"),
        (stuck, ValueError, "frozen first layer"),
        (followed_by(nn.BatchNorm1d(C).double()), ValueError, r"buffers \(3.running_mean"),
        (followed_by(nn.Dropout()), ValueError, "Dropout.*drawn anew"),
        (tied, ValueError, "parameters that several modules share"),
        (wide, ValueError, "one architecture.*but that of seed 1 is"),
        (frozen_later, ValueError, "the same parameters trained, but that of seed 1"),
        (one_output, ValueError, r"two classes or more.*got \(2, 1\)"),
    ],
)
def test_networks_that_cannot_be_batched(make, kind, match):
    refused(kind, match, make_model=make)


def some_components(split):
    known = torch.equal(split.train_inputs, make_split(0).train_inputs)
    return (with_components if known else isotropic)(split)


@pytest.mark.parametrize(
    ("make", "noise", "match"),
    [
        (
            partial(DD, curvature="stein"),
            isotropic,
            'curvature="stein" needs the mixture component',
        ),
        (DD, some_components, "of some trials know the components and those of others do not"),
        (partial(DD, damping=0.5), bins_by_seed, "damping=0.5 is defined for isotropic noise"),
        (
            DD,
            lambda split: dd.NoiseModel.isotropic(split.train_inputs[:, :9]),
            "200 samples of 9 inputs, but a trial has 200 of 60",
        ),
        (
            DD,
            lambda split: dd.NoiseModel.isotropic(
                split.train_inputs[:99], split.train_components[:99]
            ),
            "describes 99 samples",
        ),
        (
            DD,
            lambda split: dd.NoiseModel.fit(
                split.train_inputs, split.train_components, separate_means=True
            ),
            "only head=True",
        ),
    ],
)
def test_noise_models_that_do_not_fit(make, noise, match):
    refused(ValueError, match, optimizers={"it": make}, noise=noise)


def test_too_few_samples_for_the_probes():
    def few(seed):
        split = make_split(seed)
        return replace(
            split, train_inputs=split.train_inputs[:3], train_targets=split.train_targets[:3]
        )

    refused(ValueError, "3 samples do not resolve the curvature of 4 units", make_split=few)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("curvature", ["probe", "stein"])
def test_a_cuda_device_agrees_with_trials_one_at_a_time_there(curvature):
    """Probes are drawn on the device, so that the twin is trained there, too; rounding as above."""
    seeds, noise, make = [0, 4], with_components, partial(DD, curvature=curvature)
    trials = dd.run_trials(
        make_split, make_model, {"it": make}, seeds=seeds, steps=STEPS, noise=noise, device="cuda"
    )
    for position, seed in enumerate(seeds):
        on_cpu = make_split(seed)
        split = Data(*(tensor.cuda() for tensor in vars(on_cpu).values()))
        model = make_model(seed, on_cpu).cuda()
        figures, weights = alone(make, seed, split=split, model=model, noise=noise(on_cpu))
        on_host = {key: weight.cpu() for key, weight in weights.items()}
        assert_alike(trials, "it", position, figures, on_host, rtol=1e-8)


@pytest.mark.parametrize(
    ("settings", "kind", "match"),
    [
        ({"seeds": 5}, TypeError, r"seeds must be some integers, got 5; try range\(5\)"),
        ({"noise": dd.NoiseModel(torch.ones(1), torch.tensor([D]))}, TypeError, "noise must make"),
        ({"loss": partial(F.cross_entropy, reduction="none")}, ValueError, "loss must return the"),
        ({"loss": lambda scores, targets: 1.0}, ValueError, "one number in a tensor, got"),
    ],
)
def test_arguments_of_other_kinds(settings, kind, match):
    refused(kind, match, **settings)


def test_optimizers_take_the_parameters_that_they_are_given():
    other = [nn.Parameter(torch.zeros(3))]
    refused(
        ValueError,
        "all the parameters that it is given, and of no others",
        optimizers={"gd": lambda parameters: torch.optim.SGD(other, lr=0.1)},
    )


def test_trials_print_in_a_line():
    found = dd.run_trials(make_split, make_model, {"it": DD}, seeds=[0, 1], steps=2)
    error = float(found.metrics["it"]["test_error"][:, -1].mean())
    assert f"Trials(2 trials of 2 steps; mean test error at the end: it {error:.4f};" in repr(found)
