"""The parts that all iterations for the inverse square root share: scaling, gradient and precision.

Steps multiply the smallest eigenvalues of S / t, and rounding errors with them. So an iteration that would make errors
of float32 visible works in float64, and no iteration takes steps that could whiten nothing but rounding errors.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

from polywhiten._types import Array, Namespace
from polywhiten.solvers.solver import Solver

Pair = tuple[Array, Array]  # a matrix and its directional derivative, which is None if nobody asked for it

SINGLE, DOUBLE = 2.0**-23, 2.0**-52  # machine epsilons of float32 and float64
_MAX_LOST_BITS = 14.5  # of float32's 23: 12 Newton steps lose 14.04, and 13 would lose too many


def symmetric_part(xp: Namespace, m: Array) -> Array:
    return 0.5 * (m + xp.matrix_transpose(m))


def identity_like(xp: Namespace, matrices: Array) -> Array:
    """Return an identity matrix that broadcasts with matrices (..., d, d) and has as many dimensions."""
    native = getattr(xp, "identity_like", None)
    if native is not None:
        return native(matrices)
    one = matrices[(*(slice(0, 0 if n == 0 else 1) for n in matrices.shape[:-2]), ...)]
    # not xp.eye: there is no way common to all libraries to ask a traced array for its device
    return xp.tril(xp.triu(xp.ones_like(one)))


def trace(xp: Namespace, matrix: Array) -> Array:
    """Return the trace, of shape (..., 1, 1)."""
    return xp.sum(matrix * identity_like(xp, matrix), axis=(-2, -1), keepdims=True)


def inner(xp: Namespace, a: Array, b: Array) -> Array:
    """Return the Frobenius inner product, of shape (..., 1, 1)."""
    return xp.sum(a * b, axis=(-2, -1), keepdims=True)


def positive(xp: Namespace, scale: Array, dtype: Any) -> Array:
    """Return a scale that is at least the dtype's smallest normal number."""
    return xp.clip(scale, min=float(xp.finfo(dtype).smallest_normal))


def divisor(xp: Namespace, scale: Array, dtype: Any) -> Array:
    """Return what a covariance of this scale is divided by: infinity for a scale of 0, so that the whitener is 0.

    The scale is 0 if all channels are constant, and eps is 0 or relative to their variance. The whitener of a tiny
    scale in its place would spoil gradients, and averages of whiteners.
    """
    return xp.where(scale <= 0, xp.full_like(scale, math.inf), positive(xp, scale, dtype))


class ScaledIteration(Solver):
    """Base class for W = Z(S / t) / sqrt(t), where Z is a polynomial and S / t has its eigenvalues in (0, 1].

    All of it consists of products, which every library differentiates.
    """

    @property
    @abstractmethod
    def lost_bits(self) -> float:
        """The base-2 logarithm of the factor by which all steps together multiply the smallest eigenvalues of S / t."""

    @abstractmethod
    def scale(self, xp: Namespace, cov: Array) -> Array:
        """Return t, an upper bound of the largest eigenvalue, of shape (..., 1, 1)."""

    @abstractmethod
    def scale_gradient(self, xp: Namespace, cov: Array, scale: Array) -> Array:
        """Return dt / dS, of shape (..., d, d) or broadcastable to it."""

    @abstractmethod
    def iterate(self, xp: Namespace, s: Array, ds: Array | None, epsilon: float) -> Pair:
        """Return Z, and its derivative along a symmetric ds, for scaled matrices known up to the machine epsilon."""

    def needs_float64(self, epsilon: float) -> bool:
        return epsilon > DOUBLE and self.lost_bits > _MAX_LOST_BITS

    def inverse_sqrt(self, xp: Namespace, cov: Array) -> Array:
        dtype, epsilon, (cov,) = self._prepare(xp, cov)
        t = divisor(xp, self.scale(xp, cov), dtype)
        z, _ = self.iterate(xp, cov / t, None, epsilon)
        return xp.astype(z / xp.sqrt(t), dtype, copy=False)

    def adjoint(self, xp: Namespace, cov: Array, grad: Array) -> Array:
        """Return the gradient with respect to `cov`, from the directional derivative of Z along `grad`.

        Z is a polynomial in the symmetric S, so the derivative of S -> Z is self-adjoint.
        """
        dtype, epsilon, (cov, grad) = self._prepare(xp, cov, grad)
        t = divisor(xp, self.scale(xp, cov), dtype)
        s, g = cov / t, symmetric_part(xp, grad)
        z, dz = self.iterate(xp, s, g, epsilon)
        along_scale = inner(xp, dz, s) + inner(xp, g, z) / 2
        gradient = (dz - along_scale * self.scale_gradient(xp, cov, t)) / t / xp.sqrt(t)
        return xp.astype(gradient, dtype, copy=False)

    def _prepare(self, xp: Namespace, *matrices: Array) -> tuple[Any, float, tuple[Array, ...]]:
        """Return the matrices' dtype, its machine epsilon, and the matrices in the dtype to work in."""
        dtype = matrices[0].dtype
        epsilon = float(xp.finfo(dtype).eps)
        if self.needs_float64(epsilon):
            matrices = tuple(_to_float64(xp, m) for m in matrices)
        return dtype, epsilon, matrices


def max_steps(growth: float, epsilon: float) -> int:
    """Return after how many steps that multiply it by `growth` a quarter of the machine epsilon becomes 1."""
    return math.ceil(math.log(4 / epsilon) / math.log(growth))


def _to_float64(xp: Namespace, m: Array) -> Array:
    """Return the matrices in float64, or unchanged on devices without it."""
    native = getattr(xp, "widened", None)
    return xp.astype(m, xp.float64) if native is None else native(m)
