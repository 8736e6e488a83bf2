"""Newton's iteration on r = R / 3 and its derivative, see `polywhiten.solvers.newton`, in phases.

What is symmetric is computed above its diagonal, and copied. A phase needs all of the phases before it, and each of its
columns of tiles nothing of the others: several workers can share a matrix, if they begin every phase together.
"""

import numpy as np
from numba import njit

from polywhiten.cpu.device.packing import APART, clear, padded
from polywhiten.cpu.device.simd import (
    UNIT,
    WIDE,
    at,
    get,
    integers,
    is_null,
    number,
    pointer,
    put,
    tile,
    transposed_tile,
)
from polywhiten.cpu.runtime.parallel import real

_MATRICES = 5, 12  # that an iteration works on, and one with its derivative
_STEPS = 3, 5  # phases of either


def inverse_sqrt(numbers, scratch, share):
    """A share of W (blocks, d, d), or of one phase of it.

    Numbers: shares, the phase or -1 for all, blocks, d, iterations, the address of memory for the matrices of all
    blocks or 0, eps, the smallest normal number, the addresses of covariances and of W.
    """
    shares, phase, blocks, d, iterations = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    if phase >= 0:
        for block in range(blocks):
            _value(numbers, at(pointer(numbers[5], scratch), block * memory(d, False)), phase, block, share, shares)
        return
    for block in range(share * blocks // shares, (share + 1) * blocks // shares):
        for each in range(phases(iterations, False)):
            _value(numbers, scratch, each, block, 0, 1)


def inverse_sqrt_adjoint(numbers, scratch, share):
    """A share of the gradients (blocks, d, d) with respect to covariances, or of one phase of them.

    Numbers: as of `inverse_sqrt`, the last addresses being those of covariances, gradients and results, of what rows of
    the gradients are multiplied with or 0, and of W, which is written too, or 0.
    """
    shares, phase, blocks, d, iterations = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    if phase >= 0:
        for block in range(blocks):
            own = at(pointer(numbers[5], scratch), block * memory(d, True))
            _derivative(numbers, own, phase, block, share, shares)
        return
    for block in range(share * blocks // shares, (share + 1) * blocks // shares):
        for each in range(phases(iterations, True)):
            _derivative(numbers, scratch, each, block, 0, 1)


@njit
def phases(iterations, derivative):
    """How many there are: one before the iterations, and one after them."""
    return 2 + _STEPS[1 if derivative else 0] * (iterations - 1)


@njit
def memory(d, derivative):
    """Numbers that a block's matrices take."""
    return _MATRICES[1 if derivative else 0] * padded(d) * (padded(d) + APART) + 2 * UNIT


@njit
def _matrix(own, k, dp):
    """The first numbers are zeros, and then the trace."""
    return at(own, 2 * UNIT + k * dp * (dp + APART))


@njit
def _value(numbers, own, phase, block, share, shares):
    d, iterations, eps, tiny = numbers[3], numbers[4], real(numbers, 6), real(numbers, 7)
    cov, w = at(pointer(numbers[8], own), block * d * d), at(pointer(numbers[9], own), block * d * d)
    dp, last = padded(d), phases(iterations, False) - 1
    ld = dp + APART
    iteration, step = divmod(phase - 1, _STEPS[0])
    r, z = _matrix(own, iteration % 2, dp), _matrix(own, 2 + iteration % 2, dp)
    next_r, next_z = _matrix(own, 1 - iteration % 2, dp), _matrix(own, 3 - iteration % 2, dp)
    q = _matrix(own, 4, dp)
    if phase == 0:
        _start(own, _matrix(own, 0, dp), _matrix(own, 2, dp), cov, dp, ld, d, eps, tiny, share, shares)
    elif phase == last:
        _put_whitener(w, own, z, ld, d, share, shares)
    elif step == 0:
        _product(q, 1.0, r, -1.0, r, r, dp, ld, True, own, share, shares)
    elif step == 1:
        _product(next_r, 2.25, q, -2.25, q, r, dp, ld, True, own, share, shares)
    else:
        _product(next_z, 1.5, z, -1.5, z, next_r, dp, ld, True, own, share, shares)


@njit
def _derivative(numbers, own, phase, block, share, shares):
    d, iterations, eps, tiny = numbers[3], numbers[4], real(numbers, 6), real(numbers, 7)
    cov, grad = at(pointer(numbers[8], own), block * d * d), at(pointer(numbers[9], own), block * d * d)
    weight = at(pointer(numbers[11], own), block * d if numbers[11] != 0 else 0)
    dp, last = padded(d), phases(iterations, True) - 1
    ld = dp + APART
    iteration, step = divmod(phase - 1, _STEPS[1])
    now, then = iteration % 2, 1 - iteration % 2
    r, z, dr, dz = (
        _matrix(own, now, dp),
        _matrix(own, 2 + now, dp),
        _matrix(own, 4 + now, dp),
        _matrix(own, 6 + now, dp),
    )
    next_r, next_z = _matrix(own, then, dp), _matrix(own, 2 + then, dp)
    next_dr, next_dz = _matrix(own, 4 + then, dp), _matrix(own, 6 + then, dp)
    p, q, more, half = _matrix(own, 8, dp), _matrix(own, 9, dp), _matrix(own, 10, dp), _matrix(own, 11, dp)
    if phase == 0:
        _start(own, _matrix(own, 0, dp), _matrix(own, 2, dp), cov, dp, ld, d, eps, tiny, share, shares)
        _start_derivative(_matrix(own, 4, dp), _matrix(own, 6, dp), grad, weight, dp, ld, d, share, shares)
    elif phase == last:
        scale = get(own, UNIT)
        along = eps * _diagonal(dz, ld, d) / scale
        for i in range(d):
            row, z_row = at(dz, i * ld), at(z, i * ld)
            along += _inner(row, at(cov, i * d), d) / scale
            along += 0.5 * _factor(weight, i) * _inner(z_row, at(grad, i * d), d)
        result, divisor = at(pointer(numbers[10], own), block * d * d), number(z, scale)
        root = number(z, scale**0.5)
        for i in range(share, d, shares):
            row, target = at(dz, i * ld), at(result, i * d)
            for j in range(d):
                put(target, j, get(row, j) / divisor / root)  # their product may be too small for its dtype
            put(target, i, (get(row, i) - along) / scale / root)
        if numbers[12] != 0:
            _put_whitener(at(pointer(numbers[12], own), block * d * d), own, z, ld, d, share, shares)
    elif step == 0:
        _product(p, 1 / 3, dr, -1.0, dr, r, dp, ld, False, own, share, shares)
        _product(q, 1.0, r, -1.0, r, r, dp, ld, True, own, share, shares)
    elif step == 1:
        _add_transposed(more, p, 0.5, dp, ld, own, share, shares)  # (dr - 2 dr r - r dr) / 2
        _product(next_r, 2.25, q, -2.25, q, r, dp, ld, True, own, share, shares)
    elif step == 2:
        _product(half, 2.25, more, -2.25, more, r, dp, ld, False, own, share, shares)
        _product(p, 1.5, dz, -1.5, dz, next_r, dp, ld, True, own, share, shares)
        _product(next_z, 1.5, z, -1.5, z, next_r, dp, ld, True, own, share, shares)
    elif step == 3:
        _add_transposed(next_dr, half, 1.0, dp, ld, own, share, shares)
    else:
        _product(next_dz, 1.0, p, -1.5, z, next_dr, dp, ld, True, own, share, shares)


@njit
def _put_whitener(w, own, z, ld, d, share, shares):
    """W = Z / sqrt(trace)."""
    root = number(z, get(own, UNIT) ** 0.5)
    for i in range(share, d, shares):
        for j in range(d):
            put(w, i * d + j, get(z, i * ld + j) / root)


@njit
def _factor(weight, i):
    return number(weight, 1.0) if is_null(weight) else get(weight, i)


@njit(fastmath={"reassoc"})
def _inner(a, b, n):
    total = 0.0
    for i in range(n):
        total += np.float64(get(a, i)) * get(
            b, i
        )  # numbers whose product may be too large for their dtype, or too small
    return total


@njit
def _diagonal(m, ld, d):
    """Its sum."""
    total = 0.0
    for i in range(d):
        total += get(m, i * ld + i)
    return total


@njit
def _start(own, r, z, cov, dp, ld, d, eps, tiny, share, shares):
    """r = (cov + eps I) / trace / 3 and Z = 3/2 (I - r)."""
    scale = _diagonal(cov, d, d) + d * eps
    if scale < tiny:  # eps = 0 and constant channels: S is 0, and so is R
        scale = tiny
    if share == 0:
        clear(own, 0, 1, UNIT)
        put(own, UNIT, scale)
    divisor = number(r, scale)
    for i in range(share, dp, shares):
        row, z_row, given = at(r, i * ld), at(z, i * ld), at(cov, i * d)
        clear(row, 0, 1, dp)
        clear(z_row, 0, 1, dp)
        if i < d:
            for j in range(d):
                value = get(given, j) / divisor / number(r, 3.0)
                put(row, j, value)
                put(z_row, j, number(r, -1.5) * value)
            diagonal = (get(given, i) + eps) / scale / 3
            put(row, i, diagonal)
            put(z_row, i, 1.5 - 1.5 * diagonal)


@njit
def _start_derivative(dr, dz, grad, weight, dp, ld, d, share, shares):
    """Those of r and Z along the symmetric part of a gradient, its rows times the weight."""
    for i in range(share, dp, shares):
        row, z_row = at(dr, i * ld), at(dz, i * ld)
        clear(row, 0, 1, dp)
        clear(z_row, 0, 1, dp)
        if i < d:
            factor = _factor(weight, i)
            for j in range(d):
                both = factor * get(grad, i * d + j) + _factor(weight, j) * get(grad, j * d + i)
                put(row, j, both / number(dr, 6.0))
                put(z_row, j, number(dr, -0.25) * both)


@njit
def _product(target, beta, base, alpha, a, b, n, ld, symmetric, zeros, share, shares):
    """Target = beta base + alpha A B, which is none of them."""
    step = WIDE if n >= 2 * WIDE * shares else UNIT
    strips = (n + step - 1) // step
    for turn in range((strips + shares - 1) // shares):
        place = turn * shares + (share if turn % 2 == 0 else shares - 1 - share)
        left = step * (strips - 1 - place)  # the longest first: what is left over in the end is short
        rows = 0 if left < 0 else min(n, left + step) if symmetric else n
        for i in range(0, rows, UNIT):
            j = left + UNIT if symmetric and i > left else left
            columns, own = min(n, left + step) - j, at(target, i * ld + j)
            start, first, second = at(base, i * ld + j), at(a, i * ld), at(b, j)
            tile(own, ld, beta, start, ld, alpha, first, ld, 1, second, ld, n, False, columns, integers(zeros), 0, 0, 0)
            for k in range(j, j + columns, UNIT):
                if symmetric and i < k:
                    transposed_tile(at(target, k * ld + i), ld, at(target, i * ld + k), ld, (zeros,))


@njit
def _add_transposed(target, m, factor, n, ld, zeros, share, shares):
    """Target = M + factor M'."""
    for j in range(share * UNIT, n, shares * UNIT):
        for i in range(0, n, UNIT):
            own, given = at(target, i * ld + j), at(m, i * ld + j)
            transposed_tile(own, ld, at(m, j * ld + i), ld, (zeros,))
            for k in range(UNIT):
                row, other = at(own, k * ld), at(given, k * ld)
                for l in range(UNIT):
                    put(row, l, get(other, l) + number(row, factor) * get(row, l))
