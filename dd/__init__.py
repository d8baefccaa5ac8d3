"""Decoupled descent: gradient descent whose training error tracks the test error.

Lovig, *Decoupled Descent: Exact Test Error Tracking Via Approximate Message Passing*,
arXiv 2604.27883 (2026). This import needs torch and numpy alone.

Examples in docstrings begin with ``torch``, ``dd``, 500 training inputs ``X`` of dimension 50 in
two Gaussian classes ``y``, 2000 samples of the same law ``X_test`` and ``y_test``, an untrained
``model`` of layers ``Linear(50, 4)``, ``Tanh()``, ``Linear(4, 2)``, and
``criterion = torch.nn.CrossEntropyLoss()``.
"""

from dd.correction.estimate import Estimate
from dd.curvature.custom import CurvatureWarning
from dd.decouple import ErrorTracker, decouple
from dd.noise.components import find_components
from dd.noise.model import NoiseModel
from dd.optimizer import DecoupledDescent
from dd.rules.line_search.step import NoSignalWarning, SearchWarning
from dd.rules.plain import UnattachedWarning
from dd.samples.chunks import Chunks
from dd.samples.recognition import AugmentationWarning
from dd.theory.mixture import GaussianMixture
from dd.theory.state_evolution import state_evolution
from dd.trials import run_trials
from dd.trials.results import Trials
from dd.watch.audit import ComponentWarning
from dd.watch.divergence import DivergenceWarning
from dd.watch.response_watch import ResponseWarning
from dd.watch.shadow_size import ShadowWarning
from dd.watch.strain import StrainWarning

__version__ = "0.1.0"

__all__ = [
    "AugmentationWarning",
    "Chunks",
    "ComponentWarning",
    "CurvatureWarning",
    "DecoupledDescent",
    "DivergenceWarning",
    "ErrorTracker",
    "Estimate",
    "GaussianMixture",
    "NoSignalWarning",
    "NoiseModel",
    "ResponseWarning",
    "SearchWarning",
    "ShadowWarning",
    "StrainWarning",
    "Trials",
    "UnattachedWarning",
    "decouple",
    "find_components",
    "run_trials",
    "state_evolution",
]
