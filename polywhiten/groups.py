"""The channels in groups of which the last may be smaller: one or two parts of equal groups, and their statistics."""

from __future__ import annotations

from typing import NamedTuple

import array_api_extra as xpx

from polywhiten._types import Array, Namespace
from polywhiten.kernels import Kernels
from polywhiten.solvers import Solver
from polywhiten.solvers.iteration import identity_like
from polywhiten.whitening import Statistics, regularized


class WhiteningStats(NamedTuple):
    """Statistics of groups of d channels, where the last group may be smaller than d.

    Attributes
    ----------
    mean : array, shape (C,)
    covariance : array, shape (groups, d, d)
        Divided by the number of samples, without eps.
    whitener : array, shape (groups, d, d)
        (covariance + eps I)^(-1/2), as the chosen method approximates it.

    Notes
    -----
    Where the last group is smaller, its matrices stand in the upper left corner and the identity fills the rest.
    """

    mean: Array
    covariance: Array
    whitener: Array


def channel_parts(channels: int, group_size: int) -> list[tuple[slice, int]]:
    """Slices of the channels that equal groups fill, each with its group size: two where the last group is smaller."""
    whole = channels - channels % group_size
    parts = [(slice(0, whole), group_size), (slice(whole, channels), channels - whole)]
    return [(part, size) for part, size in parts if size and part.start < part.stop]


def take_channels(x: Array | None, part: slice, axis: int = 0) -> Array | None:
    """The channels `part` of x; x itself where these are all."""
    if x is None or part == slice(0, x.shape[axis]):
        return x
    return x[(slice(None),) * axis + (part, ...)]


def join_channels(xp: Namespace, parts: list[Array], axis: int = 0) -> Array:
    """The parts side by side; the only one itself."""
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=axis)


def join_statistics(xp: Namespace, parts: list[Statistics]) -> WhiteningStats:
    size = parts[0].whitener.shape[-1]
    return WhiteningStats(
        join_channels(xp, [xp.reshape(part.mean, (-1,)) for part in parts]),
        join_channels(xp, [_padded(xp, part.covariance, size) for part in parts]),
        join_channels(xp, [_padded(xp, part.whitener, size) for part in parts]),
    )


def take_groups(matrices: Array, part: slice, size: int) -> Array:
    """The matrices (groups, size, size) of the channels `part`, out of (groups, d, d)."""
    d = matrices.shape[-1]
    return matrices[part.start // d : -(-part.stop // d), :size, :size]


def whitener_of(kernels: Kernels, covariance: Array, channels: int, solver: Solver, eps: float) -> Array:
    """The whiteners (groups, d, d) of given covariances (groups, d, d)."""
    size = covariance.shape[-1]
    parts = [take_groups(covariance, part, d) for part, d in channel_parts(channels, size)]
    whiteners = [kernels.inverse_sqrt(solver, regularized(kernels, part, eps)) for part in parts]
    return join_channels(kernels.xp, [_padded(kernels.xp, whitener, size) for whitener in whiteners])


def _padded(xp: Namespace, matrices: Array, size: int) -> Array:
    """Matrices (groups, d, d) as (groups, size, size), with the identity in what is new."""
    missing = size - matrices.shape[-1]
    if not missing:
        return matrices
    corner = ((0, 0), (0, missing), (0, missing))
    inside = xpx.pad(identity_like(xp, matrices), corner[1:], xp=xp)
    padded = xpx.pad(matrices, corner, xp=xp)
    return padded + (identity_like(xp, padded) - inside)
