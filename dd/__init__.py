"""Decoupled descent: gradient descent whose training error tracks the test error.

Lovig, *Decoupled Descent: Exact Test Error Tracking Via Approximate Message Passing*,
arXiv 2604.27883 (2026). This import needs torch and numpy alone.
"""

from dd.divergence import DivergenceWarning
from dd.noise import NoiseModel
from dd.optimizer import DecoupledDescent

__version__ = "0.1.0"

__all__ = ["DecoupledDescent", "DivergenceWarning", "NoiseModel"]
