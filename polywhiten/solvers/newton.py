"""Newton's iteration: the papers' solver, partial on purpose where T is small."""

from dataclasses import dataclass

from polywhiten._types import Array, Namespace
from polywhiten.solvers.iteration import CoupledIteration, Step, identity_like, trace


@dataclass(frozen=True)
class Newton(CoupledIteration):
    """T steps of the coupled Newton-Schulz iteration from S / trace(S).

    The same P_T as IterNorm's P <- (3 P - P^3 S) / 2 in exact arithmetic, in an order of products that is stable for
    every T. An eigenvalue that is small beside the trace is whitened in part: T sets how much.

    References
    ----------
    Huang et al., Iterative Normalization, CVPR 2019, arXiv:1904.03441, eq. 6 and 7.
    """

    iterations: int = 5

    @property
    def steps(self) -> tuple[Step, ...]:
        return ((1.5, -0.5, 0.0),) * self.iterations

    def scale(self, xp: Namespace, cov: Array) -> Array:
        return trace(xp, cov)

    def scale_gradient(self, xp: Namespace, cov: Array, scale: Array) -> Array:
        return identity_like(xp, cov)
