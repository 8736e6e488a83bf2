"""Whitening as one differentiable operation that keeps the input and O(d^2) for its backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from polywhiten import checks
from polywhiten.backend import Backend
from polywhiten.jax.kernels import KERNELS, varying_alike
from polywhiten.reference import Reference
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import Statistics

_REFERENCE = Reference(KERNELS)
Residuals = tuple[Array, Array | None, Array | None, Statistics]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _whiten(spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None) -> tuple[Array, Statistics]:
    """The core's forward and backward.

    The statistics are outputs too, so that what backward computes from them has a derivative of its own: a second
    derivative comes back here as gradients of the statistics.
    """
    y, stats = _REFERENCE.forward(spec, x, weight, bias)
    return y, _mapped_as(y, stats)


def _mapped_as(y: Array, stats: Statistics) -> Statistics:
    """The statistics, mapped over all axes of `vmap` or `shard_map` that y is mapped over.

    Else their gradient would come as the sum over an axis where that of y comes one by one, and what backward adds up
    over the axis would count it once for every index: JAX does so in silence.
    """
    mapped = jax.numpy.any(y[(slice(1),) * y.ndim])
    # XLA drops the choice between a thing and itself
    result: Statistics = jax.tree.map(lambda values: jax.numpy.where(mapped, values, values), stats)
    return result


def _forward(
    spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None
) -> tuple[tuple[Array, Statistics], Residuals]:
    y, stats = _whiten(spec, x, weight, bias)  # not the core's: a second derivative differentiates this function
    return (y, stats), (x, weight, bias, stats)


def _backward(
    spec: WhiteningSpec, residuals: Residuals, gradients: tuple[Array, Statistics]
) -> tuple[Array, Array | None, Array | None]:
    dy, dstats = jax.tree.map(jax.numpy.asarray, gradients)  # they can be NumPy's
    return _REFERENCE.backward(spec, *residuals, dy, dstats)


_whiten.defvjp(_forward, _backward)


class JaxBackend(Backend):
    """JAX's kernels, with whitening as an operation of its own."""

    def tensor(self, x: Array, name: str = "x") -> Array:
        """Arrays and tracers as they are; no sparse arrays, nor what stands for an array's shape alone."""
        if not isinstance(x, Array):
            raise checks.wrong_type(x, name, "a JAX array")
        return x

    def converted(self, values: Any, name: str, x: Array) -> Array:
        """As JAX's functions convert it: NumPy's arrays, and what says itself how."""
        if isinstance(values, Array):
            return values
        if isinstance(values, np.ndarray) or hasattr(values, "__jax_array__"):
            return jax.numpy.asarray(values)
        raise checks.wrong_type(values, name, "a JAX or NumPy array")

    def whiten_blocks(
        self, spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None
    ) -> tuple[Array, Statistics]:
        """Y and the statistics, all differentiable."""
        return _whiten(spec, *varying_alike((x, weight, bias)))


BACKEND = JaxBackend(KERNELS)
