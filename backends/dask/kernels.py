"""The kernels on Dask's arrays: everything stays lazy, and the whole solver is one task."""

from __future__ import annotations

from itertools import accumulate, pairwise
from operator import mul
from types import ModuleType, SimpleNamespace

import array_api_compat.dask.array
import array_api_extra as xpx
from array_api_compat import array_namespace

from polywhiten._types import Array, Namespace
from polywhiten.kernels import Kernels
from polywhiten.solvers import Solver
from polywhiten.solvers.iteration import symmetric_part

compat: Namespace = array_api_compat.dask.array


class _Namespace(ModuleType):
    """Dask's namespace, with a `reshape` that may split one dimension and merge its parts with others, and `eigh`."""

    @property
    def linalg(self) -> SimpleNamespace:
        return SimpleNamespace(eigh=_eigh)

    def __getattr__(self, name: str) -> object:
        return getattr(compat, name)

    @staticmethod
    def reshape(x: Array, shape: tuple[int, ...]) -> Array:
        """Reshape in two steps, a split and a merge, each of which Dask can do."""
        if 0 in x.shape:
            return compat.zeros(shape, dtype=x.dtype)
        strides = {n for s in (x.shape, shape) for n in accumulate(reversed(s), mul)} | {1}
        split = tuple(outer // inner for inner, outer in pairwise(sorted(strides)))[::-1]
        return compat.reshape(compat.reshape(x, split or (1,)), shape)


def _eigh(cov: Array) -> tuple[Array, Array]:
    """Return eigenvalues and eigenvectors, computed in one task by the library of the chunks."""

    def solve(cov: Array) -> tuple[Array, Array]:
        values, vectors = array_namespace(cov).linalg.eigh(cov)
        return values, vectors

    shapes, dtypes = [cov.shape[:-1], cov.shape], [cov.dtype, cov.dtype]
    values, vectors = xpx.lazy_apply(solve, cov, shape=shapes, dtype=dtypes, xp=compat)
    return values, vectors


xp = _Namespace("polywhiten.dask")


class DaskKernels(Kernels):
    """Kernels that run solvers in the library of the chunks, which has an eigendecomposition.

    Covariances are made symmetric before. Where channels lie in several chunks, the two halves come from different
    products, which round differently, and Newton's gradient at a singular covariance would be off by percents.
    """

    def inverse_sqrt(self, solver: Solver, cov: Array, eps: float = 0.0) -> Array:
        """Return W = (cov + eps I)^(-1/2), computed in one task."""

        def solve(cov: Array) -> Array:
            xp = array_namespace(cov)
            return Kernels(xp).inverse_sqrt(solver, symmetric_part(xp, cov), eps)

        return xpx.lazy_apply(solve, cov, shape=cov.shape, dtype=cov.dtype, xp=compat)

    def inverse_sqrt_adjoint(self, solver: Solver, cov: Array, grad: Array, eps: float = 0.0) -> Array:
        """Return the gradient with respect to cov, computed in one task."""

        def solve(cov: Array, grad: Array) -> Array:
            xp = array_namespace(cov)
            return Kernels(xp).inverse_sqrt_adjoint(solver, symmetric_part(xp, cov), grad, eps)

        return xpx.lazy_apply(solve, cov, grad, shape=cov.shape, dtype=cov.dtype, xp=compat)
