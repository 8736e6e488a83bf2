"""Newton's iteration: the papers' solver, partial on purpose where T is small.

With S scaled to R = S / t, eigenvalues in (0, 1], a step multiplies Z by E = (3 I - R) / 2 and so R = Z S Z by E E::

    Z <- (3 Z - Z R) / 2        R <- (9 R - 6 R R + R R R) / 4        W = Z / sqrt(t)

Rounding errors in R don't grow, as those of the papers' P <- (3 P - P P P S) / 2 do: R alone decides the steps, and
the map of R contracts near I. R and its derivative along a symmetric matrix are symmetric, so that R dR is known from
dR R, and a step with its derivative costs seven products. With r = R / 3 the steps are Z <- 3/2 (Z - Z r) and
r <- 9/4 (v - v r), v = r - r r: nothing but differences.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeGuard

from polywhiten._types import Array, Namespace
from polywhiten.solvers.iteration import DOUBLE, SINGLE, ScaledIteration, identity_like, most_steps, trace

_GROWTH = 9 / 4  # of small eigenvalues of R in a step
ALL_STEPS = most_steps(_GROWTH, DOUBLE)  # more are not taken, and fewer of float32


@dataclass(frozen=True)
class Newton(ScaledIteration):
    """T steps of Newton's iteration from S / trace(S).

    The same Z as IterNorm's P <- (3 P - P^3 S) / 2 in exact arithmetic, by a recurrence that is stable for every T.
    An eigenvalue that is small beside the trace is whitened in part: T sets how much. More than 22 steps are not
    taken of float32 covariances, nor more than 47 of float64: what these leave is smaller than rounding.

    References
    ----------
    Huang et al., Iterative Normalization, CVPR 2019, arXiv:1904.03441, eq. 6 and 7.
    """

    iterations: int = 5

    @property
    def lost_bits(self) -> float:
        return self.iterations * math.log2(_GROWTH)

    def scale(self, xp: Namespace, cov: Array) -> Array:
        return trace(xp, cov)

    def scale_gradient(self, xp: Namespace, cov: Array, scale: Array) -> Array:
        return identity_like(xp, cov)

    def value(self, xp: Namespace, s: Array, epsilon: float) -> Array:
        r = s / 3
        z = 1.5 * (identity_like(xp, s) - r)
        for _ in range(self._steps(epsilon) - 1):
            r = _step(xp, r)
            z = _reduced(xp, 1.5, z, z, r)
        return z

    def value_and_derivative(self, xp: Namespace, s: Array, ds: Array, epsilon: float) -> tuple[Array, Array]:
        r, dr = s / 3, ds / 3
        z, dz = 1.5 * (identity_like(xp, s) - r), -1.5 * dr
        for _ in range(self._steps(epsilon) - 1):
            p = dr @ r
            p = dr - p - (p + xp.matrix_transpose(p))
            p = _reduced(xp, 1.125, p, p, r)
            dr = p + xp.matrix_transpose(p)  # 9/4 (dr - 2 (r dr + dr r) + r r dr + r dr r + dr r r)
            r = _step(xp, r)
            dz = _reduced(xp, 1.5, _reduced(xp, 1.0, dz, dz, r), z, dr)
            z = _reduced(xp, 1.5, z, z, r)
        return z, dz

    def newton_steps(self, itemsize: int) -> int | None:
        epsilon = DOUBLE if itemsize == 8 else SINGLE
        fits = not self.needs_float64(epsilon) and self.iterations <= most_steps(_GROWTH, epsilon)
        return self.iterations if fits else None

    def _steps(self, epsilon: float) -> int:
        return min(self.iterations, most_steps(_GROWTH, epsilon))


def is_iterated_in(solver: Any, itemsize: int) -> TypeGuard[Newton]:
    """Whether a solver is Newton's iteration with no more steps than kernels can take in numbers of so many bytes.

    Kernels take all of a solver's steps in the dtype of the statistics, which is float32 for half precision.
    """
    if not isinstance(solver, Newton):
        return False
    epsilon = DOUBLE if itemsize == 8 else SINGLE
    return not solver.needs_float64(epsilon) and solver.iterations <= most_steps(_GROWTH, epsilon)


def _step(xp: Namespace, r: Array) -> Array:
    once = _reduced(xp, 1.0, r, r, r)
    return _reduced(xp, 2.25, once, once, r)


def _reduced(xp: Namespace, factor: float, c: Array, a: Array, b: Array) -> Array:
    """Factor (C - A B)."""
    one_call = getattr(xp, "multiply_add", None)
    if one_call is not None:
        return one_call(factor, c, -factor, a, b)
    difference = c - a @ b
    return difference if factor == 1 else factor * difference
