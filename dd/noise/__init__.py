"""The noise model: how the inputs vary within the components of their mixture.

In: training inputs and, where they are known, component ids. Out: a
:class:`~dd.noise.model.NoiseModel` of few eigenvalues, and how many samples are copies.
"""
