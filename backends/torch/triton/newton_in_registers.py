"""Newton's iteration and its adjoint, in a program that keeps matrices of up to 64 variables in its registers.

The recurrences are those of `polywhiten.solvers.newton`, with r = R / 3.
"""

import triton
import triton.language as tl

from polywhiten.torch.triton.addressing import load_matrix, narrow
from polywhiten.torch.triton.tf32 import multiply_add

REGISTER_ADJOINT_MATRICES = 2  # matrices of the adjoint that registers have no room for


@triton.jit
def _identity(d, HEIGHT: tl.constexpr):
    rows = tl.arange(0, HEIGHT)
    return tl.where((rows[:, None] == rows[None, :]) & (rows < d)[:, None], 1.0, 0.0)


@triton.jit
def _scale_by_trace(cov, d, eps, SMALLEST: tl.constexpr, HEIGHT: tl.constexpr):
    # Return (cov + eps I) / t and its trace t; both matrices are 0 outside of d rows and columns.
    s = cov + eps * _identity(d, HEIGHT)
    t = tl.sum(tl.sum(s * _identity(d, HEIGHT), axis=1), axis=0)
    t = tl.where(t < SMALLEST, SMALLEST, t)  # NaN stays NaN
    return s / t, t


@triton.jit
def _register_product(a, b, HEIGHT: tl.constexpr, PRECISION: tl.constexpr):
    return multiply_add(a, b, tl.zeros((HEIGHT, HEIGHT), tl.float32), PRECISION)


@triton.jit
def _next_r(r, HEIGHT: tl.constexpr, PRECISION: tl.constexpr):
    v = r - _register_product(r, r, HEIGHT, PRECISION)
    return 2.25 * (v - _register_product(v, r, HEIGHT, PRECISION))


@triton.jit
def newton_in_registers(cov, d, eps, iterations, SMALLEST: tl.constexpr, HEIGHT: tl.constexpr, PRECISION: tl.constexpr):
    # Return (cov + eps I)^(-1/2) of a matrix that is 0 outside of its first d rows and columns.
    d, iterations = narrow(d), narrow(iterations)
    s, t = _scale_by_trace(cov, d, eps, SMALLEST, HEIGHT)
    r = s / 3
    z = 1.5 * (_identity(d, HEIGHT) - r)
    for _ in range(1, iterations):
        r = _next_r(r, HEIGHT, PRECISION)
        z = 1.5 * (z - _register_product(z, r, HEIGHT, PRECISION))
    return z / tl.sqrt_rn(t)


@triton.jit
def adjoint_in_registers(
    cov, stride, grad, workspace, d, eps, iterations,
    SMALLEST: tl.constexpr, HEIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Return the symmetric gradient of the matrix at cov, where `grad` is that of W. Registers have room for r and its
    # derivative dr with what a step makes of them. z and dz stay in the workspace.
    d, iterations = narrow(d), narrow(iterations)
    rows = tl.arange(0, HEIGHT)
    z_pointers = workspace + rows[:, None] * HEIGHT + rows[None, :]
    dz_pointers = z_pointers + HEIGHT * HEIGHT
    s, t = _scale_by_trace(_load_cov(cov, stride, d, HEIGHT), d, eps, SMALLEST, HEIGHT)
    r, dr = s / 3, _load_symmetric_part(grad, HEIGHT) / 3
    tl.store(z_pointers, 1.5 * (_identity(d, HEIGHT) - r))
    tl.store(dz_pointers, -1.5 * dr)
    for _ in range(1, iterations):
        p = _register_product(dr, r, HEIGHT, PRECISION)
        p = dr - p - (p + tl.trans(p))
        p = 1.125 * (p - _register_product(p, r, HEIGHT, PRECISION))
        dr = p + tl.trans(p)
        r = _next_r(r, HEIGHT, PRECISION)
        tl.debug_barrier()  # threads load what others have stored, here and below
        z = tl.load(z_pointers)
        tl.debug_barrier()
        z_dr = _register_product(z, dr, HEIGHT, PRECISION)
        tl.store(z_pointers, 1.5 * (z - _register_product(z, r, HEIGHT, PRECISION)))
        dz = tl.load(dz_pointers)
        tl.debug_barrier()
        tl.store(dz_pointers, 1.5 * (dz - multiply_add(dz, r, z_dr, PRECISION)))
    tl.debug_barrier()
    z, dz = tl.load(z_pointers), tl.load(dz_pointers)
    s, _ = _scale_by_trace(_load_cov(cov, stride, d, HEIGHT), d, eps, SMALLEST, HEIGHT)
    along_scale = tl.sum(tl.sum(dz * s + 0.5 * _load_symmetric_part(grad, HEIGHT) * z, axis=1), axis=0)
    result = 0.5 * (dz + tl.trans(dz)) - along_scale * _identity(d, HEIGHT)
    return result / t / tl.sqrt_rn(t)


@triton.jit
def _load_cov(cov, stride, d, HEIGHT: tl.constexpr):
    rows = tl.arange(0, HEIGHT)
    return load_matrix((cov, stride, 1), rows, rows, d)


@triton.jit
def _load_symmetric_part(grad, HEIGHT: tl.constexpr):
    rows = tl.arange(0, HEIGHT)
    direct = tl.load(grad + rows[:, None] * HEIGHT + rows[None, :])
    return 0.5 * (direct + tl.load(grad + rows[None, :] * HEIGHT + rows[:, None]))
