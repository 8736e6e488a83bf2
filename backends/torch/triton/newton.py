"""All of Newton's iterations of a matrix, and of its gradient, in one program.

The matrices lie in global memory, where a program's own stay in its processor's cache: in registers there is no room
for those of 64 variables, nor in shared memory for those of 128.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from polywhiten.torch.triton.tiles import load_matrix, narrow, product, store_matrix, tile_height

_LARGEST_TILE = 64  # rows and columns of a product that are computed at a time
_STEP = 32  # columns of its left matrix that are read at a time
SCRATCH = 5  # matrices that the iteration works in,
ADJOINT_SCRATCH = 12  # and that with tangents
_PROGRAMS = 256  # a large GPU runs about half of them at a time
_PRECISION = "tf32x3"  # so few operations that less than float32 would gain nothing
_SMALLEST = torch.finfo(torch.float32).smallest_normal


def inverse_sqrt(cov: Tensor, eps: float, iterations: int) -> Tensor:
    """As `polywhiten.kernels.Kernels.inverse_sqrt` with the solver `Newton(iterations)`."""
    cov = cov.contiguous()
    count, d = _sizes(cov)
    memory, w = scratch(cov, count, d), torch.empty_like(cov)
    _inverse_sqrt[(memory.shape[0],)](cov, w, memory, count, d, eps, iterations, MATRICES=SCRATCH, **constants(d))
    return w


def inverse_sqrt_adjoint(cov: Tensor, grad: Tensor, eps: float, iterations: int, samples: int = 2) -> Tensor:
    """As `polywhiten.kernels.Kernels.inverse_sqrt_adjoint` with the solver `Newton(iterations)`.

    The gradient dS is symmetric: the result is (dS + dS') / samples.
    """
    cov, grad = cov.contiguous(), grad.contiguous()
    count, d = _sizes(cov)
    memory, ds = scratch(cov, count, d, ADJOINT_SCRATCH), torch.empty_like(cov)
    _inverse_sqrt_adjoint[(memory.shape[0],)](
        cov, grad, ds, memory, samples, count, d, eps, iterations, MATRICES=ADJOINT_SCRATCH, **constants(d)
    )
    return ds


def scratch(like: Tensor, count: int, d: int, matrices: int = SCRATCH) -> Tensor:
    """Memory for the programs that work on `count` matrices, each on one after the other."""
    height = tile_height(d)
    return like.new_empty((min(count, _PROGRAMS), matrices, height, height), dtype=torch.float32)


def _sizes(cov: Tensor) -> tuple[int, int]:
    d = cov.shape[-1]
    return cov.numel() // (d * d), d


def constants(d: int) -> dict[str, Any]:
    """What the iteration is compiled for."""
    height = tile_height(d)
    return {
        "SMALLEST": _SMALLEST,
        "HEIGHT": height,
        "TILE": min(height, _LARGEST_TILE),
        "STEP": min(height, _STEP),
        "PRECISION": _PRECISION,
        "num_warps": 4 if height < _LARGEST_TILE else 8,
        "num_stages": 1,  # the next step's matrices, read ahead, would take more registers than there are
    }


@triton.jit
def _multiply(
    result,
    a,
    b,
    c,
    e,
    d,
    diagonal,
    factor,
    TWO: tl.constexpr,
    HEIGHT: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # result = diagonal I + factor (a b + c e); other threads may read it after a barrier
    i, k = tl.arange(0, TILE), tl.arange(0, STEP)
    for row in range(0, HEIGHT, TILE):
        for column in range(0, HEIGHT, TILE):
            total = tl.zeros((TILE, TILE), tl.float32)
            for step in range(0, HEIGHT, STEP):
                left = (row + i)[:, None] * HEIGHT + (step + k)[None, :]
                right = (step + k)[:, None] * HEIGHT + (column + i)[None, :]
                total = product(tl.load(a + left), tl.load(b + right), total, PRECISION)
                if TWO:
                    total = product(tl.load(c + left), tl.load(e + right), total, PRECISION)
            on_diagonal = ((row + i)[:, None] == (column + i)[None, :]) & (row + i < d)[:, None]
            total = factor * total + tl.where(on_diagonal, diagonal, 0.0)
            tl.store(result + (row + i)[:, None] * HEIGHT + (column + i)[None, :], total)


@triton.jit
def _start(cov, stride, start, z, d, eps, SMALLEST: tl.constexpr, HEIGHT: tl.constexpr, TILE: tl.constexpr):
    # S / t and what a step makes of the identity, Z; returns t. What lies outside of the matrix is 0 in all of them.
    eps = tl.cast(eps, tl.float32)  # torch.compile hands over a float64
    columns = tl.arange(0, HEIGHT)
    t = tl.sum(tl.load(cov + columns * (stride + 1), mask=columns < d, other=0.0), axis=0) + d * eps
    t = tl.where(t < SMALLEST, SMALLEST, t)  # NaN stays NaN
    for row in range(0, HEIGHT, TILE):
        rows = row + tl.arange(0, TILE)
        eye = tl.where((rows[:, None] == columns[None, :]) & (rows < d)[:, None], 1.0, 0.0)
        s = (load_matrix(cov, rows, columns, d, stride, 1) + eps * eye) / t
        place = rows[:, None] * HEIGHT + columns[None, :]
        tl.store(start + place, s)
        tl.store(z + place, 1.5 * eye - 0.5 * s)
    return t


@triton.jit
def newton(
    cov,
    stride,
    scratch,
    d,
    eps,
    iterations,
    SMALLEST: tl.constexpr,
    HEIGHT: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # W of the matrix at cov, whose rows are `stride` numbers apart
    d, iterations = narrow(d), narrow(iterations)
    SIZE: tl.constexpr = HEIGHT * HEIGHT
    y, z, e, y_next, z_next = scratch, scratch + SIZE, scratch + 2 * SIZE, scratch + 3 * SIZE, scratch + 4 * SIZE
    # the first Z Y is Y, and the first E Z is E; the last Y E isn't needed
    t = _start(cov, stride, y, z, d, eps, SMALLEST, HEIGHT, TILE)
    tl.debug_barrier()
    if iterations > 1:
        _multiply(y_next, y, z, y, z, d, 0.0, 1.0, False, HEIGHT, TILE, STEP, PRECISION)
        tl.debug_barrier()
        y, y_next = y_next, y
    for k in range(1, iterations):
        _multiply(e, z, y, z, y, d, 1.5, -0.5, False, HEIGHT, TILE, STEP, PRECISION)
        tl.debug_barrier()
        _multiply(z_next, e, z, e, z, d, 0.0, 1.0, False, HEIGHT, TILE, STEP, PRECISION)
        if k < iterations - 1:
            _multiply(y_next, y, e, y, e, d, 0.0, 1.0, False, HEIGHT, TILE, STEP, PRECISION)
        tl.debug_barrier()
        y, y_next = y_next, y
        z, z_next = z_next, z
    rows = tl.arange(0, HEIGHT)
    return tl.load(z + rows[:, None] * HEIGHT + rows[None, :]) / tl.sqrt_rn(t)


@triton.jit
def _inverse_sqrt(
    cov,
    w,
    scratch,
    count,
    d,
    eps,
    iterations,
    MATRICES: tl.constexpr,
    SMALLEST: tl.constexpr,
    HEIGHT: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scratch += tl.program_id(0) * MATRICES * HEIGHT * HEIGHT
    for matrix in range(tl.program_id(0), count, tl.num_programs(0)):
        place = tl.cast(matrix, tl.int64) * d * d
        result = newton(cov + place, d, scratch, d, eps, iterations, SMALLEST, HEIGHT, TILE, STEP, PRECISION)
        store_matrix(w + place, result, tl.arange(0, HEIGHT), d)
        tl.debug_barrier()


@triton.jit
def newton_adjoint(
    cov,
    stride,
    grad,
    grad_stride,
    ds,
    ds_stride,
    scratch,
    samples,
    d,
    eps,
    iterations,
    SMALLEST: tl.constexpr,
    HEIGHT: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # (dS + dS') / samples, from the gradient of W, to the matrix at ds
    d, iterations = narrow(d), narrow(iterations)
    SIZE: tl.constexpr = HEIGHT * HEIGHT
    start = scratch
    direction, e, de = start + SIZE, start + 2 * SIZE, start + 3 * SIZE
    z, z_next, dz, dz_next = start + 4 * SIZE, start + 5 * SIZE, start + 6 * SIZE, start + 7 * SIZE
    y, y_next, dy, dy_next = start + 8 * SIZE, start + 9 * SIZE, start + 10 * SIZE, start + 11 * SIZE
    columns = tl.arange(0, HEIGHT)
    t = _start(cov, stride, start, z, d, eps, SMALLEST, HEIGHT, TILE)
    for row in range(0, HEIGHT, TILE):
        rows = row + tl.arange(0, TILE)
        g = load_matrix(grad, rows, columns, d, grad_stride, 1)
        g += load_matrix(grad, rows, columns, d, 1, grad_stride)
        tl.store(direction + rows[:, None] * HEIGHT + columns[None, :], 0.5 * g)
        tl.store(dz + rows[:, None] * HEIGHT + columns[None, :], -0.25 * g)
    tl.debug_barrier()
    if iterations > 1:
        _multiply(dy, direction, z, start, dz, d, 0.0, 1.0, True, HEIGHT, TILE, STEP, PRECISION)
        _multiply(y, start, z, start, z, d, 0.0, 1.0, False, HEIGHT, TILE, STEP, PRECISION)
        tl.debug_barrier()
    for k in range(1, iterations):
        _multiply(e, z, y, z, y, d, 1.5, -0.5, False, HEIGHT, TILE, STEP, PRECISION)
        _multiply(de, dz, y, z, dy, d, 0.0, -0.5, True, HEIGHT, TILE, STEP, PRECISION)
        tl.debug_barrier()
        _multiply(dz_next, de, z, e, dz, d, 0.0, 1.0, True, HEIGHT, TILE, STEP, PRECISION)
        _multiply(z_next, e, z, e, z, d, 0.0, 1.0, False, HEIGHT, TILE, STEP, PRECISION)
        if k < iterations - 1:
            _multiply(dy_next, dy, e, y, de, d, 0.0, 1.0, True, HEIGHT, TILE, STEP, PRECISION)
            _multiply(y_next, y, e, y, e, d, 0.0, 1.0, False, HEIGHT, TILE, STEP, PRECISION)
        tl.debug_barrier()
        y, y_next = y_next, y
        z, z_next = z_next, z
        dy, dy_next = dy_next, dy
        dz, dz_next = dz_next, dz
    along_scale = 0.0
    for row in range(0, HEIGHT, TILE):
        offsets = (row + tl.arange(0, TILE))[:, None] * HEIGHT + columns[None, :]
        terms = tl.load(dz + offsets) * tl.load(start + offsets) + 0.5 * tl.load(direction + offsets) * tl.load(
            z + offsets
        )
        along_scale += tl.sum(tl.sum(terms, axis=1), axis=0)
    for row in range(0, HEIGHT, TILE):
        rows = row + tl.arange(0, TILE)
        eye = tl.where(rows[:, None] == columns[None, :], 1.0, 0.0)
        along = tl.load(dz + rows[:, None] * HEIGHT + columns[None, :])
        along += tl.load(dz + columns[None, :] * HEIGHT + rows[:, None])
        result = (along - 2.0 * along_scale * eye) / samples / t / tl.sqrt_rn(t)
        inside = (rows < d)[:, None] & (columns < d)[None, :]
        tl.store(ds + rows[:, None] * ds_stride + columns[None, :], result, mask=inside)


@triton.jit
def _inverse_sqrt_adjoint(
    cov,
    grad,
    ds,
    scratch,
    samples,
    count,
    d,
    eps,
    iterations,
    MATRICES: tl.constexpr,
    SMALLEST: tl.constexpr,
    HEIGHT: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scratch += tl.program_id(0) * MATRICES * HEIGHT * HEIGHT
    for matrix in range(tl.program_id(0), count, tl.num_programs(0)):
        place = tl.cast(matrix, tl.int64) * d * d
        newton_adjoint(
            cov + place,
            d,
            grad + place,
            d,
            ds + place,
            d,
            scratch,
            samples,
            d,
            eps,
            iterations,
            SMALLEST,
            HEIGHT,
            TILE,
            STEP,
            PRECISION,
        )
        tl.debug_barrier()
