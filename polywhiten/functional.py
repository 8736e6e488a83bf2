"""The functions that users call, for arrays of every library.

Each finds the backend of the array, checks the arguments and hands the work to the backend.
"""

from __future__ import annotations

from polywhiten import checks
from polywhiten._types import AllReduce, Array
from polywhiten.backend import Pullback
from polywhiten.blocks import ChannelGroups, SampleGroups
from polywhiten.dispatch import backend_of, checked_input
from polywhiten.solvers import regularized_solver, solver_for
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import WhiteningStats


def iter_norm(
    x: Array,
    *,
    weight: Array | None = None,
    bias: Array | None = None,
    group_size: int = 64,
    axis: int = 1,
    method: str = "newton",
    iterations: int | None = None,
    eps: float = 1e-5,
    relative_eps: bool = False,
    all_reduce: AllReduce | None = None,
) -> Array:
    r"""Whiten groups of channels over the batch: iterative normalization.

    For each group of d channels, as a matrix X (d, M) over all M samples and positions:

    .. math:: Y = \Sigma^{-1/2} (X - \mu), \quad \Sigma = \tfrac{1}{M} (X - \mu)(X - \mu)^T + \epsilon I

    Parameters
    ----------
    x : array, shape (N, C, ...) or with the channels at `axis`
        Real floating point, 2 dimensions or more.
    weight, bias : array, shape (C,), optional
        Scale and shift of every channel after whitening. They, and all other arrays that come beside x, are of its
        library, or what the library's own functions convert: NumPy's arrays beside those of TensorFlow, JAX and Dask.
    group_size : int
        Channels whitened together; the last group is smaller where this doesn't divide C. 1 is batch normalization.
    axis : int
        The channel axis.
    method : {"newton", "eigh", "minimax"}
        "newton": the papers' iteration, partial where an eigenvalue is small beside the trace. "eigh": exact (ZCA).
        "minimax": exact up to 1e-4 for condition numbers that `iterations` sets, in a third of Newton's steps.
    iterations : int, optional
        Steps of "newton" and "minimax", 5 by default; "eigh" has none.
    eps : float
        Added to the diagonal of the covariance, so in units of the squared data.
    relative_eps : bool
        Whether eps is a fraction of each group's mean variance instead, trace(covariance) / d. Take this for data that
        are far from variance 1, such as embeddings of length 1, whose variances are about 1 / C: there eps=1e-5 is not
        small.
    all_reduce : callable, optional
        Of an array, returns its sum over the workers that share a batch, as a new array: the statistics are then those
        of the joined batch, and how many samples that has is not checked.

    Returns
    -------
    array
        Shape and dtype of x. Differentiable where the library of x differentiates.

    Raises
    ------
    TypeError
        x is no array, another array is of a library that doesn't go with x, or one has no real floating-point dtype.
    ValueError
        An argument doesn't fit, or there are fewer than two samples a channel.

    Notes
    -----
    A batch of no samples is an error, as it has no statistics and so most likely is a mistake. A worker's share of one
    may be empty, with `all_reduce`; and layers, which have to go on, return such a batch as it is.

    Statistics are computed in float32 for half precision, else in the dtype of x. NaN or infinity anywhere in a group
    makes all of that group's output NaN.

    References
    ----------
    Huang et al., Iterative Normalization, CVPR 2019, arXiv:1904.03441.

    Examples
    --------
    >>> import numpy as np
    >>> import polywhiten as pw
    >>> x = np.random.default_rng(0).normal(size=(256, 8)) @ np.triu(np.ones((8, 8)))
    >>> y = pw.iter_norm(x, method="eigh")
    >>> bool(np.allclose(y.T @ y / 256, np.eye(8), atol=1e-3))
    True
    """
    backend, x, axis = checked_input(x, axis)
    weight, bias = backend.checked_affine(x, axis, weight, bias)
    spec = _batch_spec(x, axis, group_size, method, iterations, eps, relative_eps, all_reduce)
    return backend.whiten(spec, x, weight, bias)


def group_whiten(
    x: Array,
    *,
    weight: Array | None = None,
    bias: Array | None = None,
    num_groups: int = 32,
    axis: int = 1,
    method: str = "newton",
    iterations: int | None = None,
    eps: float = 1e-5,
    relative_eps: bool = False,
) -> Array:
    r"""Whiten groups of channels against each other, within every sample: group whitening.

    A sample's C channels are cut into g groups; as a matrix X (g, M), with M = C / g times the positions,

    .. math:: Y = \Sigma^{-1/2} (X - \mu), \quad \Sigma = \tfrac{1}{M} (X - \mu)(X - \mu)^T + \epsilon I

    Parameters
    ----------
    x : array, shape (N, C, ...) or with the channels at `axis`
        Real floating point, 2 dimensions or more; axis 0 counts the samples.
    weight, bias : array, shape (C,), optional
        Scale and shift of every channel after whitening.
    num_groups : int
        g, the size of the covariance matrix; divides C.
    axis : int
        The channel axis, not 0.
    method, iterations, eps, relative_eps
        As for `iter_norm`.

    Returns
    -------
    array
        Shape and dtype of x. Differentiable where the library of x differentiates.

    Raises
    ------
    TypeError
        x is no array, another array is of a library that doesn't go with x, or one has no real floating-point dtype.
    ValueError
        An argument doesn't fit, or a group has fewer than two values a sample.

    References
    ----------
    Huang et al., Group Whitening, CVPR 2021, arXiv:2009.13333.

    Examples
    --------
    >>> import numpy as np
    >>> import polywhiten as pw
    >>> x = np.random.default_rng(0).normal(size=(2, 8, 5, 5))
    >>> y = pw.group_whiten(x, num_groups=4, method="eigh")
    >>> rows = y[0].reshape(4, 50)
    >>> bool(np.allclose(rows @ rows.T / 50, np.eye(4), atol=1e-3))
    True
    """
    backend, x, axis = checked_input(x, axis, first_axis=1)
    weight, bias = backend.checked_affine(x, axis, weight, bias)
    spec = _sample_spec(x, axis, num_groups, method, iterations, eps, relative_eps)
    return backend.whiten(spec, x, weight, bias)


def iter_norm_vjp(
    x: Array,
    *,
    weight: Array | None = None,
    bias: Array | None = None,
    group_size: int = 64,
    axis: int = 1,
    method: str = "newton",
    iterations: int | None = None,
    eps: float = 1e-5,
    relative_eps: bool = False,
    all_reduce: AllReduce | None = None,
) -> tuple[Array, Pullback]:
    """`iter_norm` and its gradient, for libraries that don't differentiate; named as `jax.vjp`.

    Parameters
    ----------
    x, weight, bias, group_size, axis, method, iterations, eps, relative_eps, all_reduce
        As for `iter_norm`.

    Returns
    -------
    y : array
        As of `iter_norm`.
    pullback : callable
        Of dy, the gradient of a loss with respect to y: the gradients (dx, dweight, dbias), None where there is no
        weight or bias. It keeps x and the statistics alive, no iterate and no copy of x. With several workers, dx is
        that of the loss summed over them; dweight and dbias are the worker's own share.

    Raises
    ------
    TypeError, ValueError
        As by `iter_norm`; by pullback where dy doesn't go with x, or hasn't the shape of y.

    Examples
    --------
    >>> import numpy as np
    >>> import polywhiten as pw
    >>> x = np.random.default_rng(0).normal(size=(32, 8))
    >>> y, pullback = pw.iter_norm_vjp(x, weight=np.ones(8))
    >>> dx, dweight, dbias = pullback(np.ones_like(y))
    >>> dx.shape, dweight.shape, dbias is None
    ((32, 8), (8,), True)
    """
    backend, x, axis = checked_input(x, axis)
    weight, bias = backend.checked_affine(x, axis, weight, bias)
    spec = _batch_spec(x, axis, group_size, method, iterations, eps, relative_eps, all_reduce)
    return backend.vjp(spec, x, weight, bias)


def group_whiten_vjp(
    x: Array,
    *,
    weight: Array | None = None,
    bias: Array | None = None,
    num_groups: int = 32,
    axis: int = 1,
    method: str = "newton",
    iterations: int | None = None,
    eps: float = 1e-5,
    relative_eps: bool = False,
) -> tuple[Array, Pullback]:
    """`group_whiten` and its gradient, for libraries that don't differentiate; named as `jax.vjp`.

    Parameters
    ----------
    x, weight, bias, num_groups, axis, method, iterations, eps, relative_eps
        As for `group_whiten`.

    Returns
    -------
    y : array
        As of `group_whiten`.
    pullback : callable
        Of dy, the gradient of a loss with respect to y: the gradients (dx, dweight, dbias), None where there is no
        weight or bias.

    Raises
    ------
    TypeError, ValueError
        As by `group_whiten`; by pullback where dy doesn't go with x, or hasn't the shape of y.

    Examples
    --------
    >>> import numpy as np
    >>> import polywhiten as pw
    >>> x = np.random.default_rng(0).normal(size=(2, 8, 5, 5))
    >>> y, pullback = pw.group_whiten_vjp(x, num_groups=4)
    >>> dx, _, _ = pullback(y)
    >>> dx.shape
    (2, 8, 5, 5)
    """
    backend, x, axis = checked_input(x, axis, first_axis=1)
    weight, bias = backend.checked_affine(x, axis, weight, bias)
    spec = _sample_spec(x, axis, num_groups, method, iterations, eps, relative_eps)
    return backend.vjp(spec, x, weight, bias)


def whitening_stats(
    x: Array,
    *,
    group_size: int = 64,
    axis: int = 1,
    method: str = "newton",
    iterations: int | None = None,
    eps: float = 1e-5,
    relative_eps: bool = False,
    all_reduce: AllReduce | None = None,
) -> WhiteningStats:
    """Mean, covariance and whitener of groups of channels, for `apply_whitening`.

    Parameters
    ----------
    x, group_size, axis, method, iterations, eps, relative_eps, all_reduce
        As for `iter_norm`.

    Returns
    -------
    WhiteningStats
        mean (C,), covariance and whitener (groups, d, d); float32 for half precision, else in the dtype of x.

    Raises
    ------
    TypeError, ValueError
        As by `iter_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import polywhiten as pw
    >>> train, new = np.random.default_rng(0).normal(size=(2, 100, 80))
    >>> stats = pw.whitening_stats(train, group_size=64)
    >>> stats.mean.shape, stats.whitener.shape
    ((80,), (2, 64, 64))
    >>> pw.apply_whitening(new, stats).shape
    (100, 80)
    """
    backend, x, axis = checked_input(x, axis)
    return backend.statistics(_batch_spec(x, axis, group_size, method, iterations, eps, relative_eps, all_reduce), x)


def apply_whitening(
    x: Array,
    stats: WhiteningStats,
    *,
    weight: Array | None = None,
    bias: Array | None = None,
    axis: int = 1,
) -> Array:
    """Whiten with given statistics: the affine map diag(weight) whitener (x - mean) + bias.

    Parameters
    ----------
    x : array, shape (N, C, ...) or with the channels at `axis`
        Real floating point, 2 dimensions or more; may be empty.
    stats : WhiteningStats
        Of `whitening_stats`, for as many channels; of another library as far as `weight` of `iter_norm` may be.
    weight, bias : array, shape (C,), optional
        Scale and shift of every channel after whitening.
    axis : int
        The channel axis.

    Returns
    -------
    array
        Shape and dtype of x.

    Raises
    ------
    TypeError
        x is no array, another array is of a library that doesn't go with x, or one has no real floating-point dtype.
    ValueError
        The statistics are of another number of channels, or another argument doesn't fit.

    Examples
    --------
    >>> import numpy as np
    >>> import polywhiten as pw
    >>> x = np.random.default_rng(0).normal(size=(100, 8))
    >>> y = pw.apply_whitening(x, pw.whitening_stats(x))
    >>> bool(np.allclose(y, pw.iter_norm(x)))
    True
    """
    backend, x, axis = checked_input(x, axis)
    weight, bias = backend.checked_affine(x, axis, weight, bias)
    if not (hasattr(stats, "mean") and hasattr(stats, "whitener")):
        raise checks.wrong_type(stats, "stats", "the WhiteningStats that whitening_stats returns")
    mean, whitener = (backend.converted(getattr(stats, name), f"stats.{name}", x) for name in ("mean", "whitener"))
    checks.check_statistics(backend.kernels.xp, x.shape[axis], mean, whitener)
    return backend.apply_frozen(axis, x, mean, whitener, weight, bias)


def inverse_sqrt(cov: Array, *, method: str = "newton", iterations: int | None = None) -> Array:
    """Inverse square root of symmetric positive definite matrices.

    Parameters
    ----------
    cov : array, shape (..., d, d)
        Symmetric positive definite, real floating point.
    method : {"newton", "eigh", "minimax"}
        As for `iter_norm`.
    iterations : int, optional
        Steps of "newton" and "minimax", 5 by default; "eigh" has none.

    Returns
    -------
    array, shape (..., d, d)
        W with W cov W = I as far as the method converges; float32 for half precision, else in the dtype of cov.
        Not finite where a matrix isn't. Differentiable where the library differentiates.

    Raises
    ------
    TypeError
        cov is no array, or has no real floating-point dtype.
    ValueError
        cov isn't square, or `method` or `iterations` doesn't fit.

    Examples
    --------
    >>> import numpy as np
    >>> import polywhiten as pw
    >>> cov = np.array([[2.0, 1.0], [1.0, 2.0]])
    >>> w = pw.inverse_sqrt(cov, method="eigh")
    >>> bool(np.allclose(w @ cov @ w, np.eye(2)))
    True
    """
    backend = backend_of(cov, "cov")
    kernels, cov = backend.kernels, backend.tensor(cov, "cov")
    checks.check_array(kernels.xp, cov, "cov")
    checks.check_square(cov)
    return backend.inverse_sqrt(solver_for(method, iterations), kernels.to_accumulation_dtype(cov))


def _batch_spec(
    x: Array,
    axis: int,
    group_size: int,
    method: str,
    iterations: int | None,
    eps: float,
    relative_eps: bool,
    all_reduce: AllReduce | None,
) -> WhiteningSpec:
    """Return what IterNorm computes of x, from arguments that are checked here."""
    solver, eps = regularized_solver(method, iterations, eps, relative_eps)
    blocks = ChannelGroups(axis, checks.check_positive("group_size", group_size))
    if all_reduce is None:  # otherwise the samples of all workers together count
        checks.check_batch(x, axis)
    elif not callable(all_reduce):
        raise TypeError(f"all_reduce={all_reduce!r} must be a function of an array that returns its sum over workers")
    return WhiteningSpec(blocks, solver, eps, all_reduce)


def _sample_spec(
    x: Array, axis: int, num_groups: int, method: str, iterations: int | None, eps: float, relative_eps: bool
) -> WhiteningSpec:
    """Return what group whitening computes of x, from arguments that are checked here."""
    solver, eps = regularized_solver(method, iterations, eps, relative_eps)
    return WhiteningSpec(SampleGroups(axis, checks.check_sample_groups(x, num_groups, axis)), solver, eps)
