"""Covariances of activations, and how far they are from white, well-conditioned and uncorrelated."""

from __future__ import annotations

import math
from dataclasses import replace

from polywhiten._types import Array, Namespace
from polywhiten.blocks import Blocks, ChannelGroups, SampleGroups, take_channels
from polywhiten.checks import check_array, check_batch, check_num_groups, check_square
from polywhiten.dispatch import backend_of, checked_input
from polywhiten.solvers.eigh import Eigh, eigenpairs
from polywhiten.solvers.iteration import identity_like
from polywhiten.spec import WhiteningSpec


def covariance(x: Array, *, axis: int = 1, num_groups: int | None = None) -> Array:
    """Compute the covariance of a layer's channels, or of groups of channels within every sample.

    Parameters
    ----------
    x : array, shape (N, C, ...) or with the channels at `axis`
        Activations: real floating point, 2 dimensions or more.
    axis : int
        The channel axis.
    num_groups : int, optional
        Number of groups as in `polywhiten.group_whiten`; divides C. By default the covariance is that of single
        channels over all samples and positions.

    Returns
    -------
    array, shape (C, C), or (N, num_groups, num_groups)
        Divided by the number of samples; float32 for half precision, else in the dtype of x.

    See Also
    --------
    polywhiten.whitening_stats : Covariances of groups of channels over the batch.

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
    _, x, axis = checked_input(x, axis, first_axis=0 if num_groups is None else 1)
    if num_groups is not None:
        return block_covariances(x, SampleGroups(axis, check_num_groups(num_groups, x.shape[axis])))[0]
    check_batch(x, axis)
    return block_covariances(x, ChannelGroups(axis, x.shape[axis]))[0][0, ...]


def block_covariances(x: Array, blocks: Blocks) -> list[Array]:
    """Return the covariances (blocks, d, d) of all blocks of x, in two arrays if the last group of channels is smaller.

    The group size of `ChannelGroups` need not divide the number of channels.
    """
    backend = backend_of(x)
    x, axis, _ = backend.in_memory_order(x, blocks.axis)
    covariances = []
    for part, spec in WhiteningSpec(replace(blocks, axis=axis), Eigh(), eps=0.0).equal_parts(x):  # nothing is solved
        channels = take_channels(x, part, axis)
        kernels = backend.implementation(spec, channels).kernels
        covariances.append(kernels.moments(kernels.split(spec.blocks, channels), blocks.block_axis)[1])
    return covariances


def spectrum(cov: Array) -> Array:
    """Compute the eigenvalues of covariances, the largest first.

    Parameters
    ----------
    cov : array, shape (..., d, d)
        Symmetric, real floating point.

    Returns
    -------
    array, shape (..., d)
        In the dtype of cov, but float32 for half precision. NaN for a matrix that isn't finite.

    Examples
    --------
    >>> import numpy as np
    >>> from polywhiten.analysis import spectrum
    >>> spectrum(np.array([[2.0, 1.0], [1.0, 2.0]])).round(6)
    array([3., 1.])
    """
    xp, cov = checked_covariance(cov)
    values, _, poison = eigenpairs(xp, cov)
    return xp.flip(values + poison[..., 0], axis=-1)


def condition_number(cov: Array, *, fraction: float = 1.0) -> Array:
    """Divide the largest eigenvalue of covariances by their smallest.

    Parameters
    ----------
    cov : array, shape (..., d, d)
        Symmetric, positive semidefinite, real floating point.
    fraction : float
        Above 0, and 1 at most. In place of the smallest eigenvalue, take the one that this fraction of all eigenvalues
        reach or exceed. A single dead channel makes the condition number infinite, but not that of `fraction=0.9`.

    Returns
    -------
    array, shape (...)
        Infinite if the eigenvalue is 0 up to rounding, NaN for a matrix that isn't finite or is 0.

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
    # LAPACK's backward error can turn an eigenvalue of 0 into as much as this
    zero = smallest <= d * float(xp.finfo(values.dtype).eps) * largest
    ratio = largest / xp.where(zero, xp.ones_like(smallest), smallest)
    return xp.where(zero, xp.where(largest > 0, math.inf * xp.ones_like(ratio), math.nan * ratio), ratio)


def whitening_error(cov: Array) -> Array:
    r"""Compute the relative distance of covariances from the identity, 0 for white outputs.

    .. math:: \lVert cov - I \rVert_F / \sqrt d

    Parameters
    ----------
    cov : array, shape (..., d, d)
        Symmetric, real floating point: a normalized output's `covariance`.

    Returns
    -------
    array, shape (...)

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
    xp, cov = checked_covariance(cov)
    off = cov - identity_like(xp, cov)
    return xp.sqrt(xp.sum(off * off, axis=(-2, -1)) / cov.shape[-1])


def correlation(cov: Array) -> Array:
    """Turn covariances into correlation matrices.

    Parameters
    ----------
    cov : array, shape (..., d, d)
        Symmetric, positive semidefinite, real floating point.

    Returns
    -------
    array, shape (..., d, d)
        1 on the diagonal; a constant variable has correlation 0 with all others.

    Examples
    --------
    >>> import numpy as np
    >>> from polywhiten.analysis import correlation
    >>> correlation(np.array([[4.0, 1.0], [1.0, 1.0]]))
    array([[1. , 0.5],
           [0.5, 1. ]])
    """
    xp, cov = checked_covariance(cov)
    eye = identity_like(xp, cov)
    deviation = xp.sqrt(xp.sum(cov * eye, axis=-1))
    deviation = xp.where(deviation > 0, deviation, xp.ones_like(deviation))
    return eye + (1 - eye) * (cov / deviation[..., :, None] / deviation[..., None, :])


def mean_correlation(cov: Array) -> Array:
    """Average the absolute values of the correlations over all pairs of variables.

    Parameters
    ----------
    cov : array, shape (..., d, d)
        Symmetric, positive semidefinite, real floating point.

    Returns
    -------
    array, shape (...)
        From 0 to 1; 0 for a single variable.

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


def checked_covariance(cov: Array) -> tuple[Namespace, Array]:
    """Return the array namespace of cov, and cov as a tensor in the dtype in which statistics are computed."""
    backend = backend_of(cov, "cov")
    cov = backend.tensor(cov, "cov")
    check_array(backend.kernels.xp, cov, "cov")
    check_square(cov)
    return backend.kernels.xp, backend.kernels.to_accumulation_dtype(cov)
