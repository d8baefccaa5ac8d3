"""One test for every optimizer: each goes through the same features of a loop."""

import copy
import warnings

import pytest
import torch
from torch import nn

import dd
from tests.any_optimizer import CASES, has_found, make
from tests.test_decouple import (
    full,
    load_all,
    mini,
    network,
    problem,
    rest_of,
    states_from_file,
    train,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::dd.ResponseWarning"),
    # The deprecations and notes of other packages' optimizers.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


# One of every kind; the others are like them, and run with the slow tests.
KINDS = ("SGD nesterov", "AdamW", "Adafactor", "Muon", "Schedule-Free SGD", "Schedule-Free AdamW")


def each(names):
    """Parametrise by name, slow but for one of every kind."""
    marked = [pytest.param(n, marks=[] if n in KINDS else [pytest.mark.slow]) for n in names]
    return pytest.mark.parametrize("name", marked)


EACH, EACH_CONTINUOUS = each(CASES), each([name for name in CASES if name != "SOAP"])


def built(name, dtype=torch.float64, wrap=lambda model: model):
    (X, y, components), _ = problem()
    model = network(dtype=dtype)
    own = make(name, [model[0].weight])
    optimizers = [own, torch.optim.SGD(rest_of(model), lr=0.1)]
    noise = dd.NoiseModel.fit(X, components)
    wrapped = wrap(model)
    tracker = dd.decouple(wrapped, *optimizers, noise=noise)
    return X.to(dtype), y, wrapped, optimizers, tracker


def run(name, batches=None, between=None, **settings):
    X, y, model, optimizers, tracker = built(name, **settings)
    edit = (lambda: None) if between is None else lambda: between(model, optimizers)
    train(model, optimizers, full(X, y, 6) if batches is None else batches(X, y), edit)
    return tracker.shadow.clone(), tracker


def close(one, other, tolerance=1e-6):
    off = torch.linalg.vector_norm(one.double() - other.double())
    return bool(off <= tolerance * torch.linalg.vector_norm(other.double()))


@pytest.mark.parametrize("name", CASES)
def test_response_is_found_as_its_kind_has_it(name):
    shadow, tracker = run(name)
    assert bool(shadow.isfinite().all())
    assert shadow.norm() > 0
    assert has_found(name, tracker.response)
    assert 0 < tracker.response.share <= 1 + 1e-9


@EACH
def test_absent_samples_catch_up_to_the_same_shadows(name):
    """Whether they go through the maps of steps at their next batch, or all after every step."""
    X, y, model, optimizers, tracker = built(name)
    train(model, optimizers, mini(X, y, 8, size=50))
    found = tracker.shadow.clone()
    X, y, model, optimizers, tracker = built(name)
    for batch in mini(X, y, 8, size=50):
        train(model, optimizers, [batch])
        tracker.shadow  # noqa: B018 - brings all samples up to date
    assert close(found, tracker.shadow)


# SOAP's first eigenvectors are those of a matrix of low rank, and rounding chooses among them.
@EACH_CONTINUOUS
def test_accumulated_gradients_are_those_of_one_pass(name):
    found = run(name)[0]
    X, y, model, optimizers, tracker = built(name)
    for _ in range(6):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for rows in torch.arange(len(X)).chunk(3):
            loss = nn.functional.cross_entropy(model(X[rows]), y[rows])
            (loss * len(rows) / len(X)).backward()
        for optimizer in optimizers:
            optimizer.step()
    # Sign-like updates turn what rounding leaves of the smallest gradients; Muon in bfloat16 does.
    assert close(tracker.shadow, found, 0.02 if name.startswith("Muon") else 1e-5)


@pytest.mark.parametrize("clip", ["norm", "value"])
@EACH
def test_clipped_gradients_are_followed(name, clip):
    def edit(model, optimizers):
        if clip == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        else:
            nn.utils.clip_grad_value_([model[0].weight], 0.02)

    shadow, tracker = run(name, between=edit)
    assert bool(shadow.isfinite().all())
    assert shadow.norm() > 0
    if clip == "norm":
        assert has_found(name, tracker.response)


@EACH
def test_scheduled_rates_are_followed(name):
    X, y, model, optimizers, tracker = built(name)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizers[0], lambda step: min(1.0, step / 3))
    for batch in full(X, y, 8):
        train(model, optimizers, [batch])
        warm_up.step()
    assert tracker.shadow.norm() > 0
    assert has_found(name, tracker.response)


@EACH
def test_scaled_losses_are_followed(name):
    X, y, model, optimizers, tracker = built(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(6):
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(X), y)).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    assert close(tracker.shadow, run(name)[0], 0.02 if name.startswith("Muon") else 1e-5)


@EACH
def test_training_goes_on_from_saved_states(name):
    # In double precision NAdam itself does not: torch casts its mu_product when it loads it.
    single = {"dtype": torch.float32}
    X, y, model, optimizers, tracker = built(name, **single)
    train(model, optimizers, full(X, y, 4))
    # The optimizers' own states may hold what is no tensor.
    states = states_from_file([model, *optimizers, tracker], weights_only=False)
    train(model, optimizers, full(X, y, 4))
    _, _, again, others, other = built(name, **single)
    load_all([again, *others, other], states)
    train(again, others, full(X, y, 4))
    assert torch.equal(again[0].weight, model[0].weight)
    assert torch.equal(other.shadow, tracker.shadow)


@EACH
def test_copies_of_an_optimizer_are_plain(name):
    X, y, model, optimizers, tracker = built(name)
    train(model, optimizers, full(X, y, 2))
    twin = copy.deepcopy(optimizers[0])
    assert not twin._optimizer_step_pre_hooks
    assert not twin._optimizer_step_post_hooks
    assert twin.param_groups[0]["params"][0] is not tracker.layer.weight


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam", "Muon", "Schedule-Free SGD"])
def test_compiled_models_are_followed(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = run(name, wrap=lambda model: torch.compile(model, backend="eager"))[0]
    assert close(found, run(name)[0], 0.02 if name.startswith("Muon") else 1e-6)


# Where the error is known to be off, told by ResponseWarning or ShadowWarning (docs/optimizers.md).
COARSE = ("Rprop", "SOAP", "Shampoo", "Prodigy", "AdEMAMix")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dd.ShadowWarning", "ignore::dd.ComponentWarning")
@pytest.mark.parametrize("batches", [full, mini])
@pytest.mark.parametrize("name", [name for name in CASES if name not in COARSE])
def test_training_error_is_nearer_to_the_test_error_than_plain(name, batches):
    n, d = 1600, 400
    gaps = {}
    for followed in (True, False):
        (X, y, components), (X_test, y_test, _) = problem(n=n, d=d, size=3.5)
        model = network(d=d, k=8)
        model[1] = nn.GELU()
        optimizers = [make(name, [model[0].weight]), torch.optim.SGD(rest_of(model), lr=0.2)]
        if followed:
            noise = dd.NoiseModel.fit(X, components)
            tracker = dd.decouple(model, *optimizers, noise=noise)
        found = []
        plan = batches(X, y, 100, **({"size": 400} if batches is mini else {}))
        for at, batch in enumerate(plan):
            train(model, optimizers, [batch])
            if at % 10 != 9:
                continue
            if hasattr(optimizers[0], "eval"):
                optimizers[0].eval()

            def wrong(rows, model=model):
                return (model(rows[0]).argmax(1) != rows[1]).double().mean()

            with torch.no_grad():
                if followed:
                    reported = tracker.evaluate([(X, y)], wrong)
                else:
                    model.eval()
                    reported = wrong((X, y))
                model.eval()
                found.append(float(reported - wrong((X_test, y_test))))
                model.train()
            if hasattr(optimizers[0], "train"):
                optimizers[0].train()
        gaps[followed] = sum(map(abs, found)) / len(found)
    # A looks's sampling error is 0.010 for an error of 0.2, and d inputs leave as much.
    assert gaps[True] < 0.03
    assert gaps[True] < gaps[False] / 2
