"""Algorithms 1 and 2 of the papers, line by line, for any array library. polywhiten is compared with them.

`xp` is a namespace with permute_dims, reshape, mean, sum, eye, sqrt, matrix_transpose and linalg.eigh, which have the
signatures of NumPy's.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

Array = Any
Saved = tuple[Array, ...]  # weight, whitened x, centred x, normalized covariance, trace, and every P_k


@dataclass(frozen=True)
class Blocks:
    """How an array is cut into blocks: its channels into groups of `size`, or each sample's into `size` groups."""

    per_sample: bool
    size: int  # d, the channels per group; g, the number of groups, if per_sample
    axis: int = 1  # the axis of the channels

    def rows(self, xp: Any, x: Array) -> Array:
        """Return x in the shape (blocks, d, M)."""
        permuted = xp.permute_dims(x, self._order(len(x.shape)))
        lead = permuted.shape[0]
        return xp.reshape(permuted, (lead if self.per_sample else lead // self.size, self.size, -1))

    def restored(self, xp: Any, rows: Array, shape: tuple[int, ...]) -> Array:
        """Undo `rows` for an array of the given original shape."""
        order = self._order(len(shape))
        permuted = xp.reshape(rows, tuple(shape[i] for i in order))
        return xp.permute_dims(permuted, tuple(order.index(i) for i in range(len(order))))

    def per_channel(self, xp: Any, vector: Array, rank: int) -> Array:
        """Return a vector of the channels in a shape that broadcasts against arrays of this rank."""
        return xp.reshape(vector, tuple(-1 if i == self.axis % rank else 1 for i in range(rank)))

    def summed(self, xp: Any, x: Array) -> Array:
        """Return the sum of x over all axes but the channels'."""
        rank = len(x.shape)
        return xp.sum(x, axis=tuple(i for i in range(rank) if i != self.axis % rank))

    def _order(self, rank: int) -> tuple[int, ...]:
        first = (0, self.axis % rank) if self.per_sample else (self.axis % rank,)
        return *first, *(i for i in range(rank) if i not in first)


def forward(
    xp: Any, blocks: Blocks, x: Array, weight: Array, bias: Array, iterations: int = 5, eps: float = 1e-5
) -> tuple[Array, Saved]:
    """Return x whitened, scaled and shifted, and the arrays that `backward` needs."""
    centred, cov, eye = _moments(xp, blocks.rows(xp, x), eps)
    trace = xp.sum(cov * eye, axis=(1, 2), keepdims=True)
    normalized = cov / trace
    iterates = [normalized * 0 + eye]
    for _ in range(iterations):
        p = iterates[-1]
        iterates.append((3 * p - p @ p @ p @ normalized) / 2)
    white = blocks.restored(xp, iterates[-1] / xp.sqrt(trace) @ centred, x.shape)
    return _affine(xp, blocks, white, weight, bias), (weight, white, centred, normalized, trace, *iterates)


def backward(xp: Any, blocks: Blocks, saved: Saved, dy: Array) -> tuple[Array, Array, Array]:
    """Return the gradients of x, weight and bias."""
    weight, white, centred, normalized, trace, *iterates = saved
    transposed = xp.matrix_transpose
    dweight, dbias = blocks.summed(xp, dy * white), blocks.summed(xp, dy)
    dwhite = blocks.rows(xp, dy * blocks.per_channel(xp, weight, len(dy.shape)))
    last, root = iterates[-1], xp.sqrt(trace)
    dwhitener = dwhite @ transposed(centred)
    dp, dnormalized = dwhitener / root, 0 * normalized
    for p in iterates[-2::-1]:
        square, product = p @ p, p @ normalized
        dnormalized = dnormalized - transposed(square @ p) @ dp / 2
        one, two, three = (
            dp @ transposed(p @ product),
            transposed(p) @ dp @ transposed(product),
            transposed(square) @ dp,
        )
        dp = (3 * dp - one - two - three @ transposed(normalized)) / 2
    through_trace = xp.sum(dnormalized * normalized, axis=(1, 2), keepdims=True) / trace
    through_root = xp.sum(dwhitener * last, axis=(1, 2), keepdims=True) / (2 * trace * root)
    eye = xp.eye(centred.shape[1], dtype=centred.dtype)
    dcov = dnormalized / trace - (through_trace + through_root) * eye
    drows = transposed(last / root) @ (dwhite - xp.mean(dwhite, axis=2, keepdims=True))
    drows = drows + (dcov + transposed(dcov)) / centred.shape[2] @ centred
    return blocks.restored(xp, drows, dy.shape), dweight, dbias


def exact(xp: Any, blocks: Blocks, x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    """Apply decorrelated batch normalization by an eigendecomposition, which the framework differentiates."""
    centred, cov, _ = _moments(xp, blocks.rows(xp, x), eps)
    values, vectors = xp.linalg.eigh(cov)
    whitener = vectors / xp.sqrt(values)[:, None, :] @ xp.matrix_transpose(vectors)
    return _affine(xp, blocks, blocks.restored(xp, whitener @ centred, x.shape), weight, bias)


def frozen(xp: Any, blocks: Blocks, x: Array, mean: Array, whitener: Array, weight: Array, bias: Array) -> Array:
    """Whiten x with frozen statistics: mean of shape (C,), whitener of shape (C / d, d, d)."""
    rows = blocks.rows(xp, x)
    centred = rows - xp.reshape(mean, (rows.shape[0], rows.shape[1], 1))
    return _affine(xp, blocks, blocks.restored(xp, whitener @ centred, x.shape), weight, bias)


def _moments(xp: Any, rows: Array, eps: float) -> tuple[Array, Array, Array]:
    centred = rows - xp.mean(rows, axis=2, keepdims=True)
    eye = xp.eye(rows.shape[1], dtype=rows.dtype)
    return centred, centred @ xp.matrix_transpose(centred) / rows.shape[2] + eps * eye, eye


def _affine(xp: Any, blocks: Blocks, white: Array, weight: Array, bias: Array) -> Array:
    rank = len(white.shape)
    return white * blocks.per_channel(xp, weight, rank) + blocks.per_channel(xp, bias, rank)


def product_flops(shape: tuple[int, ...], d: int) -> int:
    """Return the operations of the five products of whitening and its gradient: covariance, map, K, A' dY and B X."""
    return 5 * 2 * d * prod(shape)
