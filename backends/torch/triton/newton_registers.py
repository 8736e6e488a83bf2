"""Newton's iteration and its adjoint in a program that holds matrices of up to 64 variables in its registers.

The recurrences are those of `polywhiten.solvers.newton`: r is a third of the scaled matrix times Z S Z.
"""

import triton
import triton.language as tl

from polywhiten.torch.triton.tiles import load_matrix, narrow, product

ADJOINT_WAITING = 2  # matrices of the adjoint that wait in memory


@triton.jit
def _identity(size, HEIGHT: tl.constexpr):
    rows = tl.arange(0, HEIGHT)
    return tl.where((rows[:, None] == rows[None, :]) & (rows < size)[:, None], 1.0, 0.0)


@triton.jit
def scaled(cov, size, eps, SMALLEST: tl.constexpr, HEIGHT: tl.constexpr):
    # (cov + eps I) / t, and its trace t; both are 0 outside of the matrix
    s = cov + eps * _identity(size, HEIGHT)
    t = tl.sum(tl.sum(s * _identity(size, HEIGHT), axis=1), axis=0)
    t = tl.where(t < SMALLEST, SMALLEST, t)  # NaN stays NaN
    return s / t, t


@triton.jit
def _multiplied(a, b, HEIGHT: tl.constexpr, PRECISION: tl.constexpr):
    return product(a, b, tl.zeros((HEIGHT, HEIGHT), tl.float32), PRECISION)


@triton.jit
def _next_r(r, HEIGHT: tl.constexpr, PRECISION: tl.constexpr):
    once = r - _multiplied(r, r, HEIGHT, PRECISION)
    return 2.25 * (once - _multiplied(once, r, HEIGHT, PRECISION))


@triton.jit
def newton_in_registers(
    cov, size, eps, iterations, SMALLEST: tl.constexpr, HEIGHT: tl.constexpr, PRECISION: tl.constexpr
):
    # (cov + eps I)^(-1/2) of a matrix that is 0 outside of its first `size` rows and columns
    size, iterations = narrow(size), narrow(iterations)
    s, t = scaled(cov, size, eps, SMALLEST, HEIGHT)
    r = s / 3
    z = 1.5 * (_identity(size, HEIGHT) - r)
    for _ in range(1, iterations):
        r = _next_r(r, HEIGHT, PRECISION)
        z = 1.5 * (z - _multiplied(z, r, HEIGHT, PRECISION))
    return z / tl.sqrt_rn(t)


@triton.jit
def adjoint_in_registers(
    cov,
    stride,
    grad,
    memory,
    size,
    eps,
    iterations,
    SMALLEST: tl.constexpr,
    HEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # the gradient with respect to the matrix at cov of <grad, (cov + eps I)^(-1/2)>, symmetric. Registers have room for
    # r and its derivative dr with what a step makes of them; z and dz wait in memory, for two matrices.
    size, iterations = narrow(size), narrow(iterations)
    rows = tl.arange(0, HEIGHT)
    of_z = memory + rows[:, None] * HEIGHT + rows[None, :]
    of_dz = of_z + HEIGHT * HEIGHT
    s, t = scaled(_load_cov(cov, stride, size, HEIGHT), size, eps, SMALLEST, HEIGHT)
    r, dr = s / 3, _load_symmetric(grad, HEIGHT) / 3
    tl.store(of_z, 1.5 * (_identity(size, HEIGHT) - r))
    tl.store(of_dz, -1.5 * dr)
    for _ in range(1, iterations):
        p = _multiplied(dr, r, HEIGHT, PRECISION)
        p = dr - p - (p + tl.trans(p))
        p = 1.125 * (p - _multiplied(p, r, HEIGHT, PRECISION))
        dr = p + tl.trans(p)
        r = _next_r(r, HEIGHT, PRECISION)
        tl.debug_barrier()  # one thread may load what another one has stored, and the other way round
        z = tl.load(of_z)
        tl.debug_barrier()
        of_dr = _multiplied(z, dr, HEIGHT, PRECISION)
        tl.store(of_z, 1.5 * (z - _multiplied(z, r, HEIGHT, PRECISION)))
        dz = tl.load(of_dz)
        tl.debug_barrier()
        tl.store(of_dz, 1.5 * (dz - product(dz, r, of_dr, PRECISION)))
    tl.debug_barrier()
    z, dz = tl.load(of_z), tl.load(of_dz)
    s, _ = scaled(_load_cov(cov, stride, size, HEIGHT), size, eps, SMALLEST, HEIGHT)
    along_scale = tl.sum(tl.sum(dz * s + 0.5 * _load_symmetric(grad, HEIGHT) * z, axis=1), axis=0)
    result = 0.5 * (dz + tl.trans(dz)) - along_scale * _identity(size, HEIGHT)
    return result / t / tl.sqrt_rn(t)


@triton.jit
def _load_cov(cov, stride, size, HEIGHT: tl.constexpr):
    rows = tl.arange(0, HEIGHT)
    return load_matrix(cov, rows, rows, size, stride, 1)


@triton.jit
def _load_symmetric(grad, HEIGHT: tl.constexpr):
    rows = tl.arange(0, HEIGHT)
    return 0.5 * (
        tl.load(grad + rows[:, None] * HEIGHT + rows[None, :]) + tl.load(grad + rows[None, :] * HEIGHT + rows[:, None])
    )
