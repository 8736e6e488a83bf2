"""Mean and scatter of rows in float64, taken batch by batch and merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
_NUMBERS = "count", "skipped", "weight", "fourth"


@dataclass(frozen=True)
class Moments:
    """Sums over the rows of an array, about their mean, in float64 whatever the dtype of the rows.

    The moments of two arrays add up to those of their rows together, by the formulas of Chan, Golub and LeVeque (1983).
    So the order of batches, and how rows are split into them, changes rounding alone.

    Attributes
    ----------
    count : int
        Number of rows, without those that were skipped.
    skipped : int
        Number of rows that were left out because they contain NaN or infinity.
    weight : float
        Sum of the rows' weights; the number of rows if they have none.
    mean : array, shape (d,)
        Weighted mean.
    scatter : array, shape (d, d)
        Weighted sum of (x - mean) (x - mean)'.
    third : array, shape (d,), or None
        Weighted sum of `|x - mean|^2 (x - mean)`. Only the estimate of Ledoit and Wolf needs it, to merge `fourth`.
    fourth : float or None
        Weighted sum of `|x - mean|^4`.

    Examples
    --------
    >>> import numpy as np
    >>> from polywhiten.moments import Moments
    >>> total = Moments.empty(2)
    >>> total.count, total.covariance
    (0, array([[0., 0.],
           [0., 0.]]))
    """

    count: int
    skipped: int
    weight: float
    mean: Float64
    scatter: Float64
    third: Float64 | None = None
    fourth: float | None = None

    @classmethod
    def empty(cls, dimension: int, *, fourth: bool = False) -> Moments:
        """Return the moments of no rows, with third and fourth moments if these are wanted."""
        higher = (np.zeros(dimension), 0.0) if fourth else (None, None)
        return cls(0, 0, 0.0, np.zeros(dimension), np.zeros((dimension, dimension)), *higher)

    @classmethod
    def of_parts(cls, arrays: Mapping[str, Float64], numbers: Mapping[str, Any]) -> Moments:
        """Return the moments that `parts` has taken apart; raise KeyError if something is missing."""
        return cls(
            mean=arrays["mean"],
            scatter=arrays["scatter"],
            third=arrays.get("third"),
            **{name: numbers[name] for name in _NUMBERS},
        )

    def parts(self) -> tuple[dict[str, Float64], dict[str, Any]]:
        """Return the arrays that there are, and the numbers, by their names, for a file."""
        arrays = {"mean": self.mean, "scatter": self.scatter}
        if self.third is not None:
            arrays["third"] = self.third
        return arrays, {name: getattr(self, name) for name in _NUMBERS}

    @property
    def covariance(self) -> Float64:
        """The scatter divided by the weight."""
        return self.scatter / max(self.weight, np.finfo(float).tiny)

    def is_finite(self) -> bool:
        """Return whether no sum is NaN or infinite."""
        sums = self.mean.sum() + self.scatter.sum() + (self.fourth or 0.0)
        return bool(np.isfinite(sums))

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of the rows of both."""
        if not isinstance(other, Moments):
            return NotImplemented
        if len(self.mean) != len(other.mean):
            raise ValueError(f"moments of {len(self.mean)} and of {len(other.mean)} dimensions can't be merged")
        if (self.fourth is None) != (other.fourth is None):
            raise ValueError(
                "moments with and without fourth moments can't be merged: take both with the same shrinkage"
            )
        weight = self.weight + other.weight
        share = other.weight / weight if weight else 0.0
        mean = self.mean + share * (other.mean - self.mean)
        mine, others = self._about(mean), other._about(mean)
        return Moments(
            self.count + other.count,
            self.skipped + other.skipped,
            weight,
            mean,
            mine.scatter + others.scatter,
            None if mine.third is None else mine.third + cast(Float64, others.third),
            None if mine.fourth is None else mine.fourth + cast(float, others.fourth),
        )

    def _about(self, centre: Float64) -> Moments:
        """Return the same sums of x - centre in place of x - mean."""
        shift = self.mean - centre
        squared = shift @ shift
        scatter = self.scatter + self.weight * np.outer(shift, shift)
        if self.third is None or self.fourth is None:
            return Moments(self.count, self.skipped, self.weight, centre, scatter)
        product, trace = self.scatter @ shift, np.trace(self.scatter)
        third = self.third + 2 * product + (trace + self.weight * squared) * shift
        fourth = (
            self.fourth + 4 * (self.third @ shift + shift @ product) + (2 * trace + self.weight * squared) * squared
        )
        return Moments(self.count, self.skipped, self.weight, centre, scatter, third, float(fourth))
