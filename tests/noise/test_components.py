"""Clusters within classes, and what is said to whoever gives the wrong ones."""

import sys

import numpy as np
import pytest
import torch

import dd
from dd.data import xor


def two_clusters_a_class(n: int = 400, d: int = 20, distance: float = 6.0):
    """Three classes of two clusters at ±distance/2 along an axis of their own, unit noise."""
    generator = torch.Generator().manual_seed(0)
    clusters = torch.arange(n) % 6
    centres = torch.zeros(6, d)
    for c in range(6):
        centres[c, c // 2] = distance / 2 * (1 - 2 * (c % 2))
    return centres[clusters] + torch.randn(n, d, generator=generator), clusters // 2, clusters


def agreement(found, clusters) -> float:
    """Share of samples in the majority cluster of their component; components as many."""
    table = torch.zeros(int(found.max()) + 1, int(clusters.max()) + 1)
    table.index_put_((found, clusters), torch.ones(len(found)), accumulate=True)
    assert len(table) == table.shape[1]
    return float(table.max(1).values.sum() / len(found))


def test_xor_labels_give_its_four_clusters():
    split = xor(dimension=250, num_train=2000, num_test=10, separation=2.5, noise=1.0, seed=0)
    found = dd.find_components(split.train_inputs, split.train_targets)
    # Clusters 5 deviations apart are confused in Φ(−2.5) = 0.6 % of the samples, and in more as
    # their direction is known from d/n = 1/4 of the truth only.
    assert agreement(found, split.train_components) > 0.98


def test_classes_of_one_cluster_are_left_whole():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(600) % 3
    inputs = torch.randn(600, 50, generator=generator) + 4.0 * labels[:, None]
    assert torch.equal(dd.find_components(inputs, labels), labels)


def test_components_never_cross_classes_and_repeat_with_the_seed():
    inputs, labels, clusters = two_clusters_a_class()
    found = dd.find_components(inputs.numpy(), labels.numpy() * 7 - 3, seed=2)
    assert found.dtype == torch.int64
    assert agreement(found, clusters) > 0.98
    assert torch.equal(found, dd.find_components(inputs, labels, seed=2))
    for component in range(int(found.max()) + 1):
        assert len(labels[found == component].unique()) == 1


def test_small_classes_are_one_component_each():
    inputs, labels, _ = two_clusters_a_class(n=30)
    assert torch.equal(dd.find_components(inputs, labels), labels)
    assert dd.find_components(inputs[:1], labels[:1]).tolist() == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.zeros(3)}, "integer component ids"),
        ({"inputs": torch.full((30, 2), np.nan)}, "clean them"),
        ({"max_per_class": 0}, "max_per_class must be a positive integer"),
        ({"dimensions": 1.5}, "dimensions must be a positive integer"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    inputs, labels, _ = two_clusters_a_class(n=30)
    with pytest.raises(ValueError, match=message):
        dd.find_components(**{"inputs": inputs, "labels": labels, **arguments})


def test_a_missing_scikit_learn_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    inputs, labels, _ = two_clusters_a_class(n=30)
    with pytest.raises(
        ModuleNotFoundError, match=r"pip install 'decoupled-descent\[experiments\]'"
    ):
        dd.find_components(inputs, labels)
