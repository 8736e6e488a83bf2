"""What iterations for the inverse square root share: the scaling, how a derivative makes a gradient, and its digits.

An iteration multiplies the smallest eigenvalues of S / t by a constant in every step, until they reach 1. Rounding
errors beside them grow as they do. Where S is singular, as it is for fewer samples than channels, nothing else is there
to grow, and the gradient, a difference of two terms that grow alike, shows it first. Therefore

- an iteration that multiplies them by so much that rounding in float32 would show works in float64, and
- no iteration takes more steps than bring eigenvalues of a quarter of the covariance's machine epsilon to 1: what only
  later steps would bring there is rounding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

from polywhiten._types import Array, Namespace

SINGLE, DOUBLE = 2.0**-23, 2.0**-52  # machine epsilons of float32 and float64
_SINGLE_BITS = 14.5  # of float32's 23 that an iteration may lose, as 12 of Newton's steps do; else it works in float64


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


def positive(xp: Namespace, scale: Array, dtype: Any) -> Array:
    """The scale, or where that is 0 the smallest normal number of the dtype: eps = 0 and constant channels make S 0."""
    return xp.clip(scale, min=float(xp.finfo(dtype).smallest_normal))


class ScaledIteration(ABC):
    """W = Z(S / t) / sqrt(t) with a polynomial Z in S / t, whose eigenvalues are in (0, 1].

    A subclass says which t, and how it comes to Z.
    """

    has_second: ClassVar[bool] = False  # the adjoint is made of products, which every library differentiates

    @property
    @abstractmethod
    def lost_bits(self) -> float:
        """Base-2 logarithm of what all steps together multiply the smallest eigenvalues of S / t by."""

    @abstractmethod
    def scale(self, xp: Namespace, cov: Array) -> Array:
        """A bound t of the largest eigenvalue, shape (..., 1, 1)."""

    @abstractmethod
    def scale_gradient(self, xp: Namespace, cov: Array, scale: Array) -> Array:
        """dt / dS, shape (..., d, d) or broadcastable to it."""

    @abstractmethod
    def value(self, xp: Namespace, s: Array, epsilon: float) -> Array:
        """Z of scaled matrices, which are known up to the machine epsilon."""

    @abstractmethod
    def value_and_derivative(self, xp: Namespace, s: Array, ds: Array, epsilon: float) -> tuple[Array, Array]:
        """Z, and its derivative along symmetric ds."""

    def needs_float64(self, epsilon: float) -> bool:
        """Whether the steps would make rounding visible, in numbers of that machine epsilon."""
        return epsilon > DOUBLE and self.lost_bits > _SINGLE_BITS

    def by_products(self) -> Self:
        return self

    def newton_steps(self, itemsize: int) -> int | None:
        return None

    def inverse_sqrt(self, xp: Namespace, cov: Array) -> Array:
        dtype, epsilon, (cov,) = self._prepared(xp, cov)
        t = positive(xp, self.scale(xp, cov), dtype)
        return xp.astype(self.value(xp, cov / t, epsilon) / xp.sqrt(t), dtype, copy=False)

    def adjoint(self, xp: Namespace, cov: Array, grad: Array) -> Array:
        """Gradient with respect to `cov`: the directional derivative along `grad`.

        Z is a polynomial in S and S is symmetric, so the derivative of S -> Z is self-adjoint.
        """
        dtype, epsilon, (cov, grad) = self._prepared(xp, cov, grad)
        t = positive(xp, self.scale(xp, cov), dtype)
        s, g = cov / t, symmetric_part(xp, grad)
        z, dz = self.value_and_derivative(xp, s, g, epsilon)
        along_scale = inner(xp, dz, s) + inner(xp, g, z) / 2
        gradient = (dz - along_scale * self.scale_gradient(xp, cov, t)) / t / xp.sqrt(t)
        return xp.astype(gradient, dtype, copy=False)

    def _prepared(self, xp: Namespace, *matrices: Array) -> tuple[Any, float, tuple[Array, ...]]:
        """The matrices' dtype and its machine epsilon, and the matrices in the dtype to work in."""
        dtype = matrices[0].dtype
        epsilon = float(xp.finfo(dtype).eps)
        if self.needs_float64(epsilon):
            matrices = tuple(_widened(xp, m) for m in matrices)
        return dtype, epsilon, matrices


def most_steps(growth: float, epsilon: float) -> int:
    """Steps that bring an eigenvalue of a quarter of the machine epsilon to 1, by its growth in one step."""
    return math.ceil(math.log(4 / epsilon) / math.log(growth))


def _widened(xp: Namespace, m: Array) -> Array:
    """The matrices in float64; as they are on devices that have none."""
    own = getattr(xp, "widened", None)
    return xp.astype(m, xp.float64) if own is None else own(m)
