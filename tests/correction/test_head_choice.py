"""``head="auto"``: when the head is corrected without being asked for, and when that ends."""

import copy
import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dd
from dd.correction.head_choice import shared_count, worth_correcting
from dd.data import xor
from tests.closures import closure_of

N, D, K = 200, 40, 20


def problem(classes: int = 2, n: int = N):
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, D, generator=g)
    labels = (
        (inputs[:, 0] + 0.5 * torch.randn(n, generator=g) > 0).long()
        if classes == 2
        else torch.arange(n) % classes
    )
    return inputs, labels


def network(classes: int = 2, *between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, K), *between, nn.GELU(), nn.Linear(K, classes))


def smoothed(scores, labels):
    return F.cross_entropy(scores, labels, label_smoothing=0.2)


def focal(scores, labels):
    sure = scores.softmax(1)[torch.arange(len(labels)), labels]
    return ((1 - sure) ** 2 * F.cross_entropy(scores, labels, reduction="none")).mean()


def squares(scores, labels):
    return (scores - F.one_hot(labels, scores.shape[1])).abs().pow(1.5).mean()


def train(model, optimizer, inputs, labels, loss=F.cross_entropy, steps=6):
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model(inputs), labels)
        value.backward()
        optimizer.step()
    return float(value.detach())


def made(classes=2, *between, head="auto", **settings):
    inputs, labels = problem(classes)
    model = network(classes, *between)
    noise = dd.NoiseModel.fit(inputs, labels)
    optimizer = dd.DecoupledDescent(model, lr=0.1, momentum=0.9, noise=noise, head=head, **settings)
    return model, optimizer, inputs, labels


def corrects(optimizer) -> bool:
    return optimizer._attachment.shared is not None


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 3.0])])
def test_cross_entropy_on_few_samples_is_corrected_as_if_asked_for(weight):
    def loss(scores, labels):
        return F.cross_entropy(scores, labels, weight=weight)

    model, optimizer, inputs, labels = made()
    asked, other, *_ = made(head=True)
    values = (
        train(model, optimizer, inputs, labels, loss),
        train(asked, other, inputs, labels, loss),
    )
    assert corrects(optimizer)
    assert values[0] == values[1]
    assert torch.equal(optimizer.shadow, other.shadow)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sure_predictions_are_those_of_cross_entropy_still(dtype):
    """Probabilities within rounding of one leave one of two gradients, and at last both, zero."""
    inputs, labels = problem()
    inputs = inputs.to(dtype)
    inputs[:, 0] += 40 * (labels - 0.5)
    model = network().to(dtype)
    noise = dd.NoiseModel.fit(inputs, labels)
    optimizer = dd.DecoupledDescent(model, lr=0.1, momentum=0.9, noise=noise)
    train(model, optimizer, inputs, labels, steps=60)
    with torch.no_grad():
        assert float((model(inputs).softmax(1) == 1).any(1).double().mean()) > 0.5
    assert corrects(optimizer)


def test_sizes_decide():
    inputs, labels = problem()
    model, noise = network(), dd.NoiseModel.fit(inputs, labels)
    directions = noise.separated.mean_directions
    count = shared_count(model[0], model[2], directions.shape[1])
    assert count == K * (directions.shape[1] + 1) + 2 * (K + 1)
    many = dataclasses.replace(noise, fitted_on=20 * count + 1)
    assert worth_correcting(model, model[0], noise)
    assert not worth_correcting(model, model[0], many)
    assert worth_correcting(model, model[0], dataclasses.replace(many, fitted_on=20 * count - 1))
    wide = nn.Sequential(nn.Linear(D, 600), nn.GELU(), nn.Linear(600, 2))
    assert not worth_correcting(wide, wide[0], noise)
    assert not worth_correcting(model, model[0], dd.NoiseModel.fit(inputs))
    alone = nn.Sequential(nn.Linear(D, 2))
    assert not worth_correcting(alone, alone[0], noise)


@pytest.mark.filterwarnings("ignore:DecoupledDescent. [0-9]+ parameters that:UserWarning")
@pytest.mark.parametrize(
    ("classes", "loss", "between"),
    [
        (4, smoothed, ()),
        (2, smoothed, ()),
        (2, focal, ()),
        (3, squares, ()),
        (2, F.cross_entropy, (nn.BatchNorm1d(K),)),
    ],
)
def test_what_cannot_be_followed_is_left_as_if_never_chosen(classes, loss, between):
    runs = {}
    for head in ("auto", False):
        model, optimizer, inputs, labels = made(classes, *copy.deepcopy(between), head=head)
        runs[head] = train(model, optimizer, inputs, labels, loss), optimizer
    (value, optimizer), (expected, other) = runs["auto"], runs[False]
    assert not corrects(optimizer)
    assert value == expected
    assert torch.equal(optimizer.shadow, other.shadow)
    assert torch.equal(optimizer.noise.eigenvalues, other.noise.eigenvalues)


def test_what_goes_by_the_head_is_refused_where_it_was_asked_for():
    model, optimizer, inputs, labels = made(2, nn.BatchNorm1d(K), head=True)
    with pytest.raises(RuntimeError, match=r"in other ways than through head '3'.*head=False"):
        train(model, optimizer, inputs, labels)
    model, optimizer, inputs, labels = made(head=True)
    hidden = []
    model[1].register_forward_hook(lambda *args: hidden.append(args[2]))

    def penalised(scores, labels):
        return F.cross_entropy(scores, labels) + hidden[-1].square().mean()

    with pytest.raises(RuntimeError, match="in other ways than through head '2'"):
        train(model, optimizer, inputs, labels, penalised)


def test_a_head_that_was_left_is_spoken_of():
    model, optimizer, inputs, labels = made(4)
    with pytest.warns(dd.StrainWarning, match="164 parameters that all samples share on 200"):
        train(model, optimizer, inputs, labels, smoothed)


def test_a_head_left_on_the_way_is_said_and_leaves_a_doubt_in_copies_and_states():
    model, optimizer, inputs, labels = made(4)
    train(model, optimizer, inputs, labels)
    assert corrects(optimizer)
    with pytest.warns(dd.StrainWarning, match="the correction of the head.*ends here"):
        train(model, optimizer, inputs, labels, smoothed)

    def doubts(some):
        return some._attachment.oversight.doubts

    assert doubts(optimizer) == ("The head, which over-fits, is corrected no more.",)
    twin, again = copy.deepcopy((model, optimizer))
    assert doubts(again) == doubts(optimizer)
    fresh, loaded, *_ = made(4)
    fresh.load_state_dict(model.state_dict())
    with pytest.warns(dd.StrainWarning, match="the state is of a run that gave it up"):
        loaded.load_state_dict(optimizer.state_dict())
    assert doubts(loaded) == doubts(optimizer)
    for one, its in ((model, optimizer), (twin, again), (fresh, loaded)):
        train(one, its, inputs, labels, smoothed, steps=2)
    assert torch.equal(optimizer.shadow, again.shadow)
    assert torch.equal(optimizer.shadow, loaded.shadow)


def test_a_state_without_the_head_is_taken_up_in_either_order():
    model, optimizer, inputs, labels = made(4, head=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dd.StrainWarning)
        train(model, optimizer, inputs, labels)
        fresh = network(4)
        fresh.load_state_dict(model.state_dict())
        later = dd.DecoupledDescent(fresh.parameters(), lr=0.1, momentum=0.9)
        later.load_state_dict(optimizer.state_dict())
        later.attach(fresh, noise=dd.NoiseModel.fit(inputs, labels))
        assert not corrects(later)
        train(model, optimizer, inputs, labels)
        train(fresh, later, inputs, labels)
    torch.testing.assert_close(later.shadow, optimizer.shadow)


def test_a_head_of_another_optimizer_or_changed_by_hand_is_left():
    inputs, labels = problem()
    model = network()
    optimizer = dd.DecoupledDescent(model[0].parameters(), lr=0.1)
    optimizer.attach(model, noise=dd.NoiseModel.fit(inputs, labels))
    assert not corrects(optimizer)
    model, optimizer, inputs, labels = made()
    train(model, optimizer, inputs, labels)
    with torch.no_grad():
        model[2].weight.mul_(0.5)
    with pytest.warns(dd.StrainWarning, match="ends here"):
        train(model, optimizer, inputs, labels)


def test_a_noise_model_has_both_forms_until_it_is_changed():
    inputs, labels = problem()
    noise = dd.NoiseModel.fit(inputs, labels)
    apart = noise.with_means_apart()
    torch.testing.assert_close(
        apart.eigenvalues,
        dd.NoiseModel.fit(inputs, labels, separate_means=True).eigenvalues,
    )
    assert noise.to(torch.device("cpu"), torch.float64).is_in_both_forms
    assert noise.of(torch.arange(50)).is_in_both_forms
    assert dataclasses.replace(noise, fingerprints=None).is_in_both_forms
    other = dataclasses.replace(noise, eigenvalues=4 * noise.eigenvalues)
    assert not other.is_in_both_forms
    assert not other.to(torch.device("cpu"), torch.float64).is_in_both_forms
    assert not other.of(torch.arange(50)).is_in_both_forms
    with pytest.raises(ValueError, match="not known apart"):
        other.with_means_apart()
    assert dd.NoiseModel.fit(inputs, labels, separate_means=False).separated is None
    spread = apart.spread_over_means()
    assert spread.dimension == noise.dimension
    assert spread.mean_directions is None


# --- Every direction followed exactly ---------------------------------------------------------


def table(n: int = 200, d: int = 5):
    """Columns with tails and jumps, and labels that no line tells apart."""
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, d, generator=g)
    inputs[:, 1] = inputs[:, 1].exp()
    inputs[:, 2] = (inputs[:, 2] > 0).float()
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    score = inputs[:, 0] * inputs[:, 3] + inputs[:, 1] + torch.randn(n, generator=g)
    return inputs, (score > 0).long()


def on_table(width: int = 8, head="auto", n: int = 200, **settings):
    inputs, labels = table(n)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.GELU(), nn.Linear(width, 2))
    noise = dd.NoiseModel.fit(inputs, labels)
    settings = {"lr": 0.1, "momentum": 0.9} | settings
    optimizer = dd.DecoupledDescent(model, noise=noise, head=head, **settings)
    return model, optimizer, inputs, labels


def test_few_directions_are_followed_exactly():
    def follows(**settings):
        optimizer = on_table(**settings)[1]
        return optimizer._attachment.given_noise.is_followed_exactly

    assert follows()
    assert follows(head=True)
    assert not follows(head=False)
    # An estimate that was asked for is gone by.
    assert not follows(curvature="probe")
    # 5 directions take 100 samples, and 12 units of nearly 5 directions 120.
    assert not follows(n=99)
    assert not follows(n=105, width=12)
    assert follows(n=105)
    # Beyond n p² of 5e8 the means alone are followed.
    wide = on_table(width=120, n=1250)[1]._attachment
    assert wide.shared is not None
    assert wide.given_noise.mean_directions.shape[1] < 5


@pytest.mark.slow
def test_a_table_is_tracked_as_if_retrained_without_each_sample():
    """Against retraining, most of the plain network's optimism is taken off, and no more."""

    def trained(weights, head):
        model, optimizer, inputs, labels = on_table(head=head)
        for _ in range(100):
            optimizer.zero_grad()
            losses = F.cross_entropy(model(inputs), labels, reduction="none")
            (losses @ weights / len(weights)).backward()
            optimizer.step()
        with torch.no_grad():
            tracked = F.cross_entropy(model(inputs), labels, reduction="none")
            plain = F.cross_entropy(model.eval()(inputs), labels, reduction="none")
        return tracked, plain

    rows, error = range(0, 200, 8), {}
    for head in ("auto", False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dd.StrainWarning)
            tracked, plain = trained(torch.ones(200), head)
            without = []
            for row in rows:
                weights = torch.ones(200)
                weights[row] = 0
                without.append(trained(weights, head)[1][row])
        left_out = torch.stack(without)
        error[head] = float((tracked[rows] - left_out).square().mean().sqrt())
        error["plain"] = float((plain[rows] - left_out).square().mean().sqrt())
    assert error["auto"] < error[False] / 2
    assert error["auto"] < error["plain"] / 4


def test_what_ends_on_the_way_goes_on_with_all_bins_in_one():
    model, optimizer, inputs, labels = on_table()
    train(model, optimizer, inputs, labels)
    whole = dd.NoiseModel.fit(inputs, labels)
    with pytest.warns(dd.StrainWarning, match="the correction of the head.*ends here"):
        train(model, optimizer, inputs, labels, smoothed)
    expected = whole.mass.sum() / 5
    torch.testing.assert_close(optimizer.noise.eigenvalues, expected.reshape(1))
    assert optimizer.noise.dimension == 5
    assert bool(optimizer.shadow.abs().sum() > 0)


def test_displacements_that_the_theory_cannot_explain_are_seen():
    model, optimizer, inputs, labels = on_table()
    train(model, optimizer, inputs, labels)
    optimizer.state[model[0].weight]["signal_shadow"].mul_(30)
    with pytest.warns(dd.ShadowWarning, match="the shadows are"):
        train(model, optimizer, inputs, labels, steps=1)


# Of a long turn on the way, and told.
@pytest.mark.filterwarnings("ignore::dd.ShadowWarning")
def test_a_state_is_gone_on_with_in_its_own_form():
    """That of a search follows the means alone; a numeric rate would follow every direction."""
    settings = {"momentum": 0.0}
    model, optimizer, inputs, labels = on_table(lr="auto", **settings)

    closure = closure_of(model, optimizer, inputs, labels)

    for _ in range(15):
        optimizer.step(closure)
    assert optimizer.state[model[0].weight]["signal_shadow"].any()
    state, weights = optimizer.state_dict(), model.state_dict()
    fresh, numeric, *_ = on_table(lr=0.1, **settings)
    assert numeric._attachment.given_noise.is_followed_exactly
    fresh.load_state_dict(weights)
    numeric.load_state_dict(state)
    assert not numeric._attachment.given_noise.is_followed_exactly

    def tracked(net, its):
        return its.estimate([0], lambda _: F.cross_entropy(net(inputs), labels, reduction="none"))

    found, expected = tracked(fresh, numeric).value, tracked(model, optimizer).value
    assert float(found) == pytest.approx(float(expected), 1e-5)
    train(fresh, numeric, inputs, labels, steps=2)
    # And the other way round.
    exact, other, *_ = on_table(**settings)
    train(exact, other, inputs, labels, steps=3)
    searched, search, *_ = on_table(lr="auto", **settings)
    searched.load_state_dict(exact.state_dict())
    search.load_state_dict(other.state_dict())
    assert search._attachment.given_noise.is_followed_exactly
    found, expected = tracked(searched, search).value, tracked(exact, other).value
    assert float(found) == pytest.approx(float(expected), 1e-5)


def test_a_state_of_other_directions_is_refused():
    model, optimizer, inputs, labels = on_table()
    train(model, optimizer, inputs, labels, steps=2)
    state = optimizer.state_dict()
    fresh = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 2))
    noise = dd.NoiseModel.fit(inputs, labels, separate_means=True)
    other = dd.DecoupledDescent(fresh, lr=0.1, momentum=0.9, noise=noise)
    with pytest.raises(RuntimeError, match="follows 5 directions of layer '0'"):
        other.load_state_dict(state)


def test_a_noise_model_of_nothing_but_directions_is_asked_for():
    inputs, labels = table()
    whole = dd.NoiseModel.fit(inputs, labels).with_every_direction_apart()
    assert "5 inputs, all followed exactly" in str(whole)
    assert "nan" not in str(whole)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3))
    optimizer = dd.DecoupledDescent(model, lr=0.1, noise=whole)
    train(model, optimizer, inputs, labels, steps=2)
    with pytest.raises(RuntimeError, match="label smoothing"):
        train(model, optimizer, inputs, labels, smoothed, steps=1)
    with pytest.raises(ValueError, match="nothing is known of the noise"):
        whole.spread_over_means()


# --- A search ---------------------------------------------------------------------------------


def test_a_search_corrects_the_head_once_it_knows_of_the_signal():
    """XOR with few samples for its means: rotations come first."""
    split = xor(dimension=60, num_train=240, num_test=10, separation=4.0, seed=0)
    noise = dd.NoiseModel.fit(split.train_inputs, split.train_components)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 6), nn.GELU(), nn.Linear(6, 2))
    optimizer = dd.DecoupledDescent(model, lr="auto", noise=noise)
    assert corrects(optimizer)

    closure = closure_of(model, optimizer, split.train_inputs, split.train_targets)

    seen = set()
    for _ in range(12):
        optimizer.step(closure)
        state = optimizer.state[model[0].weight]
        knows = bool(state["shadow_memory"]["informed"])
        seen.add((knows, bool(state["signal_shadow"].any())))
    assert seen == {(False, False), (True, True)}


def test_a_search_never_follows_all_of_a_layer():
    optimizer = on_table(lr="auto", momentum=0.0)[1]
    assert corrects(optimizer)
    assert not optimizer._attachment.given_noise.is_followed_exactly
