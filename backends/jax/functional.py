"""The functions of `polywhiten` that share statistics, with the name of a mapped axis to share them over."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import jax
from jax import Array

import polywhiten
from polywhiten import WhiteningStats
from polywhiten._types import AllReduce
from polywhiten.backend import Pullback

AxisName = Hashable | tuple[Hashable, ...]
_psum: Callable[..., Array] = jax.lax.psum  # which JAX has left without types


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
    axis_name: AxisName | None = None,
) -> Array:
    """`polywhiten.iter_norm`, with the statistics of the batch that devices or a mapped axis share.

    Parameters
    ----------
    x, weight, bias, group_size, axis, method, iterations, eps, relative_eps, all_reduce
        As for `polywhiten.iter_norm`.
    axis_name : hashable or tuple of hashables, optional
        Mapped axes of `jax.shard_map`, `jax.pmap` or `jax.vmap`: statistics and gradients are those of their joined
        batch, and how many samples that has is not checked. In place of `all_reduce`.

    Returns
    -------
    Array
        Shape and dtype of x. Differentiable twice, in reverse mode alone: `jax.jacrev(jax.jacrev(f))` in place of
        `jax.hessian(f)`.

    Raises
    ------
    TypeError, ValueError
        As by `polywhiten.iter_norm`; ValueError for both `all_reduce` and `axis_name`.
    NameError
        No mapped axis has the name.

    Examples
    --------
    >>> import functools
    >>> import jax
    >>> import polywhiten.jax
    >>> shares = jax.random.normal(jax.random.key(0), (4, 32, 8))  # a batch in four shares
    >>> whiten = functools.partial(polywhiten.jax.iter_norm, axis_name="shares")
    >>> y = jax.vmap(whiten, axis_name="shares")(shares)
    >>> joined = polywhiten.jax.iter_norm(shares.reshape(128, 8))
    >>> bool(jax.numpy.allclose(y.reshape(128, 8), joined, atol=1e-4))
    True
    """
    y: Array = polywhiten.iter_norm(
        x,
        weight=weight,
        bias=bias,
        group_size=group_size,
        axis=axis,
        method=method,
        iterations=iterations,
        eps=eps,
        relative_eps=relative_eps,
        all_reduce=_all_reduce(all_reduce, axis_name),
    )
    return y


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
    axis_name: AxisName | None = None,
) -> tuple[Array, Pullback]:
    """`polywhiten.iter_norm_vjp`, with the statistics of the batch that devices or a mapped axis share.

    Parameters
    ----------
    x, weight, bias, group_size, axis, method, iterations, eps, relative_eps, all_reduce
        As for `polywhiten.iter_norm`.
    axis_name : hashable or tuple of hashables, optional
        As for `iter_norm`.

    Returns
    -------
    y : Array
        As of `iter_norm`.
    pullback : callable
        Of dy: the gradients (dx, dweight, dbias), as of `polywhiten.iter_norm_vjp`. dx is that of the loss summed over
        the mapped axes; dweight and dbias are the own share, whose `jax.lax.psum` is the whole.

    Raises
    ------
    TypeError, ValueError, NameError
        As by `iter_norm`; by pullback where dy doesn't go with x, or hasn't the shape of y.

    Examples
    --------
    >>> import jax
    >>> import polywhiten.jax
    >>> def squares(x):
    ...     y, pullback = polywhiten.jax.iter_norm_vjp(x, axis_name="shares")
    ...     return pullback(2 * y)[0]
    >>> shares = jax.random.normal(jax.random.key(0), (4, 32, 8))
    >>> jax.vmap(squares, axis_name="shares")(shares).shape
    (4, 32, 8)
    """
    return polywhiten.iter_norm_vjp(
        x,
        weight=weight,
        bias=bias,
        group_size=group_size,
        axis=axis,
        method=method,
        iterations=iterations,
        eps=eps,
        relative_eps=relative_eps,
        all_reduce=_all_reduce(all_reduce, axis_name),
    )


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
    axis_name: AxisName | None = None,
) -> WhiteningStats:
    """`polywhiten.whitening_stats`, of the batch that devices or a mapped axis share.

    Parameters
    ----------
    x, group_size, axis, method, iterations, eps, relative_eps, all_reduce
        As for `polywhiten.iter_norm`.
    axis_name : hashable or tuple of hashables, optional
        As for `iter_norm`.

    Returns
    -------
    WhiteningStats
        As of `polywhiten.whitening_stats`; in `jax.shard_map` replicated over the named axes.

    Raises
    ------
    TypeError, ValueError, NameError
        As by `iter_norm`.

    Examples
    --------
    >>> import jax
    >>> import polywhiten.jax
    >>> shares = jax.random.normal(jax.random.key(0), (4, 32, 8))
    >>> def shared(x):
    ...     return polywhiten.jax.whitening_stats(x, axis_name="shares")
    >>> stats = jax.vmap(shared, axis_name="shares", out_axes=None)(shares)
    >>> stats.mean.shape, stats.whitener.shape
    ((8,), (1, 8, 8))
    """
    return polywhiten.whitening_stats(
        x,
        group_size=group_size,
        axis=axis,
        method=method,
        iterations=iterations,
        eps=eps,
        relative_eps=relative_eps,
        all_reduce=_all_reduce(all_reduce, axis_name),
    )


@dataclass(frozen=True)
class _SumOver:
    """Sum over mapped axes; equal for equal names, so that JAX finds what it has traced before."""

    axis_name: AxisName

    def __call__(self, x: Array) -> Array:
        return _psum(x, self.axis_name)


def _all_reduce(all_reduce: AllReduce | None, axis_name: AxisName | None) -> AllReduce | None:
    if axis_name is None:
        return all_reduce
    if all_reduce is not None:
        raise ValueError(f"all_reduce={all_reduce!r} and axis_name={axis_name!r} both sum over workers: pass one")
    return _SumOver(axis_name)
