"""JAX's backend: whitening as a differentiable operation that saves the input and O(d^2) more for backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from polywhiten import checks
from polywhiten.backend import Backend
from polywhiten.jax.kernels import KERNELS, varying_alike
from polywhiten.reference import Gradients
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import Statistics

Residuals = tuple[Array, Array | None, Array | None, Statistics]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _whiten(spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None) -> tuple[Array, Statistics]:
    """Whiten, with the backend's own backward as gradient.

    The statistics are outputs too, so that what backward computes from them has a derivative: a second derivative
    comes back here as gradients of the statistics.
    """
    y, stats = BACKEND.forward(spec, x, weight, bias)
    return y, _mapped_as(y, stats)


def _mapped_as(y: Array, stats: Statistics) -> Statistics:
    """Return the statistics, mapped over all axes of `vmap` or `shard_map` that y is mapped over.

    Otherwise JAX sums the statistics' gradients over the mapped axis but not those of `y`, and backward counts them
    once per index, without an error.
    """
    mapped = jax.numpy.any(y[(slice(1),) * y.ndim])
    # XLA removes the choice between two equal arrays
    result: Statistics = jax.tree.map(lambda values: jax.numpy.where(mapped, values, values), stats)
    return result


def _forward(
    spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None
) -> tuple[tuple[Array, Statistics], Residuals]:
    y, stats = _whiten(spec, x, weight, bias)  # not the backend's: a second derivative differentiates this function
    return (y, stats), (x, weight, bias, stats)


def _backward(spec: WhiteningSpec, residuals: Residuals, gradients: tuple[Array, Statistics]) -> Gradients:
    dy, dstats = jax.tree.map(jax.numpy.asarray, gradients)  # these can be NumPy's
    return BACKEND.backward(spec, *residuals, dy, dstats)


_whiten.defvjp(_forward, _backward)


class JaxBackend(Backend):
    """JAX's kernels, with whitening as a differentiable operation."""

    has_mutable_arrays = False

    def tensor(self, x: Array, name: str = "x") -> Array:
        """Return arrays and tracers as they are; refuse sparse arrays, and what only stands for an array's shape."""
        if not isinstance(x, Array):
            raise checks.wrong_type(x, name, "a JAX array")
        return x

    def rows(self, x: Array, name: str = "X") -> Array:
        """Return an array of rows; refuse tracers, because moments are kept in NumPy's arrays."""
        if isinstance(x, jax.core.Tracer):
            raise TypeError(
                f"{name} is traced by jax.jit, jax.vmap or jax.grad, which the estimator does not support: call it "
                "outside of them, or compute x @ weight.T + bias inside, with the two arrays of affine_map()"
            )
        return self.tensor(x, name)

    def converted(self, values: Any, name: str, x: Array) -> Array:
        """Return what JAX's functions convert as an array: NumPy's arrays, and objects that define `__jax_array__`."""
        if isinstance(values, Array):
            return values
        if isinstance(values, np.ndarray) or hasattr(values, "__jax_array__"):
            return jax.numpy.asarray(values)
        raise checks.wrong_type(values, name, "a JAX or NumPy array")

    def whiten_blocks(
        self, spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None
    ) -> tuple[Array, Statistics]:
        """Whiten an array of equal blocks; the result and the statistics are differentiable."""
        return _whiten(spec, *varying_alike((x, weight, bias)))


BACKEND = JaxBackend(KERNELS)
