"""Minimax polynomials: exact whitening in a third of Newton's steps.

Every step multiplies by a polynomial Q of R = Z Y, where Y begins as S / t and Z as I::

    Q = a I + b R + c R R        Z <- Q Z        Y <- Y Q

R = Y Z and Z <- Z Q would be the same in exact arithmetic, but diverge in floating point. A polynomial that is flat at
1 follows as one more step, as the derivative of the others oscillates.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from polywhiten._types import Array, Namespace
from polywhiten.solvers.iteration import Pair, ScaledIteration, identity_like, inner, positive, symmetric_part, trace

Step = tuple[float, float, float]  # a, b, c

_TARGET = 1e-4  # the largest |1 - p| before the flat step
_LOWEST = 1e-4  # lower end of the widest first interval in float64, where norm(S) / (smallest eigenvalue) = 1e8
_FLAT = (15 / 8, -10 / 8, 3 / 8)  # the quintic that is 1 at 1, with first and second derivative 0
_NARROW = 1e-3  # width of an interval below which the exchange is ill-conditioned, and its limit as good


@dataclass(frozen=True)
class Minimax(ScaledIteration):
    """T steps and a flat one, each the odd quintic that is closest to 1 on the current interval of singular values.

    The first interval is as wide as T steps can bring within 1e-4 of 1, which the flat step brings within 1e-11. So T
    sets the condition number up to which whitening is exact: norm(S) / (smallest eigenvalue), in the Frobenius norm,
    may be 1.5e3 for T = 4, 2.7e4 for 5, 4.9e5 for 6, 9e6 for 7 and 1e8 for 8. Smaller eigenvalues are whitened in part,
    as by Newton's iteration. At most 8 steps are taken, and 7 for float32 covariances: what these leave is smaller than
    rounding.

    References
    ----------
    Amsel et al., The Polar Express, 2025, arXiv:2505.16932, section 3.
    """

    iterations: int = 5

    @property
    def lost_bits(self) -> float:
        return -2 * math.log2(widest_interval(self.iterations, _LOWEST))

    def scale(self, xp: Namespace, cov: Array) -> Array:
        t = positive(xp, trace(xp, cov), cov.dtype)  # divided out first: squares of large variances overflow float32
        return t * xp.sqrt(inner(xp, cov / t, cov / t))

    def scale_gradient(self, xp: Namespace, cov: Array, scale: Array) -> Array:
        return cov / scale

    def iterate(self, xp: Namespace, s: Array, ds: Array | None, epsilon: float) -> Pair:
        eye = identity_like(xp, s)
        y: Pair = s, ds
        z: Any = None
        steps = (*minimax_steps(self.iterations, max(_LOWEST, math.sqrt(epsilon))), _FLAT)
        for k, (a, b, c) in enumerate(steps):
            r, dr = y if z is None else _times(z, y)
            r, dr = symmetric_part(xp, r), None if dr is None else symmetric_part(xp, dr)
            square, dsquare = _times((r, dr), (r, dr))
            q = a * eye + b * r + c * square, None if dr is None else b * dr + c * dsquare
            z = q if z is None else _times(q, z)
            if k < len(steps) - 1:
                y = _times(y, q)
        return z[0], z[1]


def _times(m: Pair, n: Pair) -> Pair:
    """Return the product, and its derivative by the product rule."""
    (a, da), (b, db) = m, n
    return a @ b, None if da is None else da @ b + a @ db


def minimax_steps(iterations: int, lowest: float = _LOWEST) -> tuple[Step, ...]:
    """Return the coefficients of the steps: of fewer, if these suffice for an interval that begins at `lowest`."""
    return _steps_and_interval(iterations, lowest)[0]


def widest_interval(iterations: int, lowest: float) -> float:
    """Return the lower end of the widest interval, with the upper end 1, that so many steps bring within 1e-4 of 1."""
    return _steps_and_interval(iterations, lowest)[1]


@lru_cache
def _steps_and_interval(iterations: int, lowest: float) -> tuple[tuple[Step, ...], float]:
    for fewer in range(1, iterations + 1):
        steps, error = _schedule(lowest, fewer)
        if error <= _TARGET:
            return steps, lowest
    low, high = math.log10(lowest), 0.0
    for _ in range(40):
        middle = (low + high) / 2
        if _schedule(10**middle, iterations)[1] <= _TARGET:
            high = middle
        else:
            low = middle
    return _schedule(10**high, iterations)[0], 10**high


def _schedule(lower: float, iterations: int) -> tuple[tuple[Step, ...], float]:
    upper, error, steps = 1.0, 1.0 - lower, []
    for _ in range(iterations):
        step, error = _best_quintic(lower, upper)
        steps.append(step)
        lower, upper = 1 - error, 1 + error
    return tuple(steps), error


def _best_quintic(lower: float, upper: float) -> tuple[Step, float]:
    """Return the (a, b, c) that minimise max |1 - (a x + b x^3 + c x^5)| on [lower, upper], and that maximum.

    By Remez exchange: the error of the best polynomial takes its maximum, with alternating sign, at both ends and at
    the two extrema between them.
    """
    middle, width = (lower + upper) / 2, upper - lower
    if width < _NARROW:  # flat at the middle: with x relative to it, 1 - p = -5/2 (x - 1)^3
        return (15 / 8 / middle, -10 / 8 / middle**3, 3 / 8 / middle**5), 5 / 2 * (width / 2) ** 3
    extrema = lower + width * np.array([0.25, 0.75])
    while True:
        x = np.array([lower, *extrema, upper])
        a, b, c, error = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1), np.ones(4))
        root = math.sqrt(9 * b * b - 20 * a * c)
        moved = np.sqrt(np.array([-3 * b - root, -3 * b + root]) / (10 * c))
        if np.max(np.abs(moved - extrema)) <= 1e-9 * upper:
            return (float(a), float(b), float(c)), abs(float(error))
        extrema = moved
