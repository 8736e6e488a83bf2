"""What the estimator's parameters ask for, once they are checked, and the map that follows from the moments of data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from polywhiten import checks
from polywhiten.analysis.conditioning import spectrum
from polywhiten.embeddings.matrices import METHODS, components_for, ledoit_wolf_shrinkage, shrunk, whitening_matrix
from polywhiten.moments import Float64, Moments
from polywhiten.rows import RowInput, RowMap

LEDOIT_WOLF = "ledoit_wolf"
NEARLY_CONSTANT = 1e-7  # of the mean: a smaller deviation may be nothing but rounding errors of float32
# There is a warning below so many rows for each direction, unless eps is a large fraction of the mean variance. In the
# study of embeddings, whitening made search far worse at one row for each direction, and slightly worse at two.
FEW_ROWS = 2
SEARCH_EPS = 0.1  # with which searches found more than with the default, see docs/embeddings-results.md


class RankWarning(UserWarning):
    """Directions have no variance or a doubtful one, because rows are few or dimensions are constant."""


@dataclass(frozen=True)
class Recipe:
    """The checked parameters of `polywhiten.Whitening`, where they are described."""

    method: str
    n_components: int | float | None
    group_size: int | None
    iterations: int | None
    eps: float
    relative_eps: bool
    shrinkage: float | str
    normalize: bool
    read: RowInput

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Recipe:
        """Return the recipe of an estimator's parameters; raise ValueError or TypeError if one of them doesn't fit."""
        method = checks.check_choice("method", parameters["method"], METHODS)
        for name in ("relative_eps", "normalize"):
            if not isinstance(parameters[name], bool | np.bool_):
                raise TypeError(f"{name}={parameters[name]!r} must be True or False")
        iterations = parameters["iterations"]
        if iterations is not None:
            if method != "newton":
                raise ValueError(f'iterations={iterations!r} is for method="newton" alone: leave it out for {method!r}')
            iterations = checks.check_positive("iterations", iterations)
        group_size = parameters["group_size"]
        on_nonfinite = checks.check_choice("on_nonfinite", parameters["on_nonfinite"], ("raise", "skip"))
        return cls(
            method,
            _checked_components(parameters["n_components"]),
            None if group_size is None else checks.check_positive("group_size", group_size),
            iterations,
            checks.check_eps(parameters["eps"]),
            bool(parameters["relative_eps"]),
            _checked_shrinkage(parameters["shrinkage"]),
            bool(parameters["normalize"]),
            RowInput(_checked_scale(parameters["scale"]), on_nonfinite == "skip"),
        )

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of an estimator that has this recipe."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "read"}
        return {**own, "scale": self.read.scale, "on_nonfinite": "skip" if self.read.skip_nonfinite else "raise"}

    @property
    def needs_fourth_moment(self) -> bool:
        """Whether moments have to include the fourth, which the estimate of Ledoit and Wolf needs."""
        return self.shrinkage == LEDOIT_WOLF

    def check_dimension(self, dimension: int) -> None:
        """Check that parameters fit rows of so many dimensions."""
        k, scale = self.n_components, self.read.scale
        if isinstance(k, int) and k > self._group_size(dimension):
            of = "a group" if self.group_size else "x"
            raise ValueError(f"n_components={k} is more than the {self._group_size(dimension)} dimensions of {of}")
        if isinstance(scale, np.ndarray) and len(scale) != dimension:
            raise ValueError(f"scale has {len(scale)} values: one, or {dimension} for the dimensions of x, are needed")

    def check_same_scale(self, other: Recipe) -> None:
        """Check that statistics that were taken by this recipe can be merged with those by another one."""
        if not np.array_equal(np.asarray(self.read.scale), np.asarray(other.read.scale)):  # None, too
            raise ValueError(
                f"scale={other.read.scale} was {self.read.scale} for the data so far, whose statistics include it: "
                "use that scale, or fit to all data again"
            )

    def shrinkage_of(self, moments: Moments) -> float:
        """Return the shrinkage as a number."""
        return ledoit_wolf_shrinkage(moments) if isinstance(self.shrinkage, str) else self.shrinkage

    def row_map(self, moments: Moments) -> RowMap:
        """Return the map that whitens data with these moments; warn if their covariance has directions of no variance.

        Raises
        ------
        ValueError
            There are fewer than two rows, or `whitening_matrix` raises it.
        """
        if moments.count == 0 and not moments.skipped:
            raise ValueError("sample_weight is zero for all rows: at least two need a weight above 0")
        if moments.count < 2:
            skipped = f", and {moments.skipped} more with NaN or infinity" if moments.skipped else ""
            raise ValueError(f"n_samples={moments.count}{skipped}: a covariance needs at least 2 rows")
        components, matrices = self.components(moments), []
        self._warn_of_rank(moments, max(components))
        for (group, cov), n_components in zip(self._groups(moments), components, strict=True):
            of_group = whitening_matrix(
                cov,
                self.method,
                eps=self.eps,
                relative_eps=self.relative_eps,
                iterations=self.iterations,
                n_components=n_components,
            )
            matrices.append(np.zeros((len(of_group), len(moments.mean))))
            matrices[-1][:, group] = of_group
        return self.with_matrix(moments.mean, np.concatenate(matrices))

    def components(self, moments: Moments) -> list[int]:
        """Return how many principal components each group keeps."""
        wanted = self.n_components
        return [
            components_for(spectrum(cov), wanted) if isinstance(wanted, float) else min(wanted or len(cov), len(cov))
            for _, cov in self._groups(moments)
        ]

    def _groups(self, moments: Moments) -> Iterator[tuple[slice, Float64]]:
        """Yield the dimensions of each group, and their shrunk covariance."""
        cov = shrunk(moments.covariance, self.shrinkage_of(moments), self.method)
        size = self._group_size(len(cov))
        for start in range(0, len(cov), size):
            group = slice(start, min(start + size, len(cov)))
            yield group, cov[group, group]

    def with_matrix(self, mean: Float64, matrix: Float64) -> RowMap:
        """Return the map of a mean and a matrix that this recipe gave before."""
        return RowMap(mean, matrix, self._group_size(len(mean)), normalize=self.normalize)

    def _group_size(self, dimension: int) -> int:
        return min(self.group_size or dimension, dimension)

    def _warn_of_rank(self, moments: Moments, needed: int) -> None:
        """Warn about few rows for `needed` directions, and about dimensions without variance."""
        is_bounded = self.shrinkage != 0 or (self.relative_eps and self.eps >= SEARCH_EPS)
        if moments.count < FEW_ROWS * needed and not is_bounded:
            warnings.warn(
                f"{moments.count} rows are few for {needed} directions: whitening amplifies noise in some of them. Use "
                f'more rows, shrinkage="ledoit_wolf", eps={SEARCH_EPS}, a group_size, or fewer n_components',
                RankWarning,
                stacklevel=5,
            )
        variance = np.diag(moments.covariance)
        is_nearly = (variance > 0) & (variance <= (NEARLY_CONSTANT * moments.mean) ** 2)
        little = f"by less than {NEARLY_CONSTANT:g} of"
        for found, one, several, why in (
            (variance == 0, "is constant", "are constant", "whitening can't give them variance"),
            (is_nearly, f"varies {little} its mean", f"vary {little} their mean", "float32 has no digits for that"),
        ):
            numbers = np.flatnonzero(found)
            if len(numbers):
                named = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
                what = f"1 dimension {one}" if len(numbers) == 1 else f"{len(numbers)} dimensions {several}"
                warnings.warn(f"{what} ({named}): {why}", RankWarning, stacklevel=5)


def _checked_components(value: Any) -> int | float | None:
    if value is None:
        return None
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 1:
        return int(value)
    if isinstance(value, float | np.floating) and 0 < value < 1:
        return float(value)
    raise ValueError(
        f"n_components={value!r} must be an integer of 1 or more, or a share of the variance, above 0 and below 1"
    )


def _checked_shrinkage(value: Any) -> float | str:
    if isinstance(value, str) and value == LEDOIT_WOLF:
        return LEDOIT_WOLF
    if isinstance(value, int | float | np.number) and not isinstance(value, bool) and 0 <= float(value) <= 1:
        return float(value)
    raise ValueError(f'shrinkage={value!r} must be a number from 0 to 1, or "{LEDOIT_WOLF}"')


def _checked_scale(value: Any) -> float | Float64 | None:
    if value is None:
        return None
    wrong = ValueError(f"scale={value!r} must be a number, or one for each dimension, all finite and not 0")
    try:
        scale = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise wrong from None
    if scale.ndim > 1 or not np.all(np.isfinite(scale) & (scale != 0)):
        raise wrong
    return scale if scale.ndim else float(scale)
