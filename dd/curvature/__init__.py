"""Estimators of H, the curvature of the loss in the pre-activations.

In: pre-activations and gradients of a step's rows. Out: H, shape (k, k), or the moments that it
is solved from.
"""
