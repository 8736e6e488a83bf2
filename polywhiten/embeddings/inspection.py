"""Measure how far embeddings are from white, in one pass over them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from polywhiten.embeddings.matrices import components_for
from polywhiten.embeddings.suggestion import Suggestion, numerical_rank, suggest
from polywhiten.embeddings.whitening import Whitening
from polywhiten.moments import Float64

SAMPLE = 4096  # rows, whose pairs are measured
UNIT_LENGTH_TOLERANCE = 0.01  # half precision rounds rows of length 1 by less


@dataclass(frozen=True)
class Inspection:
    """What `inspect` has measured.

    Attributes
    ----------
    rows, skipped, dimension : int
        Number of rows, how many of them were skipped because they aren't finite, and the numbers in a row.
    mean_norm, norm_deviation : float
        Mean and standard deviation of the lengths of rows.
    centre_norm : float
        Length of the mean of the rows. If it is near `mean_norm`, all rows point in about the same direction.
    eigenvalues : array, shape (d,)
        Spectrum of the covariance, the largest first.
    white_eigenvalues : array, shape (k,)
        That of the outputs of `whitening`, without `normalize`.
    rank : int
        How many eigenvalues are larger than what rounding errors leave of 0.
    components : dict of float to int
        For shares of the variance, how many principal components have it.
    cosines, white_cosines : array, shape (pairs,)
        Cosine similarities of random pairs of rows, before whitening and after.
    mean_cosine, white_mean_cosine : float
        Means over all pairs of a random sample of rows. A mean far from 0 is called anisotropy.
    suggestion : Suggestion
        How to whiten these rows.
    whitening : polywhiten.Whitening
        The one after which cosines were measured, which is fitted: the one that was given, or the suggested one.
    """

    rows: int
    skipped: int
    dimension: int
    mean_norm: float
    norm_deviation: float
    centre_norm: float
    eigenvalues: Float64
    white_eigenvalues: Float64
    rank: int
    components: dict[float, int]
    cosines: Float64
    white_cosines: Float64
    mean_cosine: float
    white_mean_cosine: float
    suggestion: Suggestion
    whitening: Whitening

    @property
    def condition_number(self) -> float:
        """The largest eigenvalue divided by the smallest; infinite if the rank is below the dimension."""
        return float(self.eigenvalues[0] / self.eigenvalues[-1]) if self.rank == self.dimension else float("inf")

    @property
    def effective_dimension(self) -> float:
        """Square of the sum of eigenvalues, divided by the sum of their squares.

        It is d for white data, and 1 if all variance is in one direction.
        """
        return effective_dimension(self.eigenvalues)


def effective_dimension(eigenvalues: Float64) -> float:
    """Return over how many directions the variance is spread; see `Inspection.effective_dimension`."""
    return float(np.sum(eigenvalues) ** 2 / np.sum(eigenvalues**2))


def inspect(
    X: Any,  # noqa: N803  # scikit-learn's name
    *,
    whitening: Whitening | None = None,
    scale: float | None = None,
    on_nonfinite: str = "raise",
    seed: int = 0,
) -> Inspection:
    """Measure spectrum and anisotropy of embeddings, and suggest how to whiten them.

    Parameters
    ----------
    X : NumPy array, shape (n, d), or iterator of such arrays
        Embeddings, one a row, or batches of them, each of which is read once.
    whitening : polywhiten.Whitening, optional
        A fitted one to measure; by default the suggested one is.
    scale : float, optional
        Embeddings are multiplied by it, as quantized ones need it.
    on_nonfinite : {"raise", "skip"}
        What to do with rows that contain NaN or infinity.
    seed : int
        Of the random sample of rows whose pairs are measured.

    Returns
    -------
    Inspection

    Raises
    ------
    TypeError, ValueError
        X doesn't fit, has fewer than 2 rows, or no variance at all.

    Examples
    --------
    >>> import numpy as np
    >>> from polywhiten.embeddings.inspection import inspect
    >>> x = np.random.default_rng(0).normal(size=(2000, 16)) * np.linspace(1, 5, 16) + 6
    >>> found = inspect(x)
    >>> round(found.mean_cosine, 1), abs(found.white_mean_cosine) < 0.01
    (0.8, True)
    >>> round(found.condition_number), round(found.effective_dimension), found.suggestion.parameters
    (26, 10, {'method': 'zca', 'eps': 0.1})
    """
    taken = Whitening(shrinkage="ledoit_wolf", scale=scale, on_nonfinite=on_nonfinite)
    sample, norms = _RowSample(SAMPLE, seed), _Norms()
    dtype = None
    for batch in X if isinstance(X, Iterator) else (np.asarray(X),):
        taken.partial_fit(batch)
        rows = _finite_rows(batch)
        sample.add(rows)
        norms.add(rows if scale is None else rows * scale)
        dtype = batch.dtype if dtype is None else min(dtype, batch.dtype, key=_precision)
    if dtype is None or norms.count < 2:
        raise ValueError(f"X has {norms.count} rows without NaN or infinity: at least 2 are needed")
    moments = taken.moments_
    eigenvalues = np.maximum(taken.eigenvalues_, 0.0)
    if not eigenvalues[0] > 0:
        raise ValueError(f"X has {norms.count:,} equal rows: rows that differ are needed")
    centre = float(np.linalg.norm(moments.mean))
    mean_square = (float(np.sum(eigenvalues)) + centre**2) / len(eigenvalues)
    noise = max(_rounding_variance(dtype, mean_square, scale), _product_error(dtype) * float(eigenvalues[0]))
    unit = abs(norms.mean - 1) < UNIT_LENGTH_TOLERANCE and norms.deviation < UNIT_LENGTH_TOLERANCE
    suggestion = suggest(eigenvalues, norms.count, noise, is_unit_length=unit)
    if whitening is None:
        whitening = Whitening(**suggestion.parameters, scale=scale, on_nonfinite=on_nonfinite)
        whitening.moments_ = moments
    before = sample.rows.astype(np.float64)
    after = np.asarray(whitening.transform(before))  # scikit-learn may be set to make a data frame of it
    if scale is not None:
        before *= scale
    rank = numerical_rank(eigenvalues, norms.count, noise)
    return Inspection(
        rows=moments.count,
        skipped=moments.skipped,
        dimension=len(eigenvalues),
        mean_norm=norms.mean,
        norm_deviation=norms.deviation,
        centre_norm=centre,
        eigenvalues=eigenvalues,
        white_eigenvalues=_white_eigenvalues(whitening, taken.covariance_),
        rank=rank,
        components={share: components_for(eigenvalues, share) for share in (0.9, 0.95, 0.99)},
        cosines=_cosines(before),
        white_cosines=_cosines(after),
        mean_cosine=_mean_cosine(before),
        white_mean_cosine=_mean_cosine(after),
        suggestion=suggestion,
        whitening=whitening,
    )


class _RowSample:
    """A uniform random sample of rows, in a random order, of batches whose number isn't known before."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._random = size, np.random.default_rng(seed)
        self._keys: Float64 = np.empty(0)
        self.rows: NDArray[Any] = np.empty((0, 0))

    def add(self, rows: NDArray[Any]) -> None:
        """Give each row a random key, and keep those with the smallest keys of all."""
        keys = self._random.random(len(rows))
        is_full = len(self._keys) == self._size
        chosen = np.flatnonzero(keys < (self._keys[-1] if is_full else np.inf))
        kept = rows[chosen]
        self.rows = np.concatenate([self.rows, kept]) if len(self._keys) else kept
        self._keys = np.concatenate([self._keys, keys[chosen]])
        order = np.argsort(self._keys)[: self._size]
        self._keys, self.rows = self._keys[order], self.rows[order]


class _Norms:
    """Mean and standard deviation of the lengths of rows."""

    def __init__(self) -> None:
        self.count, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, rows: NDArray[Any]) -> None:
        squares = np.einsum("ij,ij->i", rows, rows, dtype=np.float64, casting="unsafe")
        self.count += len(rows)
        self._sum += float(np.sum(np.sqrt(squares)))
        self._squares += float(np.sum(squares))

    @property
    def mean(self) -> float:
        return self._sum / self.count

    @property
    def deviation(self) -> float:
        return math.sqrt(max(self._squares / self.count - self.mean**2, 0.0))


def _finite_rows(rows: NDArray[Any]) -> NDArray[Any]:
    """Return the rows that have neither NaN nor infinity."""
    if rows.dtype.kind != "f" or np.isfinite(np.sum(rows, dtype=np.float64)):
        return rows
    return rows[np.all(np.isfinite(rows), axis=1)]


def _precision(dtype: np.dtype[Any]) -> int:
    """Return a number that is smaller for dtypes with larger rounding errors."""
    return dtype.itemsize if dtype.kind == "f" else 0


def _rounding_variance(dtype: np.dtype[Any], mean_square: float, scale: float | None) -> float:
    """Return the variance of rounding errors: those of integers are uniform, those of floating point relative."""
    if dtype.kind != "f":
        return (scale or 1.0) ** 2 / 12
    return mean_square * (float(np.finfo(dtype).eps) / 2) ** 2 / 3


def _product_error(dtype: np.dtype[Any]) -> float:
    """Return the rounding error of a covariance, whose products are at least in float32, as a share of its norm."""
    accumulated = np.result_type(dtype, np.float32)
    return 2 * float(np.finfo(accumulated).eps)


def _white_eigenvalues(whitening: Whitening, cov: Float64) -> Float64:
    matrix = whitening.matrix_
    return cast(Float64, np.maximum(np.linalg.eigvalsh(matrix @ cov @ matrix.T)[::-1], 0.0))


def _unit_rows(rows: Float64) -> Float64:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return cast(Float64, np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0))


def _cosines(rows: Float64) -> Float64:
    """Return the cosine similarities of disjoint pairs of rows."""
    unit = _unit_rows(rows)
    half = len(unit) // 2
    return cast(Float64, np.einsum("ij,ij->i", unit[:half], unit[half : 2 * half]))


def _mean_cosine(rows: Float64) -> float:
    """Return the mean cosine similarity of all pairs of different rows, from the length of the sum of unit rows."""
    total, count = np.sum(_unit_rows(rows), axis=0), len(rows)
    return float((total @ total - count) / (count * (count - 1)))
