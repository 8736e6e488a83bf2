"""Inverse square roots of symmetric positive definite matrices, each with its derivative."""

from __future__ import annotations

from typing import Protocol, TypeGuard

from polywhiten._types import Array, Namespace
from polywhiten.checks import check_choice, check_eps, check_positive
from polywhiten.solvers.eigh import Eigh
from polywhiten.solvers.minimax import Minimax
from polywhiten.solvers.newton import Newton
from polywhiten.solvers.relative import Relative

METHODS = ("newton", "eigh", "minimax")
DEFAULT_ITERATIONS = 5


class Solver(Protocol):
    """W = S^(-1/2) of S (..., d, d), and the gradient with respect to S."""

    @property
    def has_second(self) -> bool:
        """Whether it is a `TwiceDifferentiable`."""

    def needs_float64(self, epsilon: float) -> bool:
        """Whether it works in float64 on matrices of that machine epsilon, if their device has float64."""

    def newton_steps(self, itemsize: int) -> int | None:
        """Return how many of Newton's steps give this result in numbers of so many bytes; None if none do."""

    def by_products(self) -> Solver:
        """A solver with the same result that needs no eigendecomposition, for graphs that can't have one."""

    def inverse_sqrt(self, xp: Namespace, cov: Array) -> Array: ...

    def adjoint(self, xp: Namespace, cov: Array, grad: Array) -> Array: ...


class TwiceDifferentiable(Solver, Protocol):
    """A solver whose adjoint has a derivative of its own, as automatic differentiation of it would fail."""

    def second(self, xp: Namespace, cov: Array, grad: Array, direction: Array) -> Array:
        """Gradient of <adjoint(cov, grad), direction> with respect to cov."""


def is_twice_differentiable(solver: Solver) -> TypeGuard[TwiceDifferentiable]:
    return solver.has_second


def regularized_solver(method: str, iterations: int | None, eps: float, relative_eps: bool) -> tuple[Solver, float]:
    """The solver of checked arguments, and what is to be added to the covariance's diagonal before it."""
    solver, eps = solver_for(method, iterations), check_eps(eps)
    return (Relative(solver, eps), 0.0) if relative_eps else (solver, eps)


def solver_for(method: str, iterations: int | None) -> Solver:
    """The solver that `method` and `iterations` name; ValueError or TypeError where they don't name one."""
    check_choice("method", method, METHODS)
    if method == "eigh":
        if iterations is not None:
            raise ValueError(
                f"iterations={iterations!r} has no meaning for method='eigh', which is exact: leave it out"
            )
        return Eigh()
    if iterations is None:
        iterations = DEFAULT_ITERATIONS
    iterations = check_positive("iterations", iterations)
    return Newton(iterations) if method == "newton" else Minimax(iterations)
