"""Eigendecomposition: exact ZCA whitening, as in decorrelated batch normalization."""

from dataclasses import dataclass
from typing import ClassVar

from polywhiten._types import Array, Namespace
from polywhiten.solvers.iteration import identity_like, positive, symmetric_part, trace
from polywhiten.solvers.newton import ALL_STEPS, Newton


@dataclass(frozen=True)
class Eigh:
    """W = U diag(l)^(-1/2) U' from S = U diag(l) U', with a gradient that equal eigenvalues don't disturb.

    References
    ----------
    Huang et al., Decorrelated Batch Normalization, CVPR 2018, arXiv:1804.08450.
    """

    has_second: ClassVar[bool] = True

    def needs_float64(self, epsilon: float) -> bool:
        return False

    def newton_steps(self, itemsize: int) -> int | None:
        return None

    def by_products(self) -> Newton:
        """Newton's iteration with all steps that the digits allow, which make it exact."""
        return Newton(ALL_STEPS)

    def inverse_sqrt(self, xp: Namespace, cov: Array) -> Array:
        t, root, vectors, poison = _decompose(xp, cov)
        return _in_basis(xp, vectors, identity_like(xp, cov) / root[..., None]) / xp.sqrt(t) + poison

    def adjoint(self, xp: Namespace, cov: Array, grad: Array) -> Array:
        """Gradient with respect to `cov`: divided differences of l^(-1/2), which have no 1 / (l_i - l_j)."""
        t, root, vectors, poison = _decompose(xp, cov)
        rows, columns = root[..., :, None], root[..., None, :]
        differences = -1 / (rows * columns * (rows + columns))
        gradient = _in_basis(xp, vectors, differences * _to_basis(xp, vectors, symmetric_part(xp, grad)))
        return gradient / t / xp.sqrt(t) + poison

    def second(self, xp: Namespace, cov: Array, grad: Array, direction: Array) -> Array:
        """Gradient of <adjoint(cov, grad), direction> with respect to `cov`.

        With X and Y the derivatives of W along both, W X + X W = -P G P where P = W W; a derivative of that gives
        Z W + W Z = P V P G P + P G P V P - X Y - Y X for the second.
        """
        t, root, vectors, poison = _decompose(xp, cov)
        rows, columns = root[..., :, None], root[..., None, :]
        g, v = (_to_basis(xp, vectors, symmetric_part(xp, m)) for m in (grad, direction))
        differences = -1 / (rows * columns * (rows + columns))
        x, y = differences * g, differences * v
        products = v @ (g / rows**2) / (rows * columns) ** 2 - x @ y
        products = products + xp.matrix_transpose(products)
        return _in_basis(xp, vectors, products / (1 / rows + 1 / columns)) / t / t / xp.sqrt(t) + poison


def eigenpairs(xp: Namespace, cov: Array) -> tuple[Array, Array, Array]:
    """Eigenvalues, ascending, eigenvectors, and NaN for the matrices that aren't finite, else 0."""
    # LAPACK fails on NaN, or may not return
    finite = xp.all(xp.isfinite(cov), axis=(-2, -1), keepdims=True)
    values, vectors = xp.linalg.eigh(xp.where(finite, cov, identity_like(xp, cov)))
    return values, vectors, xp.sum(0 * cov, axis=(-2, -1), keepdims=True)


def _decompose(xp: Namespace, cov: Array) -> tuple[Array, Array, Array, Array]:
    """The trace t, and of S / t the square roots of the eigenvalues and the rest of `eigenpairs`.

    Divided first, as the cubes of large deviations overflow float32, and those of small ones vanish.
    """
    t = positive(xp, trace(xp, cov), cov.dtype)
    values, vectors, poison = eigenpairs(xp, cov / t)
    # rounding can turn the smallest eigenvalues negative where the largest are much larger
    largest = xp.clip(xp.max(values, axis=-1, keepdims=True), min=1 / cov.shape[-1])  # less where S is 0
    root = xp.sqrt(xp.maximum(values, largest * float(xp.finfo(cov.dtype).eps)))
    return t, root, vectors, poison


def _in_basis(xp: Namespace, vectors: Array, matrix: Array) -> Array:
    return vectors @ matrix @ xp.matrix_transpose(vectors)


def _to_basis(xp: Namespace, vectors: Array, matrix: Array) -> Array:
    return xp.matrix_transpose(vectors) @ matrix @ vectors
