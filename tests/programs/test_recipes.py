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


# What trains a network, in each recipe.
KINDS = {
    **{name: (name, []) for name in LIBRARIES},
    **{f"{name}, AdamW": (name, ["--adamw"]) for name in LIBRARIES},
    "lightning_module, manual": ("lightning_module", ["--manual"]),
    "lightning_module, AdamW, manual": ("lightning_module", ["--adamw", "--manual"]),
    "muon_and_adamw": ("muon_and_adamw", []),
}


def trained_by(name, *settings):
    pytest.importorskip("sklearn")
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name])
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        model, train_error, test_error = module.main([*SMALL, *settings, *arguments])
        return [p.detach().clone() for p in model.parameters()], train_error, test_error

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_training_error_tracks_the_test_error_as_that_of_a_plain_one_does_not(kind):
    name, settings = KINDS[kind]
    train = trained_by(name, *settings)
    weights, train_error, test_error = train()
    plain_weights, plain_train_error, plain_test_error = train("--plain")
    assert not torch.equal(weights[0], plain_weights[0])
    assert abs(train_error - test_error) < SAMPLING_ERROR
    assert plain_test_error - plain_train_error > 2 * SAMPLING_ERROR


@pytest.mark.parametrize("name", LIBRARIES)
def test_unattached_recipe_is_sgd_bit_for_bit_and_says_so(name, monkeypatch):
    train = trained_by(name)
    monkeypatch.setattr(dd.DecoupledDescent, "attach", lambda *_, **__: None)
    with pytest.warns(dd.UnattachedWarning):
        weights, *errors = train()
    sgd_weights, *sgd_errors = train("--plain")
    assert all(torch.equal(a, b) for a, b in zip(weights, sgd_weights, strict=True))
    assert errors == sgd_errors


@pytest.mark.parametrize("name", LIBRARIES)
def test_adamw_without_the_call_is_the_library_s_own(name, monkeypatch):
    train = trained_by(name, "--adamw")
    monkeypatch.setattr(dd, "decouple", lambda *_, **__: None)
    weights, *errors = train()
    own_weights, *own_errors = train("--plain")
    assert all(torch.equal(a, b) for a, b in zip(weights, own_weights, strict=True))
    assert errors == own_errors


@pytest.mark.parametrize("way", [[], ["--adamw"]])
def test_both_ways_of_lightning_train_the_same_network(way):
    automatic, *errors = trained_by("lightning_module", *way)()
    manual, *manual_errors = trained_by("lightning_module", *way, "--manual")()
    assert all(torch.equal(a, b) for a, b in zip(automatic, manual, strict=True))
    assert errors == manual_errors
