"""The coupled iteration behind Newton's method and the minimax polynomials, and its derivative.

With S scaled to S / t, eigenvalues in (0, 1], every step multiplies by a polynomial Q of R = Z Y::

    Y = S / t    Z = I
    R = Z Y      Q = a I + b R + c R R      Z = Q Z      Y = Y Q
    W = Z / sqrt(t)

The order of the products matters: Y Z and Z Q would be the same in exact arithmetic, and diverge in floating
point (N. J. Higham, Functions of Matrices, 2008, eq. 6.35).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from polywhiten._types import Array, Namespace

Step = tuple[float, float, float]  # a, b, c
Pair = tuple[Array, Array]  # a matrix, and its directional derivative where that is wanted


def symmetric_part(xp: Namespace, m: Array) -> Array:
    return 0.5 * (m + xp.matrix_transpose(m))


def identity_like(xp: Namespace, matrix: Array) -> Array:
    # not xp.eye: the device of an array that is being traced can be asked for in no way that all libraries share
    return xp.tril(xp.triu(xp.ones_like(matrix)))


def trace(xp: Namespace, matrix: Array) -> Array:
    """Trace, shape (..., 1, 1)."""
    return xp.sum(matrix * identity_like(xp, matrix), axis=(-2, -1), keepdims=True)


def inner(xp: Namespace, a: Array, b: Array) -> Array:
    """Frobenius inner product, shape (..., 1, 1)."""
    return xp.sum(a * b, axis=(-2, -1), keepdims=True)


class CoupledIteration(ABC):
    """An inverse square root by polynomial steps; a subclass says how to scale and which polynomials."""

    symmetrize: ClassVar[bool] = False  # whether R is made symmetric again in every step

    @property
    @abstractmethod
    def steps(self) -> tuple[Step, ...]: ...

    @abstractmethod
    def scale(self, xp: Namespace, cov: Array) -> Array:
        """A bound t of the largest eigenvalue, shape (..., 1, 1)."""

    @abstractmethod
    def scale_gradient(self, xp: Namespace, cov: Array, scale: Array) -> Array:
        """dt / dS, shape (..., d, d) or broadcastable to it."""

    def inverse_sqrt(self, xp: Namespace, cov: Array) -> Array:
        t = self._positive_scale(xp, cov)
        return self._iterate(xp, cov / t)[0] / xp.sqrt(t)

    def adjoint(self, xp: Namespace, cov: Array, grad: Array) -> Array:
        """Gradient with respect to `cov`: the directional derivative along `grad`.

        Z is a polynomial in S and S is symmetric, so the derivative of S -> Z is self-adjoint.
        """
        t = self._positive_scale(xp, cov)
        g = symmetric_part(xp, grad)
        z, dz = self._iterate(xp, cov / t, g)
        along_scale = inner(xp, dz, cov / t) + inner(xp, g, z) / 2
        return (dz - along_scale * self.scale_gradient(xp, cov, t)) / t / xp.sqrt(t)

    def _positive_scale(self, xp: Namespace, cov: Array) -> Array:
        # eps = 0 and constant channels: S is 0, and so is S / t
        return xp.clip(self.scale(xp, cov), min=float(xp.finfo(cov.dtype).smallest_normal))

    def _iterate(self, xp: Namespace, y: Array, dy: Array = None) -> Pair:
        """Z, and its directional derivative along dy where that is given."""
        eye = identity_like(xp, y)
        y = (y, dy)
        z: Any = None
        for k, (a, b, c) in enumerate(self.steps):
            r, dr = y if z is None else _times(z, y)
            if self.symmetrize:
                r, dr = symmetric_part(xp, r), None if dr is None else symmetric_part(xp, dr)
            q, dq = a * eye + b * r, None if dr is None else b * dr
            if c:
                square, dsquare = _times((r, dr), (r, dr))
                q, dq = q + c * square, None if dq is None else dq + c * dsquare
            z = (q, dq) if z is None else _times((q, dq), z)
            if k < len(self.steps) - 1:
                y = _times(y, (q, dq))
        return z[0], z[1]


def _times(m: Pair, n: Pair) -> Pair:
    """A product by the product rule."""
    (a, da), (b, db) = m, n
    return a @ b, None if da is None else da @ b + a @ db
