"""Newton's iteration and its adjoint, in a program that keeps matrices of up to 64 variables in its registers.

The recurrence is that of `polywhiten.solvers.newton`, with r = R / 3. All of its matrices are symmetric and commute.
The adjoint goes backwards through the steps, whose r and Z are kept in memory: a step of it takes four products, where
a derivative forwards takes seven. Matrices that multiply from the right are split for tensor cores once per step.
"""

import triton
import triton.language as tl

from polywhiten.torch.triton.addressing import load_matrix, narrow
from polywhiten.torch.triton.tf32 import multiply_split, multiply_symmetric, split


def num_iterates(iterations: int) -> int:
    """Return how many matrices `store_iterates` stores: r and Z of every step."""
    return 2 * iterations


@triton.jit
def _identity(d, HEIGHT: tl.constexpr):
    rows = tl.arange(0, HEIGHT)
    return tl.where((rows[:, None] == rows[None, :]) & (rows < d)[:, None], 1.0, 0.0)


@triton.jit
def _offsets(HEIGHT: tl.constexpr):
    rows = tl.arange(0, HEIGHT)
    return rows[:, None] * HEIGHT + rows[None, :]


@triton.jit
def _scale_by_trace(cov, d, eps, SMALLEST: tl.constexpr, HEIGHT: tl.constexpr):
    # Return (cov + eps I) / t and its trace t; both matrices are 0 outside of d rows and columns.
    s = cov + eps * _identity(d, HEIGHT)
    t = tl.sum(tl.sum(s * _identity(d, HEIGHT), axis=1), axis=0)
    t = tl.where(t < SMALLEST, tl.where(t <= 0.0, float("inf"), SMALLEST), t)  # NaN stays NaN
    return s / t, t


@triton.jit
def _next_r(r, high, low, step, HEIGHT: tl.constexpr):
    # Return 9/4 r (1 - r)^2 of r = high + low. Products read a right matrix as its transpose, from which rounding makes
    # it differ. So the matrices don't quite commute, and steps multiply the error: by the 12th, it is a hundred times
    # that of symmetric matrices where the data have few dimensions. So every fifth r is made symmetric.
    UPDATES_UNTIL_SYMMETRIC: tl.constexpr = 5
    v = r - multiply_split(high, low, high, low, HEIGHT)
    r = 2.25 * (v - multiply_symmetric(v, high, low, HEIGHT))
    if step % UPDATES_UNTIL_SYMMETRIC == 0:
        r = 0.5 * (r + tl.trans(r))
    return r


@triton.jit
def newton_in_registers(cov, d, eps, iterations, SMALLEST: tl.constexpr, HEIGHT: tl.constexpr):
    # Return (cov + eps I)^(-1/2) of a matrix that is 0 outside of its first d rows and columns.
    d, iterations = narrow(d), narrow(iterations)
    s, t = _scale_by_trace(cov, d, eps, SMALLEST, HEIGHT)
    r = s / 3
    z = 1.5 * (_identity(d, HEIGHT) - r)
    high, low = split(r)
    for step in range(1, iterations):
        r = _next_r(r, high, low, step, HEIGHT)
        high, low = split(r)
        z = 1.5 * (z - multiply_symmetric(z, high, low, HEIGHT))
    return z / tl.sqrt_rn(t)


@triton.jit
def store_iterates(cov, stride, iterates, d, eps, iterations, SMALLEST: tl.constexpr, HEIGHT: tl.constexpr):
    # Store r and then the new Z of every step. Registers have no room for both, so Z is loaded again.
    d, iterations = narrow(d), narrow(iterations)
    SIZE: tl.constexpr = HEIGHT * HEIGHT
    pointers = iterates + _offsets(HEIGHT)
    s, _ = _scale_by_trace(load_square(cov, stride, d, HEIGHT), d, eps, SMALLEST, HEIGHT)
    r = s / 3
    tl.store(pointers, r)
    tl.store(pointers + SIZE, 1.5 * (_identity(d, HEIGHT) - r))
    high, low = split(r)
    for step in tl.range(1, iterations, num_stages=1):  # prefetching takes registers and shared memory
        r = _next_r(r, high, low, step, HEIGHT)
        tl.store(pointers + 2 * SIZE, r)
        high, low = split(r)
        tl.debug_barrier()
        z = tl.load(pointers + SIZE)
        tl.store(pointers + 3 * SIZE, 1.5 * (z - multiply_symmetric(z, high, low, HEIGHT)))
        pointers += 2 * SIZE


@triton.jit
def _step_adjoint(dr, pointers, HEIGHT: tl.constexpr):
    # Return half of 9/4 (dr - 2 (r dr + dr r) + r r dr + r dr r + dr r r), which is a sum with its own transpose.
    high, low = split(tl.load(pointers))
    p = multiply_symmetric(dr, high, low, HEIGHT)
    p = dr - p - (p + tl.trans(p))
    return 1.125 * (p - multiply_symmetric(p, high, low, HEIGHT))


@triton.jit
def adjoint_from_iterates(
    cov, stride, grad, iterates, d, eps, iterations, SMALLEST: tl.constexpr, HEIGHT: tl.constexpr
):
    # Return the symmetric gradient of the matrix at cov, where `grad`, a whole tile, is that of its whitener.
    # `store_iterates` has stored the iterates, and a barrier has passed. dr and dz are the gradients of a step's r and
    # Z. Registers have no room for both, so dz overwrites `grad`.
    d, iterations = narrow(d), narrow(iterations)
    SIZE: tl.constexpr = HEIGHT * HEIGHT
    pointers = iterates + _offsets(HEIGHT) + 2 * (iterations - 1) * SIZE
    dz_pointers = grad + _offsets(HEIGHT)
    dz = _load_symmetric_part(grad, HEIGHT)
    along_scale = 0.5 * tl.sum(tl.sum(dz * tl.load(pointers + SIZE), axis=1), axis=0)
    tl.debug_barrier()  # before others overwrite what a thread loads, or load what it has stored, here and below
    tl.store(dz_pointers, dz)
    dr = tl.zeros((HEIGHT, HEIGHT), tl.float32)
    for _ in tl.range(1, iterations, num_stages=1):
        half_dr = _step_adjoint(dr, pointers, HEIGHT)
        tl.debug_barrier()
        dz = tl.load(dz_pointers)
        dz_high, dz_low = split(dz)
        high, low = split(tl.load(pointers - SIZE))
        half_dr -= 0.75 * multiply_split(dz_high, dz_low, high, low, HEIGHT)
        dr = half_dr + tl.trans(half_dr)
        high, low = split(tl.load(pointers))
        p = multiply_split(dz_high, dz_low, high, low, HEIGHT)
        tl.debug_barrier()
        tl.store(dz_pointers, 1.5 * dz - 0.75 * (p + tl.trans(p)))
        pointers -= 2 * SIZE
    half_dr = _step_adjoint(dr, pointers, HEIGHT)
    tl.debug_barrier()
    half_dr -= 0.75 * tl.load(dz_pointers)
    ds = (half_dr + tl.trans(half_dr)) / 3
    s, t = _scale_by_trace(load_square(cov, stride, d, HEIGHT), d, eps, SMALLEST, HEIGHT)
    along_scale += tl.sum(tl.sum(ds * s, axis=1), axis=0)
    return (ds - along_scale * _identity(d, HEIGHT)) / t / tl.sqrt_rn(t)


@triton.jit
def load_square(matrix, stride, d, HEIGHT: tl.constexpr):
    # Return a (d, d) matrix in a tile; 0 outside.
    rows = tl.arange(0, HEIGHT)
    return load_matrix((matrix, stride, 1), rows, rows, d)


@triton.jit
def _load_symmetric_part(grad, HEIGHT: tl.constexpr):
    rows = tl.arange(0, HEIGHT)
    direct = tl.load(grad + rows[:, None] * HEIGHT + rows[None, :])
    return 0.5 * (direct + tl.load(grad + rows[None, :] * HEIGHT + rows[:, None]))
