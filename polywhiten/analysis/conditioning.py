"""Covariances of activations, and what they say of them: how far from white, from well-conditioned, uncorrelated."""

from __future__ import annotations

import math

from polywhiten._types import Array
from polywhiten.backend import Backend
from polywhiten.blocks import Blocks, ChannelGroups, SampleGroups
from polywhiten.checks import check_array, check_batch, check_num_groups, check_square
from polywhiten.dispatch import backend_of, checked_input
from polywhiten.solvers.eigh import eigenpairs
from polywhiten.solvers.iteration import identity_like


def covariance(x: Array, *, axis: int = 1, num_groups: int | None = None) -> Array:
    """Covariance of a layer's activations: of its channels, or of groups of channels within every sample.

    Parameters
    ----------
    x : array, shape (N, C, ...) or with the channels at `axis`
        Real floating point, 2 dimensions or more.
    axis : int
        The channel axis.
    num_groups : int, optional
        Groups as those of `polywhiten.group_whiten`; divides C. By default, channels over all samples and positions.

    Returns
    -------
    array, shape (C, C), or (N, num_groups, num_groups)
        Divided by the number of samples; float32 for half precision, else in the dtype of x.

    Raises
    ------
    TypeError, ValueError
        As by `polywhiten.iter_norm` and `polywhiten.group_whiten`.

    See Also
    --------
    polywhiten.whitening_stats : Covariances of groups of channels.

    Examples
    --------
    >>> import numpy as np
    >>> import polywhiten as pw
    >>> from polywhiten.analysis import condition_number, covariance
    >>> x = np.random.default_rng(0).normal(size=(32, 8, 5, 5)) * np.linspace(1, 10, 8)[:, None, None]
    >>> y = pw.iter_norm(x, method="eigh")
    >>> float(condition_number(covariance(x)).round()), float(condition_number(covariance(y)).round())
    (98.0, 1.0)
    """
    backend, x, axis = checked_input(x, axis, first_axis=0 if num_groups is None else 1)
    if num_groups is None:
        check_batch(x, axis)
    else:
        check_num_groups(num_groups, x.shape[axis])
    x, axis, _ = backend.in_memory_order(x, axis)
    channels, kernels = x.shape[axis], backend.kernels_for(x)
    blocks: Blocks = ChannelGroups(axis, channels) if num_groups is None else SampleGroups(axis, num_groups)
    cov = kernels.moments(kernels.split(blocks, x), blocks.block_axis)[1]
    return cov[0, ...] if num_groups is None else cov


def spectrum(cov: Array) -> Array:
    """Eigenvalues of covariances, the largest first.

    Parameters
    ----------
    cov : array, shape (..., d, d)
        Symmetric, real floating point.

    Returns
    -------
    array, shape (..., d)
        In the dtype of cov, but float32 for half precision. NaN where a matrix isn't finite.

    Raises
    ------
    TypeError
        cov is no array, or has no real floating-point dtype.
    ValueError
        cov isn't square.

    Examples
    --------
    >>> import numpy as np
    >>> from polywhiten.analysis import spectrum
    >>> spectrum(np.array([[2.0, 1.0], [1.0, 2.0]])).round(6)
    array([3., 1.])
    """
    backend, cov = checked_covariance(cov)
    xp = backend.kernels.xp
    values, _, poison = eigenpairs(xp, cov)
    return xp.flip(values + poison[..., 0], axis=-1)


def condition_number(cov: Array, *, fraction: float = 1.0) -> Array:
    """Largest eigenvalue of covariances over their smallest.

    Parameters
    ----------
    cov : array, shape (..., d, d)
        Symmetric, positive semidefinite, real floating point.
    fraction : float
        Above 0, to 1. Over the eigenvalue that this part of all are no smaller than, in place of the smallest: a
        single dead channel makes the condition number infinite, and not that of `fraction=0.9`.

    Returns
    -------
    array, shape (...)
        Infinite where the eigenvalue is 0 up to rounding, NaN where a matrix isn't finite or is 0.

    Raises
    ------
    TypeError, ValueError
        As by `spectrum`, or fraction doesn't fit.

    Examples
    --------
    >>> import numpy as np
    >>> from polywhiten.analysis import condition_number
    >>> cov = np.diag([8.0, 4.0, 2.0, 0.0])
    >>> float(condition_number(cov)), float(condition_number(cov, fraction=0.75))
    (inf, 4.0)
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must be above 0, and 1 at most")
    values = spectrum(cov)
    xp, d = backend_of(values).kernels.xp, values.shape[-1]
    largest, smallest = values[..., 0], values[..., math.ceil(fraction * d) - 1]
    # what LAPACK's backward error makes of an eigenvalue of 0
    zero = smallest <= d * float(xp.finfo(values.dtype).eps) * largest
    ratio = largest / xp.where(zero, xp.ones_like(smallest), smallest)
    return xp.where(zero, xp.where(largest > 0, math.inf * xp.ones_like(ratio), math.nan * ratio), ratio)


def whitening_error(cov: Array) -> Array:
    """Distance of covariances from the identity, relative to it: 0 for white outputs.

    Parameters
    ----------
    cov : array, shape (..., d, d)
        Symmetric, real floating point; of an output, `covariance` gives it.

    Returns
    -------
    array, shape (...)
        Frobenius norm of cov - I, divided by that of I, sqrt(d).

    Raises
    ------
    TypeError, ValueError
        As by `spectrum`.

    Examples
    --------
    >>> import numpy as np
    >>> import polywhiten as pw
    >>> from polywhiten.analysis import covariance, whitening_error
    >>> x = np.random.default_rng(0).normal(size=(100, 8))
    >>> for iterations in (1, 3, 5):
    ...     print(round(float(whitening_error(covariance(pw.iter_norm(x, iterations=iterations)))), 3))
    0.748
    0.281
    0.01
    """
    backend, cov = checked_covariance(cov)
    xp = backend.kernels.xp
    off = cov - identity_like(xp, cov)
    return xp.sqrt(xp.sum(off * off, axis=(-2, -1)) / cov.shape[-1])


def correlation(cov: Array) -> Array:
    """Correlation matrices of covariances.

    Parameters
    ----------
    cov : array, shape (..., d, d)
        Symmetric, positive semidefinite, real floating point.

    Returns
    -------
    array, shape (..., d, d)
        1 on the diagonal; a constant variable has correlation 0 with all others.

    Raises
    ------
    TypeError, ValueError
        As by `spectrum`.

    Examples
    --------
    >>> import numpy as np
    >>> from polywhiten.analysis import correlation
    >>> correlation(np.array([[4.0, 1.0], [1.0, 1.0]]))
    array([[1. , 0.5],
           [0.5, 1. ]])
    """
    backend, cov = checked_covariance(cov)
    xp = backend.kernels.xp
    eye = identity_like(xp, cov)
    deviation = xp.sqrt(xp.sum(cov * eye, axis=-1))
    deviation = xp.where(deviation > 0, deviation, xp.ones_like(deviation))
    return eye + (1 - eye) * (cov / deviation[..., :, None] / deviation[..., None, :])


def mean_correlation(cov: Array) -> Array:
    """How correlated variables are: the mean over all pairs of the correlation's absolute value.

    Parameters
    ----------
    cov : array, shape (..., d, d)
        Symmetric, positive semidefinite, real floating point.

    Returns
    -------
    array, shape (...)
        From 0 to 1; 0 for a single variable.

    Raises
    ------
    TypeError, ValueError
        As by `spectrum`.

    Examples
    --------
    >>> import numpy as np
    >>> from polywhiten.analysis import mean_correlation
    >>> float(mean_correlation(np.array([[4.0, -1.0], [-1.0, 1.0]])))
    0.5
    """
    matrix = correlation(cov)
    xp, d = backend_of(matrix).kernels.xp, matrix.shape[-1]
    off = (1 - identity_like(xp, matrix)) * matrix
    return xp.sum(xp.abs(off), axis=(-2, -1)) / max(d * (d - 1), 1)


def checked_covariance(cov: Array) -> tuple[Backend, Array]:
    """The backend of cov, and cov as a tensor in the dtype of statistics."""
    backend = backend_of(cov, "cov")
    cov = backend.tensor(cov, "cov")
    check_array(backend.kernels.xp, cov, "cov")
    check_square(cov)
    return backend, backend.kernels.to_accumulation_dtype(cov)
