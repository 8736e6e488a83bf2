"""Another solver, after a share of the mean variance has been added to every variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polywhiten._types import Array, Namespace
from polywhiten.solvers.iteration import identity_like, trace

if TYPE_CHECKING:
    from polywhiten.solvers import Solver


@dataclass(frozen=True)
class Relative:
    """W = S^(-1/2) by another solver, of S = cov + eps (trace(cov) / d) I.

    Whitening is then the same at every scale of the data, up to the scale itself. The map from cov to S is linear and
    self-adjoint: gradients pass through it as covariances do.
    """

    solver: Solver
    eps: float

    @property
    def iterations(self) -> int | None:
        """Steps of the solver; None for "eigh"."""
        return getattr(self.solver, "iterations", None)

    @property
    def has_second(self) -> bool:
        return self.solver.has_second

    def needs_float64(self, epsilon: float) -> bool:
        return self.solver.needs_float64(epsilon)

    def newton_steps(self, itemsize: int) -> int | None:
        return None

    def by_products(self) -> Relative:
        return Relative(self.solver.by_products(), self.eps)

    def inverse_sqrt(self, xp: Namespace, cov: Array) -> Array:
        return self.solver.inverse_sqrt(xp, self._shifted(xp, cov))

    def adjoint(self, xp: Namespace, cov: Array, grad: Array) -> Array:
        """Gradient with respect to `cov`."""
        return self._shifted(xp, self.solver.adjoint(xp, self._shifted(xp, cov), grad))

    def second(self, xp: Namespace, cov: Array, grad: Array, direction: Array) -> Array:
        """Gradient of <adjoint(cov, grad), direction> with respect to `cov`."""
        shifted = self._shifted(xp, cov), grad, self._shifted(xp, direction)
        solver: Any = self.solver  # which has one, if this is asked for
        return self._shifted(xp, solver.second(xp, *shifted))

    def _shifted(self, xp: Namespace, m: Array) -> Array:
        return m + self.eps / m.shape[-1] * trace(xp, m) * identity_like(xp, m)
