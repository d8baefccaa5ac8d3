"""Data sets of the experiments.

In: where the data is, and how much of it. Out: one :class:`~dd.data.split.Split` of each builder.
"""

from dd.data.cifar10_probe import cifar10_probe
from dd.data.gaussian_mixture import xor
from dd.data.noisy_mnist import noisy_mnist
from dd.data.probe import probe
from dd.data.seeding import generator
from dd.data.split import Split

__all__ = ["Split", "cifar10_probe", "generator", "noisy_mnist", "probe", "xor"]
