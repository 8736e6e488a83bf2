"""Newton's iteration: the papers' solver, which whitens in part on purpose if T is small.

Every step multiplies Z by (3 I - R) / 2, and R = Z (S / t) Z by it twice. With r = R / 3 that is differences alone::

    v = r - r r        r <- 9/4 (v - v r)        Z <- 3/2 (Z - Z r)
"""

import math
from dataclasses import dataclass
from typing import Any

from polywhiten._types import Array, Namespace
from polywhiten.solvers.iteration import DOUBLE, SINGLE, Pair, ScaledIteration, identity_like, max_steps, trace

_GROWTH = 9 / 4  # a step multiplies small eigenvalues of R by this
ALL_STEPS = max_steps(_GROWTH, DOUBLE)  # the largest number of steps that is ever taken, in float64


@dataclass(frozen=True)
class Newton(ScaledIteration):
    """T steps of Newton's iteration from S / trace(S).

    In exact arithmetic the result is that of IterNorm's P <- (3 P - P^3 S) / 2, by a recurrence that is stable for
    every T. An eigenvalue that is small beside the trace is whitened in part, and T sets how much. At most 22 steps are
    taken for float32 covariances and 47 for float64: what these leave is smaller than rounding.

    References
    ----------
    Huang et al., Iterative Normalization, CVPR 2019, arXiv:1904.03441, eq. 6 and 7.
    """

    iterations: int = 5

    @property
    def lost_bits(self) -> float:
        return self.iterations * math.log2(_GROWTH)

    def newton_steps(self, itemsize: int) -> int | None:
        epsilon = DOUBLE if itemsize == 8 else SINGLE
        fits = not self.needs_float64(epsilon) and self.iterations <= max_steps(_GROWTH, epsilon)
        return self.iterations if fits else None

    def scale(self, xp: Namespace, cov: Array) -> Array:
        return trace(xp, cov)

    def scale_gradient(self, xp: Namespace, cov: Array, scale: Array) -> Array:
        return identity_like(xp, cov)

    def iterate(self, xp: Namespace, s: Array, ds: Array | None, epsilon: float) -> Pair:
        r: Array = s / 3
        dr: Any = None if ds is None else ds / 3
        z, dz = 1.5 * (identity_like(xp, s) - r), None if ds is None else -1.5 * dr
        for _ in range(self._steps(epsilon) - 1):
            if dr is not None:
                dr = _step_derivative(xp, r, dr)
            r = _step(xp, r)
            if dr is not None:
                dz = _difference(xp, 1.5, _difference(xp, 1.0, dz, dz, r), z, dr)
            z = _difference(xp, 1.5, z, z, r)
        return z, dz

    def _steps(self, epsilon: float) -> int:
        return min(self.iterations, max_steps(_GROWTH, epsilon))


def _step(xp: Namespace, r: Array) -> Array:
    v = _difference(xp, 1.0, r, r, r)
    return _difference(xp, 2.25, v, v, r)


def _step_derivative(xp: Namespace, r: Array, dr: Array) -> Array:
    """Return 9/4 (dr - 2 (r dr + dr r) + r r dr + r dr r + dr r r)."""
    p = dr @ r
    p = dr - p - (p + xp.matrix_transpose(p))
    p = _difference(xp, 1.125, p, p, r)
    return p + xp.matrix_transpose(p)


def _difference(xp: Namespace, factor: float, c: Array, a: Array, b: Array) -> Array:
    """Return factor (c - a b)."""
    native = getattr(xp, "multiply_add", None)
    if native is not None:
        return native(factor, c, -factor, a, b)
    difference = c - a @ b
    return difference if factor == 1 else factor * difference
