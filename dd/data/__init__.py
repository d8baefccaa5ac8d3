"""Data sets of the experiments: each builder returns one :class:`~dd.data.split.Split`."""

from dd.data.cifar10_probe import cifar10_probe
from dd.data.gaussian_mixture import xor
from dd.data.noisy_mnist import noisy_mnist
from dd.data.probe import probe
from dd.data.seeding import generator
from dd.data.split import Split

__all__ = ["Split", "cifar10_probe", "generator", "noisy_mnist", "probe", "xor"]
