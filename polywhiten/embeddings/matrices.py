"""The matrices that whiten data of a given covariance, one function a method, and regularized covariances.

Every matrix W here satisfies W S W' = I for a positive definite S, except that of Newton's method, which approaches it.
They differ by a rotation. Kessy, Lewin and Strimmer compare them in Optimal Whitening and Decorrelation, The American
Statistician 2018, arXiv:1512.00809.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from polywhiten.functional import inverse_sqrt
from polywhiten.moments import Float64, Moments

METHODS = ("zca", "pca", "cholesky", "zca_cor", "newton")


def ledoit_wolf_shrinkage(moments: Moments) -> float:
    """Return the shrinkage that Ledoit and Wolf estimate, from moments that include the fourth.

    This is the coefficient of `sklearn.covariance.ledoit_wolf`. Its sums over all samples are written as moments here,
    so that they can be taken batch by batch.

    References
    ----------
    Ledoit and Wolf, A Well-Conditioned Estimator for Large-Dimensional Covariance Matrices, J. Multivariate Anal. 2004.
    """
    if moments.fourth is None:
        raise ValueError("moments have no fourth moment, which the estimate of Ledoit and Wolf needs")
    cov, n, d = moments.covariance, moments.weight, len(moments.mean)
    squares = np.sum(cov * cov)
    distance = squares - np.trace(cov) ** 2 / d
    error = min(max((moments.fourth / n - squares) / n, 0.0), distance)
    return float(error / distance) if distance > 0 else 0.0


def shrunk(cov: Float64, shrinkage: float, method: str) -> Float64:
    """Return (1 - shrinkage) cov + shrinkage T, where T is the mean variance times I, or for "zca_cor" diag(cov)."""
    variances = np.diag(cov) if method == "zca_cor" else np.full(len(cov), np.trace(cov) / len(cov))
    result: Float64 = (1 - shrinkage) * cov + shrinkage * np.diag(variances)
    return result


def whitening_matrix(
    cov: Float64, method: str, *, eps: float, relative_eps: bool, iterations: int | None, n_components: int
) -> Float64:
    """Return the matrix (d, d), or (n_components, d) for "pca", that whitens data of covariance cov (d, d).

    Parameters
    ----------
    cov : array, shape (d, d)
    method : str
        One of `METHODS`.
    eps : float
        Is added to the diagonal of cov. Directions that have no variance even then become 0.
    relative_eps : bool
        Whether eps is a fraction of the mean variance, or for "zca_cor" of each dimension's own variance, because
        dimensions may have different units.
    iterations : int or None
        Steps of "newton".
    n_components : int
        The data are projected onto so many of their principal components, from 1 to d.

    Raises
    ------
    ValueError
        The regularized covariance isn't positive definite, and the method is "cholesky".
    """
    mean_variance = np.trace(cov) / len(cov)
    if not mean_variance > 0:
        return np.zeros((n_components if method == "pca" else len(cov), len(cov)))
    added = eps * (mean_variance if relative_eps else 1.0)
    regularized = cov + added * np.eye(len(cov))
    of_method: dict[str, Callable[[], Float64]] = {
        "zca": partial(_zca, cov, added),
        "pca": partial(_pca, cov, added, n_components),
        "cholesky": partial(_cholesky, regularized),
        "zca_cor": partial(_zca_cor, cov, eps) if relative_eps else partial(_zca_cor, regularized, 0.0),
        "newton": partial(inverse_sqrt, regularized, iterations=iterations),
    }
    matrix = of_method[method]()
    if method != "pca" and n_components < len(cov):
        matrix = matrix @ _projection(cov, n_components)
    return matrix


def components_for(eigenvalues: Float64, share: float) -> int:
    """Return how many principal components have a share of the variance; eigenvalues are sorted, the largest first."""
    sums = np.cumsum(np.maximum(eigenvalues, 0.0))
    return min(int(np.searchsorted(sums, share * sums[-1])) + 1, len(eigenvalues))


def _projection(cov: Float64, n_components: int) -> Float64:
    """Return the projection (d, d) onto the principal components of the largest variances."""
    vectors: Float64 = np.linalg.eigh(cov)[1][:, -n_components:]
    return vectors @ vectors.T


def _zca(cov: Float64, added: float) -> Float64:
    values, vectors = np.linalg.eigh(cov)
    matrix: Float64 = (vectors * _inverse_sqrt_or_zero(values, added)) @ vectors.T
    return matrix


def _pca(cov: Float64, added: float, n_components: int) -> Float64:
    values, vectors = np.linalg.eigh(cov)
    rows = (vectors * _inverse_sqrt_or_zero(values, added)).T[::-1][:n_components]
    largest = np.argmax(np.abs(vectors.T[::-1][:n_components]), axis=1)  # is made positive, as scikit-learn's PCA does
    signs = np.sign(vectors.T[::-1][np.arange(n_components), largest])
    return np.ascontiguousarray(rows * signs[:, None])


def _cholesky(cov: Float64) -> Float64:
    """Return L' of the inverse covariance L L', which is upper triangular."""
    try:
        lower = np.linalg.cholesky(cov[::-1, ::-1])
    except np.linalg.LinAlgError:
        raise ValueError(
            'method="cholesky" needs a positive definite covariance: raise eps or shrinkage, or use method="zca"'
        ) from None
    return np.triu(np.linalg.inv(lower)[::-1, ::-1])


def _zca_cor(cov: Float64, added: float) -> Float64:
    """Return the matrix that divides by deviations and then whitens; `added` goes to the diagonal of correlations."""
    deviation = np.sqrt(np.diag(cov))
    inverse = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    return _zca(cov * inverse[:, None] * inverse, added) * inverse


def _inverse_sqrt_or_zero(values: Float64, added: float) -> Float64:
    """Return (values + added)^(-1/2), and 0 where this is 0 up to the rounding of an eigendecomposition.

    Values that are 0 up to rounding are taken as 0: relative to a small number that is added, their digits are noise.
    """
    smallest = len(values) * np.finfo(float).eps * values[-1]
    sums = np.where(np.abs(values) > smallest, values, 0.0) + added
    return np.where(sums > smallest, sums, np.inf) ** -0.5
