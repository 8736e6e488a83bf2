"""Dask arrays: everything stays lazy, and a matrix's whole solver is one task.

The functions are those of `polywhiten`; this module only says how Dask runs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate, pairwise
from operator import mul
from types import ModuleType, SimpleNamespace
from typing import Any

import array_api_compat.dask.array
import array_api_extra as xpx
import dask.array
from array_api_compat import array_namespace

from polywhiten import (
    WhiteningStats,
    apply_whitening,
    checks,
    group_whiten,
    group_whiten_vjp,
    inverse_sqrt,
    iter_norm,
    iter_norm_vjp,
    whitening_stats,
)
from polywhiten._types import Array, Namespace
from polywhiten.backend import Backend
from polywhiten.kernels import Kernels
from polywhiten.solvers import Solver

compat: Namespace = array_api_compat.dask.array
_asarray: Callable[..., Array] = dask.array.asarray  # which Dask has left without types


class _Namespace(ModuleType):
    """Dask's namespace, with a `reshape` that may split one dimension and merge its parts with others, and `eigh`."""

    @property
    def linalg(self) -> SimpleNamespace:
        return SimpleNamespace(eigh=_eigh)

    def __getattr__(self, name: str) -> object:
        return getattr(compat, name)

    @staticmethod
    def reshape(x: Array, shape: tuple[int, ...]) -> Array:
        """Reshape in two steps, a split and a merge, as Dask does each alone."""
        if 0 in x.shape:
            return compat.zeros(shape, dtype=x.dtype)
        strides = {n for s in (x.shape, shape) for n in accumulate(reversed(s), mul)} | {1}
        split = tuple(outer // inner for inner, outer in pairwise(sorted(strides)))[::-1]
        return compat.reshape(compat.reshape(x, split or (1,)), shape)


def _eigh(cov: Array) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors, in one task on the chunks' own library."""

    def solve(cov: Array) -> tuple[Array, Array]:
        values, vectors = array_namespace(cov).linalg.eigh(cov)
        return values, vectors

    shapes, dtypes = [cov.shape[:-1], cov.shape], [cov.dtype, cov.dtype]
    values, vectors = xpx.lazy_apply(solve, cov, shape=shapes, dtype=dtypes, xp=compat)
    return values, vectors


xp = _Namespace("polywhiten.dask")


class DaskKernels(Kernels):
    """Kernels that run the solvers on the chunks' own library, where there is an eigendecomposition."""

    def inverse_sqrt(self, solver: Solver, cov: Array, eps: float = 0.0) -> Array:
        """W = (cov + eps I)^(-1/2), in one task."""

        def solve(cov: Array) -> Array:
            return Kernels(array_namespace(cov)).inverse_sqrt(solver, cov, eps)

        return xpx.lazy_apply(solve, cov, shape=cov.shape, dtype=cov.dtype, xp=compat)

    def inverse_sqrt_adjoint(self, solver: Solver, cov: Array, grad: Array, eps: float = 0.0) -> Array:
        """Gradient with respect to cov, in one task."""

        def solve(cov: Array, grad: Array) -> Array:
            return Kernels(array_namespace(cov)).inverse_sqrt_adjoint(solver, cov, grad, eps)

        return xpx.lazy_apply(solve, cov, grad, shape=cov.shape, dtype=cov.dtype, xp=compat)


class DaskBackend(Backend):
    """Dask's kernels, with what comes beside a Dask array as one."""

    def tensor(self, x: Array, name: str = "x") -> Array:
        """X itself, if all of its sizes are known."""
        if any(math.isnan(size) for size in x.shape):
            raise ValueError(
                f"{name} has shape {x.shape}, of unknown chunk sizes: call {name}.compute_chunk_sizes() first"
            )
        return x

    def converted(self, values: Any, name: str, x: Array) -> Array:
        """As Dask's functions convert it; nothing is computed."""
        try:
            values = _asarray(values)
        except (TypeError, ValueError) as error:
            raise checks.wrong_type(values, name, "a Dask array, or what dask.array.asarray takes") from error
        # chunks of two libraries, of JAX and NumPy say, don't go together
        return values if type(values._meta) is type(x._meta) else _asarray(values, like=x)


BACKEND = DaskBackend(DaskKernels(xp))

__all__ = [
    "BACKEND",
    "WhiteningStats",
    "apply_whitening",
    "group_whiten",
    "group_whiten_vjp",
    "inverse_sqrt",
    "iter_norm",
    "iter_norm_vjp",
    "whitening_stats",
]
