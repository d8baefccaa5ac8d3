"""Data sets of the experiments: each builder returns one :class:`~dd.data.split.Split`."""

from dd.data.gaussian_mixture import xor
from dd.data.noisy_mnist import noisy_mnist
from dd.data.seeding import generator
from dd.data.split import Split

__all__ = ["Split", "generator", "noisy_mnist", "xor"]
