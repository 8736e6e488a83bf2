"""Moments and whitening of the rows of an array, such as embeddings, in blocks that bound the memory of temporaries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polywhiten._types import Array, Namespace, Shape
from polywhiten.blocks import ChannelGroups
from polywhiten.kernels import Kernels
from polywhiten.moments import Float64
from polywhiten.solvers.eigh import Eigh
from polywhiten.spec import WhiteningSpec

# A block of 64 MiB in float32 is long enough for the full speed of a processor. Sums in float32 run over one block at
# most, because moments of blocks are merged in float64.
BLOCK_VALUES = 2**24
_SHORT = ("bool", "int8", "uint8", "int16", "uint16")  # of which float32 holds all values exactly


@dataclass(frozen=True)
class RowInput:
    """How rows are read.

    Attributes
    ----------
    scale : float, array of shape (d,), or None
        Rows are multiplied by it, as quantized integers need it.
    skip_nonfinite : bool
        Whether moments leave out rows with NaN or infinity, and outputs are NaN for them, instead of an error.
    first_row : int
        The number that errors give to the first row, of an array that is a part of another one.
    """

    scale: float | Float64 | None = None
    skip_nonfinite: bool = False
    first_row: int = 0

    def floating(self, xp: Namespace, rows: Array) -> Array:
        """Return rows of real floating point, multiplied by the scale; integers of up to 16 bits become float32."""
        if not xp.isdtype(rows.dtype, "real floating"):
            is_short = any(
                rows.dtype == getattr(xp, name, None) for name in _SHORT
            )  # not each library has each of them
            rows = xp.astype(rows, xp.float32 if is_short else xp.float64)
        if self.scale is None:
            return rows
        return rows * (self.scale if isinstance(self.scale, float) else like(xp, self.scale, rows))


@dataclass(frozen=True)
class RowMap:
    """An affine map of rows: y = matrix (x - mean) + shift, divided by its length if that is wanted.

    Attributes
    ----------
    mean : array, shape (d,)
    matrix : array, shape (k, d)
    group_size : int
        The matrix is 0 outside of square blocks of this size along its diagonal, of which the last may be smaller. It
        is d if the matrix isn't square.
    shift : array, shape (k,), optional
    normalize : bool
        Whether outputs are divided by their length; those of length 0 stay.
    """

    mean: Float64
    matrix: Float64
    group_size: int
    shift: Float64 | None = None
    normalize: bool = False

    def inverse(self, scale: float | Float64 | None) -> RowMap:
        """Return the map from outputs that aren't normalized back to rows, as they were before the `scale`."""
        factor = np.ones_like(self.mean) / (1.0 if scale is None else scale)
        outputs, dimension = self.matrix.shape
        group_size = self.group_size if outputs == dimension else outputs
        return RowMap(np.zeros(outputs), factor[:, None] * np.linalg.pinv(self.matrix), group_size, factor * self.mean)

    def blocks(self) -> Float64:
        """Return the blocks (groups, group_size, group_size) along the diagonal; zeros fill the last one."""
        starts = range(0, len(self.mean), self.group_size)
        blocks = np.zeros((len(starts), self.group_size, self.group_size))
        for block, start in zip(blocks, starts, strict=True):
            part = self.matrix[start : start + self.group_size, start : start + self.group_size]
            block[: len(part), : len(part)] = part
        return blocks

    def apply(self, kernels: Kernels, rows: Array) -> Array:
        """Return the outputs for rows, in their dtype."""
        xp, wide = kernels.xp, kernels.to_accumulation_dtype(rows)
        y = (wide - like(xp, self.mean, wide)) @ like(xp, self.matrix.T, wide)
        if self.shift is not None:
            y = y + like(xp, self.shift, y)
        return xp.astype(self.finished(xp, y), rows.dtype, copy=False)

    def finished(self, xp: Namespace, y: Array) -> Array:
        """Return outputs divided by their length if that is wanted."""
        if not self.normalize:
            return y
        length = xp.sqrt(xp.sum(y * y, axis=1))[:, None]
        return y / xp.where(length > 0, length, xp.ones_like(length))


def row_blocks(shape: Shape) -> Iterator[slice]:
    """Yield slices of the rows of an array (n, d), at least one."""
    rows, dimension = shape
    step = max(1, BLOCK_VALUES // max(dimension, 1))
    yield from (slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step))


def whole_row_spec(dimension: int) -> WhiteningSpec:
    """Return a specification of rows with all dimensions in one group, to choose kernels by; nothing is solved."""
    return WhiteningSpec(ChannelGroups(1, dimension), Eigh(), eps=0.0)


def row_sums(kernels: Kernels, rows: Array, weights: Array | None, fourth: bool) -> tuple[Array, ...]:
    """Return mean (d,), scatter (d, d), and the third (d,) and fourth moments () too if these are wanted.

    See `polywhiten.moments.Moments` for what these are; `weights` (n,) are in the accumulation dtype.
    """
    xp, spec = kernels.xp, whole_row_spec(rows.shape[1])
    axis, split = spec.blocks.block_axis, kernels.split(spec.blocks, rows)
    if weights is None:
        mean, cov = kernels.moments(split, axis)
        mean, scatter = mean[0, ...], cov[0, ...] * rows.shape[0]
    else:
        wide, total = kernels.to_accumulation_dtype(rows), xp.sum(weights)
        about = (weights[None, :] @ wide)[0, ...] / total  # what rounding leaves of the mean is in `left`
        centred = weights[:, None] * (wide - about)
        left, products = kernels.cross_moments(kernels.split(spec.blocks, centred), split, about[None, :], axis)
        mean, scatter = about + left[0, ...] / total, products[0, ...] - left[0, :, None] * left[0, None, :] / total
    if not fourth:
        return mean, scatter
    centred = kernels.to_accumulation_dtype(rows) - mean
    squared = xp.sum(centred * centred, axis=1)
    weighted = squared if weights is None else weights * squared
    return mean, scatter, (weighted[None, :] @ centred)[0, ...], xp.sum(weighted * squared)


def like(xp: Namespace, values: npt.ArrayLike, x: Array) -> Array:
    """Return values as an array with the library, dtype and device of x."""
    return xp.astype(xp.asarray(np.asarray(values), device=x.device), x.dtype, copy=False)
