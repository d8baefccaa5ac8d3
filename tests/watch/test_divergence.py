"""The feedback of the correction on itself: its rate, and when a user is told of it."""

import math
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dd
from dd.data import cifar10_probe, xor
from dd.experiments.models import two_layer
from dd.watch.divergence import feedback_growth

D = 300
DATA = Path(os.environ.get("DD_DATA") or Path(__file__).parents[3] / "shared" / "data")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True"),
    # What diverges has large shadows, too, and so has what has few samples.
    pytest.mark.filterwarnings("ignore::dd.ShadowWarning"),
]


def feedback_matrix(s: float, eigenvalues: Tensor, multiplicities: Tensor, n: int) -> np.ndarray:
    """Slow twin: Z and the shadows of one mode, (1 + B) × (1 + B), at unit curvature and rate."""
    bins = len(eigenvalues)
    matrix = np.zeros((1 + bins, 1 + bins))
    matrix[0] = -s
    matrix[1:] = (multiplicities * eigenvalues / n).numpy()[:, None]
    matrix[1:, 1:] -= np.diag(eigenvalues.numpy())
    return matrix


def growth_of(s: float, *noise) -> float:
    return float(np.linalg.eigvals(feedback_matrix(s, *noise)).real.max())


SPECTRA = {
    "flat": ([1.0], [D]),
    "flat, not of unit variance": ([2.5], [D]),
    "three levels": ([9.0, 1.0, 0.1], [20, 180, 100]),
}


# --- The rate --------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("variance", [1.0, 2.5])
def test_isotropic_growth_is_the_closed_form(ratio, variance):
    found = feedback_growth(torch.tensor([variance]), torch.tensor([D]), int(ratio * D))
    assert found == pytest.approx(variance * (math.sqrt(1 / ratio) - 1), rel=1e-6)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("n", [60, 150, 240])
def test_growth_is_the_largest_of_the_feedback_matrix_from_the_edge_on(name, n):
    values, counts = (torch.tensor(v, dtype=torch.float64) for v in SPECTRA[name])
    growth = feedback_growth(values, counts, n)
    edge = -growth + float((counts * values / n * growth / (values + growth)).sum())
    # A double root: an error of 1e-12 in the matrix moves it by 1e-6.
    assert growth_of(edge, values, counts, n) == pytest.approx(growth, rel=1e-5)
    above = [growth_of(edge * (1 + x), values, counts, n) for x in np.linspace(0.01, 30, 200)]
    assert max(above) < growth
    # Below the edge it would be larger: the smallest eigenvalue decides.
    assert growth_of(0.9 * edge, values, counts, n) > growth


@pytest.mark.parametrize("name", SPECTRA)
def test_edge_is_the_smallest_eigenvalue_of_samples(name):
    """Its spread is about n^(-2/3) of the edge's own scale; four times that either way."""
    n = 150
    values, counts = (torch.tensor(v, dtype=torch.float64) for v in SPECTRA[name])
    growth = feedback_growth(values, counts, n)
    edge = -growth + float((counts * values / n * growth / (values + growth)).sum())
    g = torch.Generator().manual_seed(0)
    scale = values.repeat_interleave(counts.long()).sqrt()
    inputs = torch.randn(n, D, generator=g, dtype=torch.float64) * scale
    smallest = float(torch.linalg.eigvalsh(inputs @ inputs.mT / n)[0])
    assert abs(smallest - edge) < 4 * n ** (-2 / 3) * edge


@pytest.mark.parametrize("n", [D, D + 1, 3 * D])
def test_no_growth_with_as_many_samples_as_inputs(n):
    assert feedback_growth(torch.tensor([2.0, 1.0]), torch.tensor([100, 200]), n) == 0.0


def test_inputs_of_no_variance_do_not_count():
    assert feedback_growth(torch.tensor([1.0, 0.0]), torch.tensor([100, 200]), 150) == 0.0


# --- Training runs ---------------------------------------------------------------------------


def regression(n: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, D, generator=g)
    weights = torch.randn(D, 1, generator=g) / math.sqrt(D)
    return inputs, inputs @ weights + 0.5 * torch.randn(n, 1, generator=g)


def linear_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(D, 1))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    return model


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().mean()


def run(model, inputs, targets, loss_fn, steps, noise, **settings):
    """Return the losses and the steps that warned."""
    optimizer = dd.DecoupledDescent(model, noise=noise, **settings)
    losses, warned = [], []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        losses.append(float(loss.detach()))
        loss.backward(create_graph=optimizer.needs_graph)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        warned += [(step, str(w.message)) for w in caught if w.category is dd.DivergenceWarning]
    return losses, warned


def run_regression(ratio: float, steps: int = 120, model=None, loss_fn=half_square, **settings):
    inputs, targets = regression(int(ratio * D))
    noise = dd.NoiseModel.isotropic(inputs)
    settings = {"lr": 0.05, "curvature": "probe_create_graph"} | settings
    return run(model or linear_model(), inputs, targets, loss_fn, steps, noise, **settings)


def doubled(losses: list[float]) -> int:
    """First step whose loss is twice the least before it."""
    least = np.minimum.accumulate(losses)
    return int(np.argmax(np.array(losses) > 2 * least))


def test_measured_growth_is_that_of_the_feedback_matrix():
    """Late in a run the fastest of the sample's modes is left.

    In discrete time a mode grows by the spectral radius of I + ηM(s). The two roots nearly
    coincide, so that for long the growth is t times the exponential: over steps 150 to 300 that
    adds at most log(2)/150 a step; the modes next to it, slower, take as much away.
    """
    n, rate = 90, 0.05
    inputs, targets = (x.double() for x in regression(n))
    noise = dd.NoiseModel(torch.ones(1, dtype=torch.float64), torch.tensor([D]))
    model = linear_model().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dd.DivergenceWarning)
        losses, _ = run(model, inputs, targets, half_square, 301, noise, lr=rate, curvature="exact")
    measured = (math.log(losses[300]) - math.log(losses[150])) / 2 / 150
    spectrum = torch.linalg.eigvalsh(inputs @ inputs.mT / n).tolist()
    one, d = torch.ones(1, dtype=torch.float64), torch.tensor([D])
    radii = [
        np.abs(np.linalg.eigvals(np.eye(2) + rate * feedback_matrix(s, one, d, n))).max()
        for s in spectrum
    ]
    assert abs(measured - math.log(max(radii))) < math.log(2) / 150


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize(
    "settings", [{}, {"lr": 0.005, "momentum": 0.9}], ids=["plain", "momentum"]
)
def test_square_loss_warns_once_before_the_loss_doubles(ratio, settings):
    losses, warned = run_regression(ratio, **settings)
    assert losses[-1] > 2 * min(losses)
    assert len(warned) == 1
    assert warned[0][0] < doubled(losses)


def test_relu_network_warns_before_the_loss_doubles():
    model = two_layer(D, 8, 1, activation="relu", generator=torch.Generator().manual_seed(0))
    model[2].weight.requires_grad_(False)
    losses, warned = run_regression(0.3, 200, model, lr=0.1)
    assert losses[-1] > 2 * min(losses)
    assert len(warned) == 1
    assert warned[0][0] < doubled(losses)


def test_summed_loss_warns_at_the_same_step():
    n = int(0.5 * D)
    _, mean = run_regression(0.5)
    _, total = run_regression(0.5, loss_fn=lambda o, y: n * half_square(o, y), lr=0.05 / n)
    assert [step for step, _ in mean] == [step for step, _ in total]


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_enough_weight_decay_keeps_it_silent(ratio):
    decay = 2 * (math.sqrt(1 / ratio) - 1)
    assert not run_regression(ratio, 300, weight_decay=decay)[1]


@pytest.mark.parametrize("ratio", [1.0, 1.5, 3.0])
def test_as_many_samples_as_inputs_keep_it_silent(ratio):
    assert not run_regression(ratio, 200)[1]


@pytest.mark.parametrize("ratio", [0.3, 0.5])
@pytest.mark.parametrize("settings", [{"lr": 0.25}, {"lr": 0.05, "momentum": 0.9}], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_cross_entropy_on_xor_keeps_it_silent(ratio, settings, activation):
    split = xor(dimension=D, num_train=int(ratio * D), num_test=10, seed=3)
    noise = dd.NoiseModel.isotropic(split.train_inputs, split.train_components)
    source = torch.Generator().manual_seed(3)
    model = two_layer(D, 8, 2, activation=activation, hidden_scale=0.5, generator=source)
    data = split.train_inputs, split.train_targets
    assert not run(model, *data, F.cross_entropy, 300, noise, **settings)[1]


@pytest.mark.skipif(
    not (DATA / "cifar10_efficientnet_lite0.npz").is_file(),
    reason=f"no features in {DATA}; set DD_DATA",
)
@pytest.mark.parametrize("n", [300, 1000])
def test_cross_entropy_on_features_keeps_it_silent(n):
    split = cifar10_probe(
        source="features", root=DATA, num_train=n, num_test=10, seed=1, progress=False
    )
    noise = dd.NoiseModel.fit(split.train_inputs, split.train_components)
    model = two_layer(1280, 16, 10, generator=torch.Generator().manual_seed(1))
    data = split.train_inputs, split.train_targets
    assert not run(model, *data, F.cross_entropy, 100, noise, lr=0.1)[1]


# --- What the user reads -----------------------------------------------------------------------


def test_message_gives_rate_and_remedy_and_the_remedy_works():
    _, [(_, message)] = run_regression(0.3)
    assert f"{int(0.3 * D)} samples of {D} inputs" in message
    growth = math.sqrt(1 / 0.3) - 1
    # The noise variance is fitted: relative spread √(2/(n d)), below the two digits printed.
    rate = float(message.split("grow by ")[1].split()[0])
    assert rate == pytest.approx(0.05 * growth, rel=0.05)
    decay = float(message.split("weight_decay=")[1].split()[0])
    assert decay == pytest.approx(2 * growth, rel=0.05)
    losses, warned = run_regression(0.3, 300, weight_decay=decay)
    assert not warned
    assert max(losses[100:]) < 2 * min(losses)


def test_warning_as_an_error_comes_after_the_step_and_once():
    inputs, targets = regression(90)
    models = [linear_model(), linear_model()]
    strict, lenient = (
        dd.DecoupledDescent(m, lr=0.05, curvature="probe_create_graph") for m in models
    )
    raised = 0
    for _ in range(100):
        for model, optimizer in zip(models, (strict, lenient), strict=True):
            optimizer.zero_grad()
            half_square(model(inputs), targets).backward(create_graph=True)
            with warnings.catch_warnings():
                action = "error" if optimizer is strict else "ignore"
                warnings.simplefilter(action, dd.DivergenceWarning)
                try:
                    optimizer.step()
                except dd.DivergenceWarning:
                    raised += 1
    assert raised == 1
    assert torch.equal(models[0][0].weight, models[1][0].weight)


def test_warning_points_at_the_line_that_called_step():
    inputs, targets = regression(90)
    model = linear_model()
    optimizer = dd.DecoupledDescent(model, lr=0.05, curvature="probe_create_graph")

    def descend():
        for _ in range(60):
            optimizer.zero_grad()
            half_square(model(inputs), targets).backward(create_graph=True)
            optimizer.step()

    with pytest.warns(dd.DivergenceWarning) as caught:
        descend()
    (raised,) = (w for w in caught if w.category is dd.DivergenceWarning)
    assert raised.filename == __file__
