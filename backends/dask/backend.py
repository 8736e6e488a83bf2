"""Dask's backend: which arrays it takes and converts, and what it does with them on Dask's scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import dask.array
import numpy.typing as npt

from polywhiten import checks
from polywhiten._types import Array
from polywhiten.backend import Backend
from polywhiten.dask.kernels import DaskKernels, xp
from polywhiten.dask.reduction import total
from polywhiten.dask.rows import map_chunks, moment_tasks
from polywhiten.dispatch import backend_of
from polywhiten.moments import Float64, Moments
from polywhiten.rows import RowInput, RowMap

_asarray: Callable[..., Array] = dask.array.asarray  # which Dask has left without types


class DaskBackend(Backend):
    """Dask's kernels; other arrays that come beside a Dask array are converted to Dask arrays."""

    def tensor(self, x: Array, name: str = "x") -> Array:
        """Return x if all of its sizes are known."""
        if any(math.isnan(size) for size in x.shape):
            raise ValueError(
                f"{name} has shape {x.shape}, of unknown chunk sizes: call {name}.compute_chunk_sizes() first"
            )
        return x

    def converted(self, values: Any, name: str, x: Array) -> Array:
        """Return what Dask's functions convert as a Dask array, without computing anything."""
        try:
            values = _asarray(values)
        except (TypeError, ValueError) as error:
            raise checks.wrong_type(values, name, "a Dask array, or what dask.array.asarray takes") from error
        # chunks of two libraries, of JAX and NumPy say, don't go together
        return values if type(values._meta) is type(x._meta) else _asarray(values, like=x)

    def rows(self, x: Array, name: str = "X") -> Array:
        """Return x if the number of its columns is known; that of its rows need not be."""
        if x.ndim == 2 and math.isnan(x.shape[1]):
            raise ValueError(
                f"{name} has shape {x.shape}, an unknown number of columns: call {name}.compute_chunk_sizes() first"
            )
        return x

    def moments(self, x: Array, weights: Float64 | None, read: RowInput, *, fourth: bool = False) -> Moments:
        """Compute the moments of rows in one pass over the chunks; see `polywhiten.dask.reduction.total`."""
        moments: Moments = total(moment_tasks(x, weights, read, fourth))
        return moments

    def map_rows(self, x: Array, row_map: RowMap, read: RowInput) -> Array:
        """Return the outputs of a map for rows as a lazy array in chunks of the same rows."""
        return map_chunks(x, row_map, read)

    def to_numpy(self, x: Array) -> npt.NDArray[Any]:
        """Compute x."""
        values = x.compute()
        return backend_of(values).to_numpy(values)


BACKEND = DaskBackend(DaskKernels(xp))
