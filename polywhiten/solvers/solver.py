"""What all solvers for the inverse square root offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from polywhiten._types import Array, Namespace

AdjointVJP = Callable[[Namespace, Array, Array, Array], tuple[Array, Array]]  # of xp, cov, grad, direction


class Solver(ABC):
    """Computes W = S^(-1/2) for matrices S of shape (..., d, d), and the gradient with respect to S.

    Solvers are hashable, and equal if their settings are. Backends ask a solver what it offers, never for its class.
    """

    @abstractmethod
    def inverse_sqrt(self, xp: Namespace, cov: Array) -> Array:
        """Return W."""

    @abstractmethod
    def adjoint(self, xp: Namespace, cov: Array, grad: Array) -> Array:
        """Return the gradient of <inverse_sqrt(cov), grad> with respect to cov."""

    @property
    def adjoint_vjp(self) -> AdjointVJP | None:
        """Computes the gradients of <adjoint(cov, grad), direction> with respect to cov and grad.

        None if automatic differentiation of `adjoint` gives them right.
        """
        return None

    def needs_float64(self, epsilon: float) -> bool:
        """Return whether matrices of this machine epsilon are computed in float64, on devices that have it."""
        return False

    def newton_steps(self, itemsize: int) -> int | None:
        """Return how many Newton steps from S / trace(S) a compiled kernel has to take for this solver's result.

        The kernel computes every step in numbers of `itemsize` bytes. None if it can't compute the result like this.
        """
        return None

    def without_eigh(self) -> Solver:
        """Return a solver with the same result that needs no eigendecomposition, for graphs that can't have one."""
        return self
