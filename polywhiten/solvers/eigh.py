"""Eigendecomposition: exact ZCA whitening, as in decorrelated batch normalization."""

from dataclasses import dataclass

from polywhiten._types import Array, Namespace
from polywhiten.solvers.iteration import divisor, identity_like, symmetric_part, trace
from polywhiten.solvers.newton import ALL_STEPS, Newton
from polywhiten.solvers.solver import Solver


@dataclass(frozen=True)
class Eigh(Solver):
    """W = U diag(l)^(-1/2) U' from S = U diag(l) U', with a gradient that is right for equal eigenvalues too.

    References
    ----------
    Huang et al., Decorrelated Batch Normalization, CVPR 2018, arXiv:1804.08450.
    """

    def without_eigh(self) -> Newton:
        """Return Newton's iteration with enough steps to be exact."""
        return Newton(ALL_STEPS)

    def inverse_sqrt(self, xp: Namespace, cov: Array) -> Array:
        t, root, vectors, poison = _decompose(xp, cov)
        return _from_basis(xp, vectors, identity_like(xp, cov) / root[..., None]) / xp.sqrt(t) + poison

    def adjoint(self, xp: Namespace, cov: Array, grad: Array) -> Array:
        """Return the gradient with respect to `cov`, by divided differences of l^(-1/2) without 1 / (l_i - l_j)."""
        t, root, vectors, poison = _decompose(xp, cov)
        gradient = _divided_differences(root) * _to_basis(xp, vectors, symmetric_part(xp, grad))
        return _from_basis(xp, vectors, gradient) / t / xp.sqrt(t) + poison

    def adjoint_vjp(self, xp: Namespace, cov: Array, grad: Array, direction: Array) -> tuple[Array, Array]:
        """Return the gradients of <adjoint(cov, grad), direction> with respect to `cov` and `grad`.

        Let X and Y be the derivatives of W along the gradient G and the direction V, and P = W W. The second gradient
        is Y, and the first one the Z that solves Z W + W Z = P V P G P + P G P V P - X Y - Y X.
        """
        t, root, vectors, poison = _decompose(xp, cov)
        rows, columns = root[..., :, None], root[..., None, :]
        g, v = (_to_basis(xp, vectors, symmetric_part(xp, m)) for m in (grad, direction))
        x, y = (_divided_differences(root) * m for m in (g, v))
        half = v @ (g / rows**2) / (rows * columns) ** 2 - x @ y
        z = (half + xp.matrix_transpose(half)) / (1 / rows + 1 / columns)
        dcov, dgrad = (_from_basis(xp, vectors, m) / t / xp.sqrt(t) for m in (z, y))
        return dcov / t + poison, dgrad + poison


def eigenpairs(xp: Namespace, cov: Array) -> tuple[Array, Array, Array]:
    """Return ascending eigenvalues, eigenvectors, and NaN for every matrix that isn't finite, else 0."""
    # LAPACK fails on NaN, or may not return
    finite = xp.all(xp.isfinite(cov), axis=(-2, -1), keepdims=True)
    values, vectors = xp.linalg.eigh(xp.where(finite, cov, identity_like(xp, cov)))
    return values, vectors, xp.sum(0 * cov, axis=(-2, -1), keepdims=True)


def _decompose(xp: Namespace, cov: Array) -> tuple[Array, Array, Array, Array]:
    """Return the trace t, or infinity for 0, and for S / t the eigenvalues' square roots and the rest of `eigenpairs`.

    S is divided by t first, as the cubes of large variances overflow float32 and those of small ones underflow.
    """
    t = divisor(xp, trace(xp, cov), cov.dtype)
    values, vectors, poison = eigenpairs(xp, cov / t)
    # rounding can turn the smallest eigenvalues negative if the largest are much larger
    largest = xp.clip(xp.max(values, axis=-1, keepdims=True), min=1 / cov.shape[-1])  # smaller only if S is 0
    root = xp.sqrt(xp.maximum(values, largest * float(xp.finfo(cov.dtype).eps)))
    return t, root, vectors, poison


def _divided_differences(root: Array) -> Array:
    """Return (l_i^(-1/2) - l_j^(-1/2)) / (l_i - l_j) of eigenvalues with these square roots, as a quotient of sums."""
    rows, columns = root[..., :, None], root[..., None, :]
    return -1 / (rows * columns * (rows + columns))


def _from_basis(xp: Namespace, vectors: Array, matrix: Array) -> Array:
    return vectors @ matrix @ xp.matrix_transpose(vectors)


def _to_basis(xp: Namespace, vectors: Array, matrix: Array) -> Array:
    return xp.matrix_transpose(vectors) @ matrix @ vectors
