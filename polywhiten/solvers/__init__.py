"""Inverse square roots of symmetric positive definite matrices, with their derivatives: one file a solver.

The formulas of all solvers are derived in `docs/mathematics.md`.
"""

from __future__ import annotations

from typing import Protocol

from polywhiten._types import Array, Namespace
from polywhiten.checks import check_choice, check_eps, check_positive
from polywhiten.solvers.eigh import Eigh
from polywhiten.solvers.iteration import AdjointVJP
from polywhiten.solvers.minimax import Minimax
from polywhiten.solvers.newton import Newton
from polywhiten.solvers.relative import Relative

METHODS = ("newton", "eigh", "minimax")
DEFAULT_ITERATIONS = 5


class Solver(Protocol):
    """Computes W = S^(-1/2) for matrices S of shape (..., d, d), and the gradient with respect to S.

    A solver is hashable, and two solvers with the same settings are equal. Backends ask it what it offers, and never
    which class it has.
    """

    @property
    def adjoint_vjp(self) -> AdjointVJP | None:
        """Computes the gradients of <adjoint(cov, grad), direction> with respect to cov and grad.

        None if automatic differentiation of `adjoint` gives them right.
        """

    def needs_float64(self, epsilon: float) -> bool:
        """Return whether matrices of this machine epsilon are computed in float64, on devices that have it."""

    def newton_steps(self, itemsize: int) -> int | None:
        """Return how many Newton steps from S / trace(S) a compiled kernel has to take for this solver's result.

        The kernel computes every step in floating-point numbers of `itemsize` bytes, of 4 for half precision. None if
        it can't compute the result like this.
        """

    def without_eigh(self) -> Solver:
        """Return a solver with the same result that needs no eigendecomposition, for graphs that can't have one."""

    def inverse_sqrt(self, xp: Namespace, cov: Array) -> Array:
        """Return W."""

    def adjoint(self, xp: Namespace, cov: Array, grad: Array) -> Array:
        """Return the gradient of <inverse_sqrt(cov), grad> with respect to cov."""


def regularized_solver(method: str, iterations: int | None, eps: float, relative_eps: bool) -> tuple[Solver, float]:
    """Return the solver for a layer's arguments, and the number to add to the covariance's diagonal before solving."""
    solver, eps = solver_for(method, iterations), check_eps(eps)
    return (Relative(solver, eps), 0.0) if relative_eps else (solver, eps)


def solver_for(method: str, iterations: int | None) -> Solver:
    """Return the solver that `method` and `iterations` name; raise ValueError or TypeError if there is none."""
    check_choice("method", method, METHODS)
    if method == "eigh":
        if iterations is not None:
            raise ValueError(
                f"iterations={iterations!r} has no meaning for method='eigh', which is exact: leave it out"
            )
        return Eigh()
    iterations = DEFAULT_ITERATIONS if iterations is None else check_positive("iterations", iterations)
    return Newton(iterations) if method == "newton" else Minimax(iterations)
