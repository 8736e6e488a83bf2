"""Suggest how to whiten data of a given spectrum, with the reasons in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from polywhiten.embeddings.matrices import components_for
from polywhiten.embeddings.recipe import SEARCH_EPS
from polywhiten.moments import Float64

KEPT_VARIANCE = 0.99
ROWS_PER_DIMENSION = 10  # with fewer, the smallest eigenvalues of a sample covariance are off by more than a half
DEFAULT_EPS = 1e-5


@dataclass(frozen=True)
class Suggestion:
    """Parameters of `polywhiten.Whitening`, and why.

    Attributes
    ----------
    parameters : dict
        Method and eps, and other parameters where they differ from their defaults.
    reasons : tuple of str
        A sentence for each decision.
    """

    parameters: dict[str, Any]
    reasons: tuple[str, ...]


def suggest(eigenvalues: Float64, rows: int, noise: float, *, is_unit_length: bool = False) -> Suggestion:
    """Suggest method, number of components, eps, shrinkage and `normalize`.

    Parameters
    ----------
    eigenvalues : array, shape (d,)
        Of the covariance, the largest first.
    rows : int
        Number of rows that the covariance is from.
    noise : float
        Variance of the rounding errors in each direction.
    is_unit_length : bool
        Whether all rows have the length 1.

    Returns
    -------
    Suggestion

    Examples
    --------
    >>> import numpy as np
    >>> from polywhiten.embeddings.suggestion import suggest
    >>> suggest(np.array([4.0, 2.0, 1.0, 1.0]), rows=1000, noise=0.0).parameters
    {'method': 'zca', 'eps': 0.1}
    >>> suggest(np.array([5.0, 3.0, 1e-3, 1e-4]), rows=1000, noise=0.0).parameters
    {'method': 'pca', 'n_components': 2, 'eps': 0.1}
    """
    parameters: dict[str, Any]
    kept = components_for(eigenvalues, KEPT_VARIANCE)
    dimension, rank = len(eigenvalues), numerical_rank(eigenvalues, rows, noise)
    if kept <= dimension // 2 or rank < dimension:
        outputs = min(kept, rank)
        parameters = {"method": "pca", "n_components": outputs}
        reasons = [_why_pca(eigenvalues, rank, outputs)]
    else:
        outputs = dimension
        parameters = {"method": "zca"}
        reasons = [
            f"Method zca: {KEPT_VARIANCE:.0%} of the variance takes {kept} of the {dimension} dimensions, so all are "
            "kept, and zca changes the data least."
        ]
    parameters["eps"], why_eps = _eps(eigenvalues, outputs, noise)
    reasons.append(why_eps)
    if rows < ROWS_PER_DIMENSION * dimension:
        parameters["shrinkage"] = "ledoit_wolf"
        reasons.append(
            f"Shrinkage ledoit_wolf: {rows:,} rows are fewer than {ROWS_PER_DIMENSION} for each of the {dimension} "
            "dimensions, so the smallest variances are estimated too small."
        )
    if is_unit_length:
        parameters["normalize"] = True
        reasons.append("Normalize: the rows have length 1, and without it the white ones wouldn't.")
    return Suggestion(parameters, tuple(reasons))


def numerical_rank(eigenvalues: Float64, rows: int, noise: float) -> int:
    """Return how many eigenvalues are larger than what rounding leaves of 0."""
    smallest = max(len(eigenvalues) * float(np.finfo(float).eps) * eigenvalues[0], 2 * noise)
    return max(1, min(int(np.sum(eigenvalues > smallest)), rows - 1))


def _why_pca(eigenvalues: Float64, rank: int, outputs: int) -> str:
    dimension = len(eigenvalues)
    if outputs == rank < dimension:
        return (
            f"Method pca with {outputs} components: this is the rank of the data, in {dimension} dimensions. All other "
            "directions have no variance above rounding errors, which whitening would amplify."
        )
    amplified = math.sqrt(eigenvalues[0] / max(eigenvalues[rank - 1], np.finfo(float).tiny))
    return (
        f"Method pca with {outputs} components: {KEPT_VARIANCE:.0%} of the variance is in {outputs} of the {dimension} "
        f"dimensions. Whitening all of them would amplify the smallest {amplified:,.0f} times as much as the largest."
    )


def _eps(eigenvalues: Float64, outputs: int, noise: float) -> tuple[float, str]:
    """Return the relative eps for the largest `outputs` eigenvalues, and why."""
    mean_variance = float(np.mean(eigenvalues))
    relative_noise = noise / mean_variance
    if relative_noise > SEARCH_EPS:
        digit = 10.0 ** math.floor(math.log10(relative_noise))
        eps = float(f"{math.ceil(relative_noise / digit) * digit:.0e}")
        return eps, (
            f"Eps {eps:g} of the mean variance: this is the variance of rounding errors in the data, or in products of "
            "them, which whitening shouldn't amplify."
        )
    smallest = eigenvalues[outputs - 1] / mean_variance
    return SEARCH_EPS, (
        f"Eps {SEARCH_EPS:g} of the mean variance: directions of less variance stay small (the smallest that is "
        f"whitened has {smallest:.1g} of the mean). In measured searches, this found more than the default of "
        f"{DEFAULT_EPS:g}, which makes all variances equal."
    )
