"""Newton's iteration and its adjoint, in a program that keeps its matrices in global memory.

There they stay in the cache of the program's processor. Registers have no room for the matrices of 64 variables, nor
has shared memory for those of 128. A step is Z <- E Z and Y <- Y E with E = (3 I - Z Y) / 2, from Y = S / t and Z = I,
where t is the trace of S (N. J. Higham, Functions of Matrices, 2008, eq. 6.35). In exact arithmetic Z is the same as by
the recurrence of `polywhiten.solvers.newton`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from polywhiten.torch.triton.addressing import load_matrix, narrow
from polywhiten.torch.triton.tf32 import multiply_add
from polywhiten.torch.triton.tiles import tile_height

NEWTON_MATRICES = 5  # in the workspace of a program
ADJOINT_MATRICES = 12
_MAX_TILE = 64  # rows and columns of a product that are computed at a time
_MAX_STEP = 32  # columns of the left matrix that are read at a time
MAX_PROGRAMS = 256  # a large GPU runs about half of them at a time
_PRECISION = "tf32x3"  # TF32 would gain nothing: these are few operations
_SMALLEST = torch.finfo(torch.float32).smallest_normal


def allocate_workspace(like: Tensor, count: int, d: int, matrices: int) -> Tensor:
    """Return memory (programs, matrices, height, height) for the programs that share `count` blocks."""
    height = tile_height(d)
    return like.new_empty((min(count, MAX_PROGRAMS), matrices, height, height), dtype=torch.float32)


def newton_constants(d: int) -> dict[str, Any]:
    """Return the constants and the options that the iteration of d variables is compiled for."""
    height = tile_height(d)
    return {
        "SMALLEST": _SMALLEST,
        "HEIGHT": height,
        "TILE": min(height, _MAX_TILE),
        "STEP": min(height, _MAX_STEP),
        "PRECISION": _PRECISION,
        "num_warps": 4 if height < _MAX_TILE else 8,
        "num_stages": 1,  # prefetching the matrices of the next step would take more registers than there are
    }


@triton.jit
def _multiply(
    result, a, b, second, d, diagonal, factor,
    HEIGHT: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Store diagonal I + factor (a b + c e), where `second` is (c, e) or None. Needs a barrier before others read it.
    i, k = tl.arange(0, TILE), tl.arange(0, STEP)
    for row in range(0, HEIGHT, TILE):
        for column in range(0, HEIGHT, TILE):
            total = tl.zeros((TILE, TILE), tl.float32)
            for step in range(0, HEIGHT, STEP):
                left = (row + i)[:, None] * HEIGHT + (step + k)[None, :]
                right = (step + k)[:, None] * HEIGHT + (column + i)[None, :]
                total = multiply_add(tl.load(a + left), tl.load(b + right), total, PRECISION)
                if second is not None:
                    total = multiply_add(tl.load(second[0] + left), tl.load(second[1] + right), total, PRECISION)
            on_diagonal = ((row + i)[:, None] == (column + i)[None, :]) & (row + i < d)[:, None]
            total = factor * total + tl.where(on_diagonal, diagonal, 0.0)
            tl.store(result + (row + i)[:, None] * HEIGHT + (column + i)[None, :], total)


@triton.jit
def _start(cov, stride, y, z, d, eps, SMALLEST: tl.constexpr, HEIGHT: tl.constexpr, TILE: tl.constexpr):
    # Store the first Y, which is S / t, and the Z after one step. Both are 0 outside of the matrix. Return t.
    eps = tl.cast(eps, tl.float32)  # torch.compile passes a float64
    columns = tl.arange(0, HEIGHT)
    t = tl.sum(tl.load(cov + columns * (stride + 1), mask=columns < d, other=0.0), axis=0) + d * eps
    t = tl.where(t < SMALLEST, tl.where(t <= 0.0, float("inf"), SMALLEST), t)  # NaN stays NaN
    for row in range(0, HEIGHT, TILE):
        rows = row + tl.arange(0, TILE)
        eye = tl.where((rows[:, None] == columns[None, :]) & (rows < d)[:, None], 1.0, 0.0)
        s = (load_matrix((cov, stride, 1), rows, columns, d) + eps * eye) / t
        offsets = rows[:, None] * HEIGHT + columns[None, :]
        tl.store(y + offsets, s)
        tl.store(z + offsets, 1.5 * eye - 0.5 * s)
    return t


@triton.jit
def newton(
    cov, stride, workspace, d, eps, iterations,
    SMALLEST: tl.constexpr, HEIGHT: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Return (cov + eps I)^(-1/2) of a matrix whose rows are `stride` elements apart.
    d, iterations = narrow(d), narrow(iterations)
    SIZE: tl.constexpr = HEIGHT * HEIGHT
    y, z, e = workspace, workspace + SIZE, workspace + 2 * SIZE
    y_next, z_next = workspace + 3 * SIZE, workspace + 4 * SIZE
    t = _start(cov, stride, y, z, d, eps, SMALLEST, HEIGHT, TILE)
    tl.debug_barrier()
    if iterations > 1:  # the first E is the Z that is stored
        _multiply(y_next, y, z, None, d, 0.0, 1.0, HEIGHT, TILE, STEP, PRECISION)
        tl.debug_barrier()
        y, y_next = y_next, y
    for k in range(1, iterations):
        _multiply(e, z, y, None, d, 1.5, -0.5, HEIGHT, TILE, STEP, PRECISION)
        tl.debug_barrier()
        _multiply(z_next, e, z, None, d, 0.0, 1.0, HEIGHT, TILE, STEP, PRECISION)
        if k < iterations - 1:
            _multiply(y_next, y, e, None, d, 0.0, 1.0, HEIGHT, TILE, STEP, PRECISION)
        tl.debug_barrier()
        y, y_next = y_next, y
        z, z_next = z_next, z
    rows = tl.arange(0, HEIGHT)
    return tl.load(z + rows[:, None] * HEIGHT + rows[None, :]) / tl.sqrt_rn(t)


@triton.jit
def _start_adjoint(grad, stride, direction, dz, d, HEIGHT: tl.constexpr, TILE: tl.constexpr):
    # Store the symmetric part of the gradient of W, along which the iteration is differentiated, and the first dZ.
    columns = tl.arange(0, HEIGHT)
    for row in range(0, HEIGHT, TILE):
        rows = row + tl.arange(0, TILE)
        g = load_matrix((grad, stride, 1), rows, columns, d)
        g += load_matrix((grad, 1, stride), rows, columns, d)
        tl.store(direction + rows[:, None] * HEIGHT + columns[None, :], 0.5 * g)
        tl.store(dz + rows[:, None] * HEIGHT + columns[None, :], -0.25 * g)


@triton.jit
def _finish_adjoint(
    result, stride, y0, direction, z, dz, t, samples, d, HEIGHT: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    # Store (dS + dS') / samples from the last Z and dZ, with the gradient that comes through the scale t.
    columns = tl.arange(0, HEIGHT)
    along_scale = 0.0
    for row in range(0, HEIGHT, TILE):
        offsets = (row + tl.arange(0, TILE))[:, None] * HEIGHT + columns[None, :]
        terms = tl.load(dz + offsets) * tl.load(y0 + offsets)
        terms += 0.5 * tl.load(direction + offsets) * tl.load(z + offsets)
        along_scale += tl.sum(tl.sum(terms, axis=1), axis=0)
    for row in range(0, HEIGHT, TILE):
        rows = row + tl.arange(0, TILE)
        eye = tl.where(rows[:, None] == columns[None, :], 1.0, 0.0)
        along = tl.load(dz + rows[:, None] * HEIGHT + columns[None, :])
        along += tl.load(dz + columns[None, :] * HEIGHT + rows[:, None])
        values = (along - 2.0 * along_scale * eye) / samples / t / tl.sqrt_rn(t)
        inside = (rows < d)[:, None] & (columns < d)[None, :]
        tl.store(result + rows[:, None] * stride + columns[None, :], values, mask=inside)


@triton.jit
def newton_adjoint(
    cov, stride, grad, grad_stride, result, result_stride, workspace, samples, d, eps, iterations,
    SMALLEST: tl.constexpr, HEIGHT: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Store (dS + dS') / samples, where dS is the gradient of cov and `grad` that of W.
    d, iterations = narrow(d), narrow(iterations)
    SIZE: tl.constexpr = HEIGHT * HEIGHT
    y0, direction, e, de = workspace, workspace + SIZE, workspace + 2 * SIZE, workspace + 3 * SIZE
    z, z_next, dz, dz_next = workspace + 4 * SIZE, workspace + 5 * SIZE, workspace + 6 * SIZE, workspace + 7 * SIZE
    y, y_next, dy, dy_next = workspace + 8 * SIZE, workspace + 9 * SIZE, workspace + 10 * SIZE, workspace + 11 * SIZE
    t = _start(cov, stride, y0, z, d, eps, SMALLEST, HEIGHT, TILE)
    _start_adjoint(grad, grad_stride, direction, dz, d, HEIGHT, TILE)
    tl.debug_barrier()
    if iterations > 1:
        _multiply(dy, direction, z, (y0, dz), d, 0.0, 1.0, HEIGHT, TILE, STEP, PRECISION)
        _multiply(y, y0, z, None, d, 0.0, 1.0, HEIGHT, TILE, STEP, PRECISION)
        tl.debug_barrier()
    for k in range(1, iterations):
        _multiply(e, z, y, None, d, 1.5, -0.5, HEIGHT, TILE, STEP, PRECISION)
        _multiply(de, dz, y, (z, dy), d, 0.0, -0.5, HEIGHT, TILE, STEP, PRECISION)
        tl.debug_barrier()
        _multiply(dz_next, de, z, (e, dz), d, 0.0, 1.0, HEIGHT, TILE, STEP, PRECISION)
        _multiply(z_next, e, z, None, d, 0.0, 1.0, HEIGHT, TILE, STEP, PRECISION)
        if k < iterations - 1:
            _multiply(dy_next, dy, e, (y, de), d, 0.0, 1.0, HEIGHT, TILE, STEP, PRECISION)
            _multiply(y_next, y, e, None, d, 0.0, 1.0, HEIGHT, TILE, STEP, PRECISION)
        tl.debug_barrier()
        y, y_next = y_next, y
        z, z_next = z_next, z
        dy, dy_next = dy_next, dy
        dz, dz_next = dz_next, dz
    _finish_adjoint(result, result_stride, y0, direction, z, dz, t, samples, d, HEIGHT, TILE)
