"""What iterations for the inverse square root share: the scaling, and how a derivative makes a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod

from polywhiten._types import Array, Namespace


def symmetric_part(xp: Namespace, m: Array) -> Array:
    return 0.5 * (m + xp.matrix_transpose(m))


def identity_like(xp: Namespace, matrices: Array) -> Array:
    """The identity, to broadcast with matrices (..., d, d), and of as many dimensions."""
    own = getattr(xp, "identity_like", None)
    if own is not None:
        return own(matrices)
    one = matrices[(*(slice(0, 0 if n == 0 else 1) for n in matrices.shape[:-2]), ...)]
    # not xp.eye: the device of an array that is being traced can be asked for in no way that all libraries share
    return xp.tril(xp.triu(xp.ones_like(one)))


def trace(xp: Namespace, matrix: Array) -> Array:
    """Trace, shape (..., 1, 1)."""
    return xp.sum(matrix * identity_like(xp, matrix), axis=(-2, -1), keepdims=True)


def inner(xp: Namespace, a: Array, b: Array) -> Array:
    """Frobenius inner product, shape (..., 1, 1)."""
    return xp.sum(a * b, axis=(-2, -1), keepdims=True)


class ScaledIteration(ABC):
    """W = Z(S / t) / sqrt(t) with a polynomial Z in S / t, whose eigenvalues are in (0, 1].

    A subclass says which t, and how it comes to Z.
    """

    @abstractmethod
    def scale(self, xp: Namespace, cov: Array) -> Array:
        """A bound t of the largest eigenvalue, shape (..., 1, 1)."""

    @abstractmethod
    def scale_gradient(self, xp: Namespace, cov: Array, scale: Array) -> Array:
        """dt / dS, shape (..., d, d) or broadcastable to it."""

    @abstractmethod
    def value(self, xp: Namespace, s: Array) -> Array:
        """Z of scaled matrices."""

    @abstractmethod
    def value_and_derivative(self, xp: Namespace, s: Array, ds: Array) -> tuple[Array, Array]:
        """Z, and its derivative along symmetric ds."""

    def inverse_sqrt(self, xp: Namespace, cov: Array) -> Array:
        t = self._positive_scale(xp, cov)
        return self.value(xp, cov / t) / xp.sqrt(t)

    def adjoint(self, xp: Namespace, cov: Array, grad: Array) -> Array:
        """Gradient with respect to `cov`: the directional derivative along `grad`.

        Z is a polynomial in S and S is symmetric, so the derivative of S -> Z is self-adjoint.
        """
        t = self._positive_scale(xp, cov)
        s, g = cov / t, symmetric_part(xp, grad)
        z, dz = self.value_and_derivative(xp, s, g)
        along_scale = inner(xp, dz, s) + inner(xp, g, z) / 2
        return (dz - along_scale * self.scale_gradient(xp, cov, t)) / t / xp.sqrt(t)

    def _positive_scale(self, xp: Namespace, cov: Array) -> Array:
        # eps = 0 and constant channels: S is 0, and so is S / t
        return xp.clip(self.scale(xp, cov), min=float(xp.finfo(cov.dtype).smallest_normal))
