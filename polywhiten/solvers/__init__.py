"""Inverse square roots of symmetric positive definite matrices, each with its derivative."""

from __future__ import annotations

from typing import Protocol

from polywhiten._types import Array, Namespace
from polywhiten.checks import check_choice, check_positive
from polywhiten.solvers.eigh import Eigh
from polywhiten.solvers.minimax import Minimax
from polywhiten.solvers.newton import Newton

METHODS = ("newton", "eigh", "minimax")
DEFAULT_ITERATIONS = 5


class Solver(Protocol):
    """W = S^(-1/2) of S (..., d, d), and the gradient with respect to S."""

    def inverse_sqrt(self, xp: Namespace, cov: Array) -> Array: ...

    def adjoint(self, xp: Namespace, cov: Array, grad: Array) -> Array: ...


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
