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

from polywhiten.torch.fused.tiles import load_matrix, product, store_matrix, tile_height

_LARGEST_TILE = 64  # rows and columns of a product that are computed at a time
_STEP = 32  # columns of its left matrix that are read at a time
SCRATCH = 5  # matrices that the iteration works in
_PRECISION = "tf32x3"  # so few operations that less than float32 would gain nothing
_SMALLEST = torch.finfo(torch.float32).smallest_normal


def inverse_sqrt(cov: Tensor, eps: float, iterations: int) -> Tensor:
    """As `polywhiten.kernels.Kernels.inverse_sqrt` with the solver `Newton(iterations)`."""
    return _solve(_inverse_sqrt, SCRATCH, cov, (), eps, iterations)


def inverse_sqrt_adjoint(cov: Tensor, grad: Tensor, eps: float, iterations: int) -> Tensor:
    """As `polywhiten.kernels.Kernels.inverse_sqrt_adjoint` with the solver `Newton(iterations)`."""
    return _solve(_inverse_sqrt_adjoint, 11, cov, (grad.contiguous(),), eps, iterations)


def _solve(
    kernel: triton.JITFunction, matrices: int, cov: Tensor, given: tuple[Tensor, ...], eps: float, iterations: int
) -> Tensor:
    cov = cov.contiguous()
    d = cov.shape[-1]
    programs, height = cov.numel() // (d * d), tile_height(d)
    scratch = cov.new_empty((programs, matrices, height, height))
    result = torch.empty_like(cov)
    kernel[(programs,)](cov, *given, result, scratch, d, eps, iterations, **constants(height))
    return result


def constants(height: int) -> dict[str, Any]:
    """What the iteration is compiled for."""
    return {
        "SMALLEST": _SMALLEST,
        "HEIGHT": height,
        "TILE": min(height, _LARGEST_TILE),
        "STEP": min(height, _STEP),
        "PRECISION": _PRECISION,
        "num_warps": 4 if height < _LARGEST_TILE else 8,
    }


@triton.jit
def _square(HEIGHT: tl.constexpr):
    rows = tl.arange(0, HEIGHT)
    return rows[:, None] * HEIGHT + rows[None, :]


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
    # result = diagonal I + factor (a b + c e), for all threads of the program to read
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
    tl.debug_barrier()


@triton.jit
def _scaled(cov, d, eps, SMALLEST: tl.constexpr, HEIGHT: tl.constexpr):
    # S / t, t, and Z after a step; what lies outside of the matrix is 0 in all of them
    rows = tl.arange(0, HEIGHT)
    inside = (rows < d)[:, None] & (rows < d)[None, :]
    eye = tl.where((rows[:, None] == rows[None, :]) & inside, 1.0, 0.0)
    t = tl.sum(tl.load(cov + rows * (d + 1), mask=rows < d, other=0.0), axis=0) + d * eps
    t = tl.where(t < SMALLEST, SMALLEST, t)  # NaN stays NaN
    s = (load_matrix(cov, rows, rows, d) + eps * eye) / t
    return s, t, 1.5 * eye - 0.5 * s


@triton.jit
def newton(
    cov,
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
    # W of the matrix at cov, with 5 matrices of scratch
    SIZE: tl.constexpr = HEIGHT * HEIGHT
    square = _square(HEIGHT)
    y, z, e, y_next, z_next = scratch, scratch + SIZE, scratch + 2 * SIZE, scratch + 3 * SIZE, scratch + 4 * SIZE
    s, t, first = _scaled(cov, d, eps, SMALLEST, HEIGHT)
    # the first Z Y is Y, and the first E Z is E; the last Y E isn't needed
    tl.store(y + square, s)
    tl.store(z + square, first)
    tl.debug_barrier()
    if iterations > 1:
        _multiply(y_next, y, z, y, z, d, 0.0, 1.0, False, HEIGHT, TILE, STEP, PRECISION)
        y, y_next = y_next, y
    for k in range(1, iterations):
        _multiply(e, z, y, z, y, d, 1.5, -0.5, False, HEIGHT, TILE, STEP, PRECISION)
        _multiply(z_next, e, z, e, z, d, 0.0, 1.0, False, HEIGHT, TILE, STEP, PRECISION)
        if k < iterations - 1:
            _multiply(y_next, y, e, y, e, d, 0.0, 1.0, False, HEIGHT, TILE, STEP, PRECISION)
        y, y_next = y_next, y
        z, z_next = z_next, z
    return tl.load(z + square) / tl.sqrt_rn(t)


@triton.jit
def _inverse_sqrt(
    cov,
    w,
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
    program = tl.program_id(0)
    scratch += program * 5 * HEIGHT * HEIGHT
    result = newton(cov + program * d * d, scratch, d, eps, iterations, SMALLEST, HEIGHT, TILE, STEP, PRECISION)
    store_matrix(w + program * d * d, result, tl.arange(0, HEIGHT), d)


@triton.jit
def _inverse_sqrt_adjoint(
    cov,
    grad,
    ds,
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
    program = tl.program_id(0)
    SIZE: tl.constexpr = HEIGHT * HEIGHT
    square = _square(HEIGHT)
    y = scratch + program * 11 * SIZE
    z, e, y_next, z_next = y + SIZE, y + 2 * SIZE, y + 3 * SIZE, y + 4 * SIZE
    dy, dz, de, dy_next, dz_next = y + 5 * SIZE, y + 6 * SIZE, y + 7 * SIZE, y + 8 * SIZE, y + 9 * SIZE
    direction = y + 10 * SIZE
    rows = tl.arange(0, HEIGHT)
    place = program * d * d
    s, t, first = _scaled(cov + place, d, eps, SMALLEST, HEIGHT)
    g = load_matrix(grad + place, rows, rows, d)
    g = 0.5 * (g + tl.trans(g))
    tl.store(y + square, s)
    tl.store(z + square, first)
    tl.store(dy + square, g)
    tl.store(direction + square, g)
    tl.store(dz + square, -0.5 * g)
    tl.debug_barrier()
    if iterations > 1:
        _multiply(dy_next, dy, z, y, dz, d, 0.0, 1.0, True, HEIGHT, TILE, STEP, PRECISION)
        _multiply(y_next, y, z, y, z, d, 0.0, 1.0, False, HEIGHT, TILE, STEP, PRECISION)
        y, y_next = y_next, y
        dy, dy_next = dy_next, dy
    for k in range(1, iterations):
        _multiply(e, z, y, z, y, d, 1.5, -0.5, False, HEIGHT, TILE, STEP, PRECISION)
        _multiply(de, dz, y, z, dy, d, 0.0, -0.5, True, HEIGHT, TILE, STEP, PRECISION)
        _multiply(dz_next, de, z, e, dz, d, 0.0, 1.0, True, HEIGHT, TILE, STEP, PRECISION)
        _multiply(z_next, e, z, e, z, d, 0.0, 1.0, False, HEIGHT, TILE, STEP, PRECISION)
        if k < iterations - 1:
            _multiply(dy_next, dy, e, y, de, d, 0.0, 1.0, True, HEIGHT, TILE, STEP, PRECISION)
            _multiply(y_next, y, e, y, e, d, 0.0, 1.0, False, HEIGHT, TILE, STEP, PRECISION)
        y, y_next = y_next, y
        z, z_next = z_next, z
        dy, dy_next = dy_next, dy
        dz, dz_next = dz_next, dz
    along = tl.load(dz + square)
    s, t, first = _scaled(cov + place, d, eps, SMALLEST, HEIGHT)
    along_scale = tl.sum(tl.sum(along * s, axis=1), axis=0)
    along_scale += 0.5 * tl.sum(tl.sum(tl.load(direction + square) * tl.load(z + square), axis=1), axis=0)
    eye = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
    result = (along - along_scale * eye) / t / tl.sqrt_rn(t)
    store_matrix(ds + place, result, rows, d)
