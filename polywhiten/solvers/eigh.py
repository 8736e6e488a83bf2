"""Eigendecomposition: exact ZCA whitening, as in decorrelated batch normalization."""

from dataclasses import dataclass

from polywhiten._types import Array, Namespace
from polywhiten.solvers.iteration import identity_like, symmetric_part


@dataclass(frozen=True)
class Eigh:
    """W = U diag(l)^(-1/2) U' from S = U diag(l) U', with a gradient that equal eigenvalues don't disturb.

    References
    ----------
    Huang et al., Decorrelated Batch Normalization, CVPR 2018, arXiv:1804.08450.
    """

    def inverse_sqrt(self, xp: Namespace, cov: Array) -> Array:
        root, vectors, poison = _decompose(xp, cov)
        return _in_basis(xp, vectors, identity_like(xp, cov) / root[..., None]) + poison

    def adjoint(self, xp: Namespace, cov: Array, grad: Array) -> Array:
        """Gradient with respect to `cov`: divided differences of l^(-1/2), which have no 1 / (l_i - l_j)."""
        root, vectors, poison = _decompose(xp, cov)
        rows, columns = root[..., :, None], root[..., None, :]
        differences = -1 / (rows * columns * (rows + columns))
        return _in_basis(xp, vectors, differences * _to_basis(xp, vectors, symmetric_part(xp, grad))) + poison

    def second(self, xp: Namespace, cov: Array, grad: Array, direction: Array) -> Array:
        """Gradient of <adjoint(cov, grad), direction> with respect to `cov`.

        With X and Y the derivatives of W along both, W X + X W = -P G P where P = W W; a derivative of that gives
        Z W + W Z = P V P G P + P G P V P - X Y - Y X for the second.
        """
        root, vectors, poison = _decompose(xp, cov)
        rows, columns = root[..., :, None], root[..., None, :]
        g, v = (_to_basis(xp, vectors, symmetric_part(xp, m)) for m in (grad, direction))
        differences = -1 / (rows * columns * (rows + columns))
        x, y = differences * g, differences * v
        products = v @ (g / rows**2) / (rows * columns) ** 2 - x @ y
        products = products + xp.matrix_transpose(products)
        return _in_basis(xp, vectors, products / (1 / rows + 1 / columns)) + poison


def eigenpairs(xp: Namespace, cov: Array) -> tuple[Array, Array, Array]:
    """Eigenvalues, ascending, eigenvectors, and NaN for the matrices that aren't finite, else 0."""
    # LAPACK fails on NaN, or may not return
    finite = xp.all(xp.isfinite(cov), axis=(-2, -1), keepdims=True)
    values, vectors = xp.linalg.eigh(xp.where(finite, cov, identity_like(xp, cov)))
    return values, vectors, xp.sum(0 * cov, axis=(-2, -1), keepdims=True)


def _decompose(xp: Namespace, cov: Array) -> tuple[Array, Array, Array]:
    """`eigenpairs` with the square roots of the eigenvalues."""
    values, vectors, poison = eigenpairs(xp, cov)
    # rounding can turn the smallest eigenvalues negative where the largest are much larger
    info = xp.finfo(cov.dtype)
    floor = xp.clip(xp.max(values, axis=-1, keepdims=True) * float(info.eps), min=float(info.smallest_normal))
    root = xp.sqrt(xp.maximum(values, floor))
    return root, vectors, poison


def _in_basis(xp: Namespace, vectors: Array, matrix: Array) -> Array:
    return vectors @ matrix @ xp.matrix_transpose(vectors)


def _to_basis(xp: Namespace, vectors: Array, matrix: Array) -> Array:
    return xp.matrix_transpose(vectors) @ matrix @ vectors
