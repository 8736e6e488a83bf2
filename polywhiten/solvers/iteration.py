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
from collections.abc import Sequence
from dataclasses import dataclass

from array_api_compat import device

from polywhiten._types import Array, Namespace

Step = tuple[float, float, float]  # a, b, c


@dataclass(frozen=True)
class Pair:
    """A matrix with its directional derivative; arithmetic carries both by the product rule."""

    value: Array
    tangent: Array

    def __matmul__(self, other: Pair) -> Pair:
        return Pair(self.value @ other.value, self.tangent @ other.value + self.value @ other.tangent)

    def __rmul__(self, factor: float) -> Pair:
        return Pair(factor * self.value, factor * self.tangent)

    def __add__(self, other: Pair | Array) -> Pair:
        if isinstance(other, Pair):
            return Pair(self.value + other.value, self.tangent + other.tangent)
        return Pair(self.value + other, self.tangent)  # a constant


def symmetric_part(xp: Namespace, m: Array) -> Array:
    if isinstance(m, Pair):
        return Pair(symmetric_part(xp, m.value), symmetric_part(xp, m.tangent))
    return 0.5 * (m + xp.matrix_transpose(m))


def identity_like(xp: Namespace, matrix: Array) -> Array:
    return xp.eye(matrix.shape[-1], dtype=matrix.dtype, device=device(matrix))


def trace(xp: Namespace, matrix: Array) -> Array:
    """Trace, shape (..., 1, 1)."""
    return xp.sum(matrix * identity_like(xp, matrix), axis=(-2, -1), keepdims=True)


def inner(xp: Namespace, a: Array, b: Array) -> Array:
    """Frobenius inner product, shape (..., 1, 1)."""
    return xp.sum(a * b, axis=(-2, -1), keepdims=True)


class CoupledIteration(ABC):
    """An inverse square root by polynomial steps; a subclass says how to scale and which polynomials."""

    symmetrize = False  # whether R is made symmetric again in every step

    @property
    @abstractmethod
    def steps(self) -> Sequence[Step]: ...

    @abstractmethod
    def scale(self, xp: Namespace, cov: Array) -> Array:
        """A bound t of the largest eigenvalue, shape (..., 1, 1)."""

    @abstractmethod
    def scale_gradient(self, xp: Namespace, cov: Array, scale: Array) -> Array:
        """dt / dS, shape (..., d, d) or broadcastable to it."""

    def inverse_sqrt(self, xp: Namespace, cov: Array) -> Array:
        t = self._positive_scale(xp, cov)
        return self._iterate(xp, cov / t, identity_like(xp, cov)) / xp.sqrt(t)

    def adjoint(self, xp: Namespace, cov: Array, grad: Array) -> Array:
        """Gradient with respect to `cov`: the directional derivative along `grad`.

        Z is a polynomial in S and S is symmetric, so the derivative of S -> Z is self-adjoint.
        """
        t = self._positive_scale(xp, cov)
        g = symmetric_part(xp, grad)
        z = self._iterate(xp, Pair(cov / t, g), identity_like(xp, cov))
        d = z.tangent / xp.sqrt(t)
        along_scale = inner(xp, d, cov) / t**2 + inner(xp, g, z.value) / (2 * t * xp.sqrt(t))
        return d / t - along_scale * self.scale_gradient(xp, cov, t)

    def _positive_scale(self, xp: Namespace, cov: Array) -> Array:
        # eps = 0 and constant channels: S is 0, and so is S / t
        return xp.clip(self.scale(xp, cov), min=float(xp.finfo(cov.dtype).smallest_normal))

    def _iterate(self, xp: Namespace, y: Array, eye: Array) -> Array:
        """Z of a matrix, or of a Pair."""
        z = None
        last = len(self.steps) - 1
        for k, (a, b, c) in enumerate(self.steps):
            r = y if z is None else z @ y
            if self.symmetrize:
                r = symmetric_part(xp, r)
            q = b * r + a * eye
            if c:
                q = q + c * (r @ r)
            z = q if z is None else q @ z
            if k < last:
                y = y @ q
        return z
