"""The recipes for other libraries' training loops, in small."""

import importlib.util
from pathlib import Path

import pytest
import torch

import dd

pytestmark = [
    # To import one of the libraries takes seconds.
    pytest.mark.slow,
    # Lightning uses a class of torch.utils._pytree that torch gives up.
    pytest.mark.filterwarnings(
        "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"
    ),
    # Lightning recommends worker processes, where there are cores for them.
    pytest.mark.filterwarnings("ignore:The '[a-z_]+' does not have many workers:UserWarning"),
    # transformers asks for pinned memory by default, on a machine without accelerator too.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no:UserWarning"),
]

RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"
LIBRARIES = {
    "lightning_module": "lightning",
    "huggingface_trainer": "transformers",
    "accelerate_loop": "accelerate",
    "skorch_net": "skorch",
}
SAMPLES, NEW_SAMPLES = 1000, 2000
SMALL = ["--samples", str(SAMPLES), "--dimension", "300", "--epochs", "15"]
# Three deviations of the difference of two error rates near one half.
SAMPLING_ERROR = 3 * (0.25 / SAMPLES + 0.25 / NEW_SAMPLES) ** 0.5


@pytest.fixture(params=LIBRARIES)
def train(request):
    pytest.importorskip("sklearn")
    pytest.importorskip(LIBRARIES[request.param])
    path = RECIPES / f"{request.param}.py"
    spec = importlib.util.spec_from_file_location(request.param, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        model, train_error, test_error = module.main([*SMALL, *arguments])
        return [p.detach().clone() for p in model.parameters()], train_error, test_error

    return run


def test_training_error_tracks_the_test_error_as_that_of_sgd_does_not(train):
    weights, train_error, test_error = train()
    sgd_weights, sgd_train_error, sgd_test_error = train("--sgd")
    assert not torch.equal(weights[0], sgd_weights[0])
    assert abs(train_error - test_error) < SAMPLING_ERROR
    assert sgd_test_error - sgd_train_error > 2 * SAMPLING_ERROR


def test_unattached_recipe_is_sgd_bit_for_bit_and_says_so(train, monkeypatch):
    monkeypatch.setattr(dd.DecoupledDescent, "attach", lambda *_, **__: None)
    with pytest.warns(dd.UnattachedWarning):
        weights, *errors = train()
    sgd_weights, *sgd_errors = train("--sgd")
    assert all(torch.equal(a, b) for a, b in zip(weights, sgd_weights, strict=True))
    assert errors == sgd_errors
