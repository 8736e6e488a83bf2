"""Inverse square roots of symmetric positive definite matrices, with their derivatives: one file a solver.

The formulas of all solvers are derived in `docs/mathematics.md`.
"""

from __future__ import annotations

from polywhiten.checks import check_choice, check_eps, check_positive
from polywhiten.solvers.eigh import Eigh
from polywhiten.solvers.minimax import Minimax
from polywhiten.solvers.newton import Newton
from polywhiten.solvers.relative import Relative
from polywhiten.solvers.solver import Solver

__all__ = ["METHODS", "Solver", "regularized_solver", "solver_for"]

METHODS = ("newton", "eigh", "minimax")
DEFAULT_ITERATIONS = 5


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
