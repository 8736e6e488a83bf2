"""Newton's iteration: the papers' solver, partial on purpose where T is small.

With S scaled to R = S / t, eigenvalues in (0, 1], a step multiplies Z by E = (3 I - R) / 2 and so R = Z S Z by E E::

    Z <- (3 Z - Z R) / 2        R <- (9 R - 6 R R + R R R) / 4        W = Z / sqrt(t)

Rounding errors in R don't grow, as those of the papers' P <- (3 P - P P P S) / 2 do: R alone decides the steps, and
the map of R contracts near I. R and its derivative along a symmetric matrix are symmetric, so that R dR is known from
dR R, and a step with its derivative costs seven products.
"""

from dataclasses import dataclass

from polywhiten._types import Array, Namespace
from polywhiten.solvers.iteration import ScaledIteration, identity_like, trace


@dataclass(frozen=True)
class Newton(ScaledIteration):
    """T steps of Newton's iteration from S / trace(S).

    The same Z as IterNorm's P <- (3 P - P^3 S) / 2 in exact arithmetic, by a recurrence that is stable for every T.
    An eigenvalue that is small beside the trace is whitened in part: T sets how much.

    References
    ----------
    Huang et al., Iterative Normalization, CVPR 2019, arXiv:1904.03441, eq. 6 and 7.
    """

    iterations: int = 5

    def scale(self, xp: Namespace, cov: Array) -> Array:
        return trace(xp, cov)

    def scale_gradient(self, xp: Namespace, cov: Array, scale: Array) -> Array:
        return identity_like(xp, cov)

    def value(self, xp: Namespace, s: Array) -> Array:
        r, z = s, 1.5 * identity_like(xp, s) - 0.5 * s
        for _ in range(self.iterations - 1):
            r = _next(xp, r)
            z = _multiply_add(xp, 1.5, z, -0.5, z, r)
        return z

    def value_and_derivative(self, xp: Namespace, s: Array, ds: Array) -> tuple[Array, Array]:
        r, z = s, 1.5 * identity_like(xp, s) - 0.5 * s
        dr, dz = ds, -0.5 * ds
        for _ in range(self.iterations - 1):
            p = _multiply_add(xp, -4.0, dr, 1.0, r, dr)
            half = _multiply_add(xp, 1.125, dr, 0.25, r, p + 0.5 * xp.matrix_transpose(p))
            dr = half + xp.matrix_transpose(half)  # (9 dR - 6 (R dR + dR R) + R R dR + R dR R + dR R R) / 4
            r = _next(xp, r)
            dz = _multiply_add(xp, 1.0, _multiply_add(xp, 1.5, dz, -0.5, dz, r), -0.5, z, dr)
            z = _multiply_add(xp, 1.5, z, -0.5, z, r)
        return z, dz


def _next(xp: Namespace, r: Array) -> Array:
    return _multiply_add(xp, 2.25, r, 0.25, r, _multiply_add(xp, -6.0, r, 1.0, r, r))


def _multiply_add(xp: Namespace, beta: float, c: Array, alpha: float, a: Array, b: Array) -> Array:
    """Beta c + alpha a b: in one call where the backend's namespace has one."""
    one_call = getattr(xp, "multiply_add", None)
    if one_call is None:
        return beta * c + alpha * (a @ b)
    return one_call(beta, c, alpha, a, b)
