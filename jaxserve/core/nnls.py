"""Non-negative least squares."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

_TOLERANCE = 1e-10


def nnls(gram: Float64Array, moment: Float64Array) -> Float64Array:
    """The x >= 0 that minimises ``|A x - b|^2``, by the active-set method (Lawson and Hanson 1974, 23.3).

    Args:
        gram: float64 [n, n], ``A.T @ A``.
        moment: float64 [n], ``A.T @ b``.

    Returns:
        float64 [n].
    """
    # Columns of unit length: features differ by ten orders of magnitude (steps, tokens, token pairs).
    lengths = np.sqrt(np.diag(gram))
    scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    gram, moment = gram * np.outer(scale, scale), moment * scale
    size = len(moment)
    x, free = np.zeros(size), np.zeros(size, bool)
    for _ in range(3 * size):
        gradient = np.where(free, -np.inf, moment - gram @ x)
        best = int(np.argmax(gradient))
        if gradient[best] <= _TOLERANCE * max(1.0, float(np.abs(moment).max())):
            break
        free[best] = True
        x = _solve_within(gram, moment, x, free)
    return x * scale


def _solve_within(
    gram: Float64Array, moment: Float64Array, x: Float64Array, free: npt.NDArray[np.bool_]
) -> Float64Array:
    """Solves for the free variables, fixing at zero (in place) those that would become negative."""
    while free.any():
        solution = np.zeros_like(x)
        block = gram[np.ix_(free, free)]
        # A little more on the diagonal: features may be linearly dependent in a bucket of one shape.
        solution[free] = np.linalg.solve(block + _TOLERANCE * np.eye(len(block)), moment[free])
        negative = free & (solution <= 0.0)
        if not negative.any():
            return solution
        shrink = x[negative] / np.maximum(x[negative] - solution[negative], 1e-300)
        x = x + float(shrink.min()) * (solution - x)
        free &= x > 1e-12
        x = np.where(free, x, 0.0)
    return np.zeros_like(x)
