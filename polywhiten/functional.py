"""The functions that users call, for arrays of every library.

Each finds the array's backend, checks the arguments, and hands the work to `polywhiten.whitening`.
"""

from __future__ import annotations

from collections.abc import Callable

from polywhiten import checks
from polywhiten._types import AllReduce, Array
from polywhiten.blocks import ChannelGroups, SampleGroups, channel_shape
from polywhiten.dispatch import Backend, backend_of
from polywhiten.groups import (
    WhiteningStats,
    channel_parts,
    join_channels,
    join_statistics,
    take_channels,
    take_groups,
)
from polywhiten.solvers import Solver, regularized_solver, solver_for
from polywhiten.whitening import Plan, affine, backward, forward, statistics

Pullback = Callable[[Array], tuple[Array, Array | None, Array | None]]


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
    weight, bias = _affine(backend, x, axis, weight, bias)
    solver, eps = regularized_solver(method, iterations, eps, relative_eps)
    group_size = checks.check_positive("group_size", group_size)
    if all_reduce is None:  # else the workers' samples together count
        checks.check_batch(x, axis)
        y = backend.whiten_groups(False, x, weight, bias, group_size, axis, solver, eps)
        if y is not None:
            return y
    return whiten_channels(backend, x, weight, bias, group_size, axis, solver, eps, all_reduce)[0]


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
    weight, bias = _affine(backend, x, axis, weight, bias)
    solver, eps = regularized_solver(method, iterations, eps, relative_eps)
    return whiten_samples(backend, x, weight, bias, num_groups, axis, solver, eps)


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
    weight, bias = _affine(backend, x, axis, weight, bias)
    solver, eps = regularized_solver(method, iterations, eps, relative_eps)
    if all_reduce is None:
        checks.check_batch(x, axis)
    plans = _channel_plans(x, group_size, axis, solver, eps, all_reduce)
    return _vjp(backend, plans, axis, x, weight, bias)


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
    weight, bias = _affine(backend, x, axis, weight, bias)
    solver, eps = regularized_solver(method, iterations, eps, relative_eps)
    plan = Plan(SampleGroups(axis, _check_sample_groups(x, num_groups, axis)), solver, eps)
    return _vjp(backend, [(slice(0, x.shape[axis]), plan)], axis, x, weight, bias)


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
    solver, eps = regularized_solver(method, iterations, eps, relative_eps)
    if all_reduce is None:
        checks.check_batch(x, axis)
    plans = _channel_plans(x, group_size, axis, solver, eps, all_reduce)
    kernels = backend.kernels
    return join_statistics(
        kernels.xp, [statistics(kernels, plan, take_channels(x, part, axis)) for part, plan in plans]
    )


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
    weight, bias = _affine(backend, x, axis, weight, bias)
    mean, whitener = (backend.converted(getattr(stats, name), f"stats.{name}", x) for name in ("mean", "whitener"))
    checks.check_statistics(backend.kernels.xp, x.shape[axis], mean, whitener)
    return apply_frozen(backend, x, mean, whitener, weight, bias, axis)


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
    return kernels.inverse_sqrt(solver_for(method, iterations), kernels.for_statistics(cov))


def whiten_channels(
    backend: Backend,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    group_size: int,
    axis: int,
    solver: Solver,
    eps: float,
    all_reduce: AllReduce | None = None,
) -> tuple[Array, WhiteningStats]:
    """`iter_norm` of checked arguments, with the batch's statistics; for layers."""
    x, axis, restore = backend.in_memory_order(x, axis)
    xp = backend.kernels.xp
    outputs, stats = [], []
    for part, plan in _channel_plans(x, group_size, axis, solver, eps, all_reduce):
        given = take_channels(x, part, axis), take_channels(weight, part), take_channels(bias, part)
        y, part_stats = backend.whiten(plan, *given)
        outputs.append(y)
        stats.append(part_stats)
    return restore(join_channels(xp, outputs, axis)), join_statistics(xp, stats)


def whiten_samples(
    backend: Backend,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    num_groups: int,
    axis: int,
    solver: Solver,
    eps: float,
) -> Array:
    """`group_whiten` of checked arguments; for layers."""
    num_groups = _check_sample_groups(x, num_groups, axis)
    y = backend.whiten_groups(True, x, weight, bias, num_groups, axis, solver, eps)
    if y is not None:
        return y
    x, axis, restore = backend.in_memory_order(x, axis)
    plan = Plan(SampleGroups(axis, num_groups), solver, eps)
    return restore(backend.whiten(plan, x, weight, bias)[0])


def whiten_nothing(backend: Backend, x: Array, weight: Array | None, bias: Array | None, axis: int) -> Array:
    """An array without elements, whitened; with gradients of 0 for weight and bias; for layers."""

    def along_channels(values: Array) -> Array:
        return xp.reshape(xp.astype(values, x.dtype, copy=False), channel_shape(x.ndim, axis))

    xp, y = backend.kernels.xp, x + 0  # a new array, which may be changed in place
    if weight is not None:
        y = y * along_channels(weight)
    if bias is not None:
        y = y + along_channels(bias)
    return y


def apply_frozen(
    backend: Backend, x: Array, mean: Array, whitener: Array, weight: Array | None, bias: Array | None, axis: int
) -> Array:
    """`apply_whitening` of checked arguments; for layers."""
    y = backend.apply_frozen(x, mean, whitener, weight, bias, axis)
    if y is not None:
        return y
    x, axis, restore = backend.in_memory_order(x, axis)
    kernels, outputs = backend.kernels, []
    dtype = kernels.statistics_dtype(x.dtype)
    for part, size in channel_parts(x.shape[axis], whitener.shape[-1]):
        part_mean = kernels.xp.reshape(take_channels(kernels.xp.astype(mean, dtype, copy=False), part), (-1, size))
        part_whitener = take_groups(kernels.xp.astype(whitener, dtype, copy=False), part, size)
        given = take_channels(x, part, axis), part_mean, part_whitener
        outputs.append(
            affine(kernels, ChannelGroups(axis, size), *given, take_channels(weight, part), take_channels(bias, part))
        )
    return restore(join_channels(kernels.xp, outputs, axis))


def checked_input(x: Array, axis: int, first_axis: int = 0) -> tuple[Backend, Array, int]:
    """The backend of x, x as a tensor, and its channel axis counted from the front."""
    backend = backend_of(x)
    x = backend.tensor(x)
    checks.check_array(backend.kernels.xp, x)
    return backend, x, checks.check_channel_axis(x, axis, first_axis)


def _affine(
    backend: Backend, x: Array, axis: int, weight: Array | None, bias: Array | None
) -> tuple[Array | None, Array | None]:
    """Weight and bias as arrays of x's library, with a value for each of its channels."""

    def checked(values: Array | None, name: str) -> Array | None:
        if values is not None:
            values = backend.converted(values, name, x)
            checks.check_per_channel(backend.kernels.xp, values, name, x.shape[axis])
        return values

    return checked(weight, "weight"), checked(bias, "bias")


def _channel_plans(
    x: Array, group_size: int, axis: int, solver: Solver, eps: float, all_reduce: AllReduce | None
) -> list[tuple[slice, Plan]]:
    group_size = checks.check_positive("group_size", group_size)
    channels = x.shape[axis]
    return [
        (part, Plan(ChannelGroups(axis, size), solver, eps, all_reduce))
        for part, size in channel_parts(channels, group_size)
    ]


def _check_sample_groups(x: Array, num_groups: int, axis: int) -> int:
    """As a number that divides the channels, with enough values in every group for a covariance."""
    channels = x.shape[axis]
    num_groups = checks.check_num_groups(num_groups, channels)
    sizes = [channels // num_groups, *x.shape[1:axis], *x.shape[axis + 1 :]]
    checks.check_sample_count(sizes, x.shape, "values a group", f"use fewer than {num_groups} groups")
    return num_groups


def _vjp(
    backend: Backend,
    plans: list[tuple[slice, Plan]],
    axis: int,
    x: Array,
    weight: Array | None,
    bias: Array | None,
) -> tuple[Array, Pullback]:
    kernels = backend.kernels
    parts, outputs = [], []
    for part, plan in plans:
        given = take_channels(x, part, axis), take_channels(weight, part), take_channels(bias, part)
        y, stats = forward(kernels, plan, *given)
        parts.append((part, plan, given, stats))
        outputs.append(y)

    def pullback(dy: Array) -> tuple[Array, Array | None, Array | None]:
        dy = backend.converted(dy, "dy", x)
        checks.check_gradient(kernels.xp, dy, x.shape)
        dy = kernels.xp.astype(dy, x.dtype, copy=False)
        dxs, dweights, dbiases = zip(
            *(
                backward(kernels, plan, *given, stats, take_channels(dy, part, axis))
                for part, plan, given, stats in parts
            ),
            strict=True,
        )
        return (
            join_channels(kernels.xp, dxs, axis),
            None if weight is None else join_channels(kernels.xp, dweights),
            None if bias is None else join_channels(kernels.xp, dbiases),
        )

    return join_channels(kernels.xp, outputs, axis), pullback
