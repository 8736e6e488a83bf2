"""The channels in groups of which the last may be smaller: one or two parts of equal groups, and their statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from polywhiten._types import Array, Namespace
from polywhiten.kernels import Kernels
from polywhiten.solvers import Solver
from polywhiten.solvers.iteration import identity_like
from polywhiten.whitening import Statistics

TRACKED = ("whitener", "covariance")  # which of the matrices a layer may average


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


def join_channels(xp: Namespace, parts: Sequence[Array], axis: int = 0) -> Array:
    """The parts side by side; the only one itself."""
    return parts[0] if len(parts) == 1 else xp.concat(list(parts), axis=axis)


def join_statistics(xp: Namespace, parts: list[Statistics]) -> WhiteningStats:
    return WhiteningStats(
        join_channels(xp, [xp.reshape(part.mean, (-1,)) for part in parts]),
        _join_matrices(xp, [part.covariance for part in parts]),
        _join_matrices(xp, [part.whitener for part in parts]),
    )


def take_groups(matrices: Array, part: slice, size: int) -> Array:
    """The matrices (groups, size, size) of the channels `part`, out of (groups, d, d); these themselves for all."""
    d = matrices.shape[-1]
    if size == d and part.start == 0 and part.stop == d * matrices.shape[0]:
        return matrices
    return matrices[part.start // d : (part.stop + d - 1) // d, :size, :size]  # ONNX doesn't round -(-a // d) up


def whitener_of(kernels: Kernels, covariance: Array, channels: int, solver: Solver, eps: float) -> Array:
    """The whiteners (groups, d, d) of given covariances (groups, d, d)."""
    parts = [take_groups(covariance, part, d) for part, d in channel_parts(channels, covariance.shape[-1])]
    whiteners = [kernels.inverse_sqrt(solver, part, eps) for part in parts]
    return _join_matrices(kernels.xp, whiteners)


def _join_matrices(xp: Namespace, parts: list[Array]) -> Array:
    """Matrices of all groups, the smaller last one with the identity in what it lacks."""
    if len(parts) == 1:
        return parts[0]
    first, last = parts
    d, eye = last.shape[-1], identity_like(xp, first)
    top = xp.concat([last, eye[:, :d, d:]], axis=2)
    return xp.concat([first, xp.concat([top, eye[:, d:, :]], axis=1)])
