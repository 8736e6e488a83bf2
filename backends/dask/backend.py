"""Dask's backend: it takes arrays of known sizes, and converts arrays beside them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import dask.array

from polywhiten import checks
from polywhiten._types import Array
from polywhiten.backend import Backend
from polywhiten.dask.kernels import DaskKernels, xp

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


BACKEND = DaskBackend(DaskKernels(xp))
