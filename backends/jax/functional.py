"""The functions of `polywhiten` as JAX's users call them: with NumPy's arrays, too, and names of mapped axes; `psum`.

A batch in four parts, each of which is whitened by the statistics of all of it:

>>> import functools
>>> import jax
>>> import polywhiten.jax
>>> parts = jax.random.normal(jax.random.key(0), (4, 32, 8))
>>> whiten = functools.partial(polywhiten.jax.iter_norm, axis_name="parts")
>>> y = jax.vmap(whiten, axis_name="parts")(parts)
>>> joined = polywhiten.jax.iter_norm(parts.reshape(128, 8))
>>> bool(jax.numpy.allclose(y.reshape(128, 8), joined, atol=1e-4))
True
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import jax
from jax import Array

import polywhiten
from polywhiten._types import AllReduce
from polywhiten.numpy_inputs import taking_numpy

AxisName = Hashable | tuple[Hashable, ...]
R = TypeVar("R")

_psum: Callable[..., Array] = jax.lax.psum  # which JAX has left without types
_AXIS_NAME = """
axis_name : hashable or tuple of hashables, optional
    Names of mapped axes of `jax.shard_map`, `jax.pmap` or `jax.vmap`. Statistics and gradients are then those of the
    joined batch. This is short for `all_reduce=polywhiten.jax.psum(axis_name)`; a NameError says that no mapped axis
    has the name."""


def psum(axis_name: AxisName, axis_index_groups: Sequence[Sequence[int]] | None = None) -> AllReduce:
    """Return a function that sums an array over mapped axes.

    It is meant for `all_reduce=` of `polywhiten.iter_norm` and the other functions that share statistics. Functions of
    equal names are equal, so JAX recognizes what it has traced before.

    Parameters
    ----------
    axis_name : hashable or tuple of hashables
        Names of mapped axes of `jax.shard_map`, `jax.pmap` or `jax.vmap`.
    axis_index_groups : sequence of sequences of int, optional
        Indices along the axis, in groups of equal size that are summed separately, where `jax.lax.psum` supports it.
        None sums over all of them.

    Returns
    -------
    callable
        Maps an array to its sum over these axes, of the same shape and dtype. It raises NameError where no mapped axis
        has the name.

    Examples
    --------
    >>> import jax
    >>> import polywhiten as pw
    >>> from polywhiten.jax import psum
    >>> def statistics(part):
    ...     return pw.whitening_stats(part, all_reduce=psum("parts"))
    >>> parts = jax.random.normal(jax.random.key(0), (4, 32, 8))
    >>> stats = jax.vmap(statistics, axis_name="parts", out_axes=None)(parts)
    >>> stats.mean.shape, stats.whitener.shape
    ((8,), (1, 8, 8))
    """
    groups = None if axis_index_groups is None else tuple(map(tuple, axis_index_groups))
    return _SumOverAxes(axis_name, groups)


@dataclass(frozen=True)
class _SumOverAxes:
    axis_name: AxisName
    axis_index_groups: tuple[tuple[int, ...], ...] | None

    def __call__(self, x: Array) -> Array:
        return _psum(x, self.axis_name, axis_index_groups=self.axis_index_groups)


def _with_axis_name(function: Callable[..., R]) -> Callable[..., R]:
    """Return a function of `polywhiten` that takes `axis_name` too, in its signature and its documentation."""

    @wraps(function)
    def shared(*args: Any, axis_name: AxisName | None = None, **kwargs: Any) -> R:
        if axis_name is not None:
            all_reduce = kwargs.get("all_reduce")
            if all_reduce is not None:
                raise ValueError(
                    f"all_reduce={all_reduce!r} and axis_name={axis_name!r} both sum over workers: pass one"
                )
            kwargs["all_reduce"] = psum(axis_name)
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    extra = inspect.Parameter("axis_name", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="AxisName | None")
    documented: Any = shared
    documented.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])
    returns = "\n\nReturns\n"
    documented.__doc__ = inspect.cleandoc(function.__doc__ or "").replace(returns, _AXIS_NAME + returns, 1)
    return shared


def _of_jax(function: Callable[..., R]) -> Callable[..., R]:
    return taking_numpy(function, jax.numpy.asarray)


iter_norm = _with_axis_name(_of_jax(polywhiten.iter_norm))
iter_norm_vjp = _with_axis_name(_of_jax(polywhiten.iter_norm_vjp))
whitening_stats = _with_axis_name(_of_jax(polywhiten.whitening_stats))
apply_whitening = _of_jax(polywhiten.apply_whitening)
group_whiten = _of_jax(polywhiten.group_whiten)
group_whiten_vjp = _of_jax(polywhiten.group_whiten_vjp)
inverse_sqrt = _of_jax(polywhiten.inverse_sqrt)
