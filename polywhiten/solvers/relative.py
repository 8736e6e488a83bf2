"""A solver with an eps that is relative to the mean variance."""

from __future__ import annotations

from dataclasses import dataclass

from polywhiten._types import Array, Namespace
from polywhiten.solvers.iteration import identity_like, trace
from polywhiten.solvers.solver import AdjointVJP, Solver


@dataclass(frozen=True)
class Relative(Solver):
    """W = S^(-1/2) by another solver, where S = cov + eps (trace(cov) / d) I.

    Data that is scaled by a factor is then whitened as before, up to the factor. The map from cov to S is linear and
    self-adjoint, so it maps gradients as it maps covariances.
    """

    solver: Solver
    eps: float

    @property
    def iterations(self) -> int | None:
        """The inner solver's number of steps; None for "eigh"."""
        return getattr(self.solver, "iterations", None)

    @property
    def adjoint_vjp(self) -> AdjointVJP | None:
        vjp = self.solver.adjoint_vjp
        if vjp is None:
            return None

        def run(xp: Namespace, cov: Array, grad: Array, direction: Array) -> tuple[Array, Array]:
            dcov, dgrad = vjp(xp, self._shift(xp, cov), grad, self._shift(xp, direction))
            return self._shift(xp, dcov), dgrad

        return run

    def needs_float64(self, epsilon: float) -> bool:
        return self.solver.needs_float64(epsilon)

    def without_eigh(self) -> Relative:
        return Relative(self.solver.without_eigh(), self.eps)

    def inverse_sqrt(self, xp: Namespace, cov: Array) -> Array:
        return self.solver.inverse_sqrt(xp, self._shift(xp, cov))

    def adjoint(self, xp: Namespace, cov: Array, grad: Array) -> Array:
        return self._shift(xp, self.solver.adjoint(xp, self._shift(xp, cov), grad))

    def _shift(self, xp: Namespace, m: Array) -> Array:
        return m + self.eps / m.shape[-1] * trace(xp, m) * identity_like(xp, m)
