"""Many seeds and optimizers as one computation.

In: what makes the data, the network and the optimizers of a seed. Out: their curves, with what is
not to be believed of them.
"""

from dd.trials.run import run_trials, trial_chunks

__all__ = ["run_trials", "trial_chunks"]
