"""Newton's iteration and its derivative, as `polywhiten.solvers.newton` has them: every matrix stays in the cache.

All that is symmetric is computed above its diagonal, and copied.
"""

from numba import njit

from polywhiten.compiled.panels import APART, clear, padded
from polywhiten.compiled.parallel import real
from polywhiten.compiled.tile import UNIT, at, get, number, pointer, put, tile, transposed_tile


def inverse_sqrt(numbers, scratch, worker):
    """A worker's share of W (blocks, d, d).

    Numbers: workers, blocks, d, iterations, eps, the smallest normal number, the addresses of covariances and W.
    """
    workers, blocks, d, iterations, eps, tiny = _problem(numbers)
    cov, w = pointer(numbers[6], scratch), pointer(numbers[7], scratch)
    dp = padded(d)
    ld = dp + APART
    own = scratch
    for block in range(worker * blocks // workers, (worker + 1) * blocks // workers):
        r, z, q, more, zeros = (
            own,
            at(own, dp * ld),
            at(own, 2 * dp * ld),
            at(own, 3 * dp * ld),
            at(own, 4 * dp * ld),
        )
        clear(zeros, 0, 1, UNIT)
        own_cov = at(cov, block * d * d)
        scale = start(r, z, own_cov, dp, ld, d, eps, tiny)
        for _ in range(iterations - 1):
            product(q, -6.0, r, 1.0, r, r, dp, ld, True, zeros)
            product(more, 2.25, r, 0.25, r, q, dp, ld, True, zeros)
            r, more = more, r
            product(more, 1.5, z, -0.5, z, r, dp, ld, True, zeros)
            z, more = more, z
        result = at(w, block * d * d)
        root = scale**0.5
        for i in range(d):
            for j in range(d):
                put(result, i * d + j, get(z, i * ld + j) / root)


def inverse_sqrt_adjoint(numbers, scratch, worker):
    """A worker's share of the gradients (blocks, d, d) with respect to covariances, of those with respect to W.

    Numbers: as of `inverse_sqrt`, the addresses being those of covariances, gradients and results.
    """
    workers, blocks, d, iterations, eps, tiny = _problem(numbers)
    cov, grad, result = pointer(numbers[6], scratch), pointer(numbers[7], scratch), pointer(numbers[8], scratch)
    dp = padded(d)
    ld = dp + APART
    own, size = scratch, dp * ld
    for block in range(worker * blocks // workers, (worker + 1) * blocks // workers):
        r, z, dr, dz = own, at(own, size), at(own, 2 * size), at(own, 3 * size)
        p, q, more, zeros = at(own, 4 * size), at(own, 5 * size), at(own, 6 * size), at(own, 7 * size)
        clear(zeros, 0, 1, UNIT)
        own_cov, own_grad = at(cov, block * d * d), at(grad, block * d * d)
        scale = start(r, z, own_cov, dp, ld, d, eps, tiny)
        clear(dr, ld, dp, dp)
        clear(dz, ld, dp, dp)
        for i in range(d):
            for j in range(d):
                value = 0.5 * (get(own_grad, i * d + j) + get(own_grad, j * d + i))
                put(dr, i * ld + j, value)
                put(dz, i * ld + j, -0.5 * value)
        for _ in range(iterations - 1):
            product(p, -4.0, dr, 1.0, r, dr, dp, ld, False, zeros)
            add_transposed(p, 0.5, q, dp, ld, zeros)
            product(more, 1.125, dr, 0.25, r, p, dp, ld, False, zeros)
            add_transposed(more, 1.0, q, dp, ld, zeros)
            dr, more = more, dr
            product(q, -6.0, r, 1.0, r, r, dp, ld, True, zeros)
            product(more, 2.25, r, 0.25, r, q, dp, ld, True, zeros)
            r, more = more, r
            product(q, 1.5, dz, -0.5, dz, r, dp, ld, True, zeros)
            product(dz, 1.0, q, -0.5, z, dr, dp, ld, True, zeros)
            product(more, 1.5, z, -0.5, z, r, dp, ld, True, zeros)
            z, more = more, z
        along = 0.0
        for i in range(d):
            for j in range(d):
                s = get(own_cov, i * d + j)
                if i == j:
                    s += eps
                g = 0.5 * (get(own_grad, i * d + j) + get(own_grad, j * d + i))
                along += get(dz, i * ld + j) * (s / scale) + 0.5 * g * get(z, i * ld + j)
        own_result, root = at(result, block * d * d), scale**0.5
        for i in range(d):
            for j in range(d):
                value = get(dz, i * ld + j) - (along if i == j else 0.0)
                put(own_result, i * d + j, value / scale / root)


@njit
def _problem(numbers):
    return numbers[0], numbers[1], numbers[2], numbers[3], real(numbers, 4), real(numbers, 5)


@njit
def start(r, z, cov, dp, ld, d, eps, tiny):
    """R = (cov + eps I) / trace and Z = (3 I - R) / 2; the trace."""
    scale = d * eps
    for i in range(d):
        scale += get(cov, i * d + i)
    if scale < tiny:  # eps = 0 and constant channels: S is 0, and so is R
        scale = tiny
    clear(r, ld, dp, dp)
    clear(z, ld, dp, dp)
    for i in range(d):
        for j in range(d):
            value = (get(cov, i * d + j) + (eps if i == j else 0.0)) / scale
            put(r, i * ld + j, value)
            put(z, i * ld + j, (1.5 if i == j else 0.0) - 0.5 * value)
    return scale


@njit
def product(target, beta, base, alpha, a, b, n, ld, symmetric, zeros):
    """Target = beta base + alpha A B; another matrix than A and B."""
    for j in range(0, n, UNIT):
        for i in range(0, j + UNIT if symmetric else n, UNIT):
            own = at(target, i * ld + j)
            tile(own, ld, beta, at(base, i * ld + j), ld, alpha, at(a, i * ld), ld, 1, at(b, j), ld, n)
            if symmetric and i < j:
                transposed_tile(at(target, j * ld + i), ld, own, ld, zeros)


@njit
def add_transposed(m, factor, other, n, ld, zeros):
    """M + factor M', in place; `other` is memory to work in."""
    for i in range(0, n, UNIT):
        for j in range(0, n, UNIT):
            transposed_tile(at(other, j * ld + i), ld, at(m, i * ld + j), ld, zeros)
    for i in range(n):
        row, column = at(m, i * ld), at(other, i * ld)
        for j in range(n):
            put(row, j, get(row, j) + number(row, factor) * get(column, j))
