"""Least squares with coefficients that may not be negative."""

import numpy as np

__all__ = ["nonnegative_least_squares"]


def nonnegative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Minimise ‖Ax − b‖ over x ≥ 0 by the active-set method of Lawson and Hanson (1974), ch. 23.

    Args:
        matrix: A, shape (m, k).
        target: b, shape (m,).

    Returns:
        x, shape (k,), float64.
    """
    size = matrix.shape[1]
    solution = np.zeros(size)
    free = np.zeros(size, dtype=bool)
    tolerance = 1e-12 * float(np.abs(matrix.T @ target).max())
    best = float(np.linalg.norm(target))
    for _ in range(3 * size):
        pull = matrix.T @ (target - matrix @ solution)
        pull[free] = -np.inf
        if free.all() or pull.max() <= tolerance:
            break
        free[pull.argmax()] = True
        trial = _restore_feasibility(matrix, target, solution, free)
        residual = float(np.linalg.norm(target - matrix @ trial))
        # Columns that are nearly parallel can cycle at the level of rounding.
        if residual >= best:
            break
        solution, best = trial, residual
    return solution


def _restore_feasibility(
    matrix: np.ndarray, target: np.ndarray, solution: np.ndarray, free: np.ndarray
) -> np.ndarray:
    """Solve on the free columns; fix at 0, in place, those that would turn negative on the way."""
    current = solution
    while True:
        wanted = np.zeros_like(current)
        wanted[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
        blocked = free & (wanted <= 0)
        if not blocked.any():
            return wanted
        share = (
            current[blocked] / (current[blocked] - wanted[blocked] + np.finfo(float).tiny)
        ).min()
        current = current + share * (wanted - current)
        free &= current > 1e-14 * current.max(initial=0.0)
        current = np.where(free, current, 0.0)
