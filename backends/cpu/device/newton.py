"""Newton's iteration on r = R / 3 and its derivative, see `polywhiten.solvers.newton`, in phases.

A step is q = r - r r, then r <- 9/4 (q - q r); the next one begins with Z <- 3/2 (Z - Z r). The last two steps of Z are
taken as one, which saves a product, and two of the derivative: with q = 3/2 r - r r, they are Z <- 9/4 (Z - Z n) for
n = 23/32 r + 27/16 q - 9/4 q q.

Symmetric results are computed above their diagonals and copied. A phase needs all phases before it, but a column of
tiles in it needs no other column: several workers can share a matrix if they begin every phase together.
"""

from typing import NamedTuple

import numpy as np

from polywhiten.cpu.arguments import InverseSqrtArgs, unpack
from polywhiten.cpu.device.device_function import device_function
from polywhiten.cpu.device.gemm_microkernel import TILE_PAIR, Matrix, StridedMatrix, gemm_microkernel
from polywhiten.cpu.device.panels import padded
from polywhiten.cpu.device.pointers import as_int64, at, cast, clear, get, is_null, put
from polywhiten.cpu.device.prefetch import PrefetchList
from polywhiten.cpu.device.simd import add_transposed_tile, transpose_tile
from polywhiten.cpu.tuning import LD_PADDING, TILE

_MATRICES = 5, 12  # that the iteration works on, alone and with its derivative
_PHASES = 2, 4  # of a step, likewise
_PHASES_AT_LAST = 4, 5  # of the last step


def inverse_sqrt(packed, workspace, part, num_parts):
    """Compute W = (cov + eps I)^(-1/2) for a part of the blocks, or a part of one phase for all blocks."""
    args = unpack(InverseSqrtArgs, packed, workspace)
    turns = _divide_turns(args, num_phases(args.steps, False), part, num_parts)
    for block in range(turns.first_block, turns.end_block):
        memory = workspace
        if turns.is_shared:
            memory = at(args.matrices, block * workspace_size(args.d, False))
        for phase in range(turns.first_phase, turns.end_phase):
            _iterate(args, memory, phase, block, turns.part, turns.num_parts)


def inverse_sqrt_adjoint(packed, workspace, part, num_parts):
    """Compute the gradient with respect to cov for a part of the blocks, or a part of one phase for all blocks."""
    args = unpack(InverseSqrtArgs, packed, workspace)
    turns = _divide_turns(args, num_phases(args.steps, True), part, num_parts)
    for block in range(turns.first_block, turns.end_block):
        memory = workspace
        if turns.is_shared:
            memory = at(args.matrices, block * workspace_size(args.d, True))
        for phase in range(turns.first_phase, turns.end_phase):
            _iterate_derivative(args, memory, phase, block, turns.part, turns.num_parts)


class _Turns(NamedTuple):
    """Which phases of which blocks a part computes, and which part of each phase."""

    is_shared: bool  # whether all parts compute one phase of all blocks together
    first_block: int
    end_block: int
    first_phase: int
    end_phase: int
    part: int
    num_parts: int


@device_function
def _divide_turns(args, phases, part, num_parts):
    blocks = args.blocks
    if args.phase >= 0:
        return _Turns(True, 0, blocks, args.phase, args.phase + 1, part, num_parts)
    return _Turns(False, part * blocks // num_parts, (part + 1) * blocks // num_parts, 0, phases, 0, 1)


@device_function
def num_phases(steps, derivative):
    """Return the number of phases: those of the steps, one before them, and one after them."""
    kind = 1 if derivative else 0
    return 2 if steps == 1 else 2 + _PHASES[kind] * (steps - 2) + _PHASES_AT_LAST[kind]


@device_function
def workspace_size(d, derivative):
    """Return how many elements a block's matrices take."""
    return _MATRICES[1 if derivative else 0] * padded(d) * (padded(d) + LD_PADDING) + 2 * TILE


@device_function
def _matrix(memory, k, dp):
    """Return a pointer to a matrix; before the first one are zeros and the trace."""
    return at(memory, 2 * TILE + k * dp * (dp + LD_PADDING))


class _Step(NamedTuple):
    """Which step a phase belongs to, and what it is there."""

    phase: int
    is_last: bool
    now: int  # which of two matrices have r and its derivative, before the step
    z_now: int  # likewise those of Z, which the first step leaves as they are unless it is the last one
    updates_z: bool


@device_function
def _step(phase, steps, derivative):
    """Return the step of a phase that is neither the first nor the last one."""
    phases = _PHASES[1 if derivative else 0]
    step = min((phase - 1) // phases, steps - 2)
    place, is_last = phase - 1 - step * phases, step == steps - 2
    updates_z = place == _PHASES_AT_LAST[1 if derivative else 0] - 1 if is_last else place == 0 and step > 0
    return _Step(place, is_last, step % 2, max(step - 1, 0) % 2, updates_z)


@device_function
def _final_z(steps):
    """Return which of two matrices has Z after all steps."""
    return 0 if steps == 1 else 1 - max(steps - 3, 0) % 2


@device_function(inline="always")
def _iterate(args, memory, phase, block, part, num_parts):
    """Compute a part of a phase for one block."""
    d, cov, whitener = args.d, at(args.cov, block * args.d * args.d), at(args.whitener, block * args.d * args.d)
    dp, last = padded(d), num_phases(args.steps, False) - 1
    ld = dp + LD_PADDING
    if phase == 0:
        _start(args, memory, cov, part, num_parts)
        return
    if phase == last:
        _store_whitener(whitener, memory, _matrix(memory, 2 + _final_z(args.steps), dp), ld, d, part, num_parts)
        return
    step = _step(phase, args.steps, False)
    r, next_r, q = _matrix(memory, step.now, dp), _matrix(memory, 1 - step.now, dp), _matrix(memory, 4, dp)
    z, next_z = _matrix(memory, 2 + step.z_now, dp), _matrix(memory, 3 - step.z_now, dp)
    if step.phase == 0:
        _product(q, 1.5 if step.is_last else 1.0, r, -1.0, r, r, dp, ld, True, True, memory, part, num_parts)
    elif step.is_last and step.phase == 1:
        _add_scaled(next_r, 23 / 32, r, 27 / 16, q, dp, ld, part, num_parts)
    elif not step.updates_z:
        beta, base, b = (1.0, next_r, q) if step.is_last else (2.25, q, r)
        _product(next_r, beta, base, -2.25, q, b, dp, ld, True, True, memory, part, num_parts)
    if step.updates_z:
        factor, b = (2.25, next_r) if step.is_last else (1.5, r)
        _product(next_z, factor, z, -factor, z, b, dp, ld, True, True, memory, part, num_parts)


@device_function(inline="always")
def _iterate_derivative(args, memory, phase, block, part, num_parts):
    """Compute a part of a phase for one block, with the derivative along the gradient's symmetric part."""
    dp, last = padded(args.d), num_phases(args.steps, True) - 1
    ld = dp + LD_PADDING
    if phase == 0:
        _start(args, memory, at(args.cov, block * args.d * args.d), part, num_parts)
        _start_derivative(args, memory, block, part, num_parts)
        return
    if phase == last:
        z = _final_z(args.steps)
        _store_gradient(args, memory, _matrix(memory, 2 + z, dp), _matrix(memory, 6 + z, dp), block, part, num_parts)
        return
    step = _step(phase, args.steps, True)
    now, then, is_last = step.now, 1 - step.now, step.is_last
    r, next_r, dr, next_dr = (
        _matrix(memory, now, dp),
        _matrix(memory, then, dp),
        _matrix(memory, 4 + now, dp),
        _matrix(memory, 4 + then, dp),
    )
    p, q, more, half = _matrix(memory, 8, dp), _matrix(memory, 9, dp), _matrix(memory, 10, dp), _matrix(memory, 11, dp)
    if step.phase == 0:
        _product(p, 0.75 if is_last else 1 / 3, dr, -1.0, dr, r, dp, ld, False, False, memory, part, num_parts)
        _product(q, 1.5 if is_last else 1.0, r, -1.0, r, r, dp, ld, True, True, memory, part, num_parts)
    elif step.phase == 1:
        # the derivative of q if this step is the last one, else (dr - 2 dr r - r dr) / 2
        _add_transposed(more, p, 1.0 if is_last else 0.5, dp, ld, part, num_parts)
        if is_last:
            _add_scaled(half, 23 / 64, dr, 27 / 32, more, dp, ld, part, num_parts)
            _add_scaled(next_r, 23 / 32, r, 27 / 16, q, dp, ld, part, num_parts)
    elif step.phase == 2:
        scale, half_base, half_b = (1.0, half, q) if is_last else (2.25, more, r)
        _product(half, scale, half_base, -2.25, more, half_b, dp, ld, False, False, memory, part, num_parts)
        scale, base, b = (1.0, next_r, q) if is_last else (2.25, q, r)
        _product(next_r, scale, base, -2.25, q, b, dp, ld, True, True, memory, part, num_parts)
    elif step.phase == 3:
        _add_transposed(next_dr, half, 1.0, dp, ld, part, num_parts)
    if step.updates_z:
        z, next_z = _matrix(memory, 2 + step.z_now, dp), _matrix(memory, 3 - step.z_now, dp)
        dz, next_dz = _matrix(memory, 6 + step.z_now, dp), _matrix(memory, 7 - step.z_now, dp)
        factor, b, db = (2.25, next_r, next_dr) if is_last else (1.5, r, dr)
        _product(next_dz, factor, dz, -factor, dz, b, dp, ld, True, False, memory, part, num_parts)
        _product(next_dz, 1.0, next_dz, -factor, z, db, dp, ld, True, True, memory, part, num_parts)
        _product(next_z, factor, z, -factor, z, b, dp, ld, True, True, memory, part, num_parts)


@device_function
def _store_gradient(args, memory, z, dz, block, part, num_parts):
    """Store the gradient with respect to cov, less what the trace has of it, and the whitener if it is asked for."""
    d, ld = args.d, padded(args.d) + LD_PADDING
    cov, grad = at(args.cov, block * d * d), at(args.grad, block * d * d)
    row_scale = _block_values(args.row_scale, block * d)
    trace = get(memory, TILE)
    along = args.eps * _diagonal(dz, ld, d) / trace
    for i in range(d):
        along += _inner(at(dz, i * ld), at(cov, i * d), d) / trace
        along += 0.5 * _value_or_one(row_scale, i) * _inner(at(z, i * ld), at(grad, i * d), d)
    dcov, divisor, root = at(args.dcov, block * d * d), cast(z, trace), cast(z, trace**0.5)
    for i in range(part, d, num_parts):
        row, target = at(dz, i * ld), at(dcov, i * d)
        for j in range(d):
            put(target, j, get(row, j) / divisor / root)  # the product of both may be too small for the dtype
        put(target, i, (get(row, i) - along) / trace / root)
    if not is_null(args.whitener):
        _store_whitener(at(args.whitener, block * d * d), memory, z, ld, d, part, num_parts)


@device_function
def _store_whitener(whitener, memory, z, ld, d, part, num_parts):
    """Store W = Z / sqrt(trace)."""
    root = cast(z, get(memory, TILE) ** 0.5)
    for i in range(part, d, num_parts):
        for j in range(d):
            put(whitener, i * d + j, get(z, i * ld + j) / root)


@device_function
def _block_values(values, begin):
    return at(values, 0 if is_null(values) else begin)


@device_function
def _value_or_one(values, i):
    return cast(values, 1.0) if is_null(values) else get(values, i)


@device_function(fastmath={"reassoc"})
def _inner(a, b, n):
    """Return the inner product, in float64: products may be too large or too small for the values' dtype."""
    total = 0.0
    for i in range(n):
        total += np.float64(get(a, i)) * get(b, i)
    return total


@device_function
def _diagonal(m, ld, d):
    """Return the sum of the diagonal."""
    total = 0.0
    for i in range(d):
        total += get(m, i * ld + i)
    return total


@device_function
def _start(args, memory, cov, part, num_parts):
    """Store r = (cov + eps I) / trace / 3, and Z = 3/2 (I - r); of two steps, which are taken as one, Z = I."""
    d, dp, eps, trace = args.d, padded(args.d), args.eps, _diagonal(cov, args.d, args.d) + args.d * args.eps
    if trace < args.smallest_normal:  # without eps, the covariance of constant channels is 0
        trace = args.smallest_normal
    if part == 0:
        clear(memory, 0, 1, TILE)
        put(memory, TILE, trace)
    r, z, ld, divisor = _matrix(memory, 0, dp), _matrix(memory, 2, dp), dp + LD_PADDING, cast(cov, trace)
    of_identity, of_r = (1.0, 0.0) if args.steps == 2 else (1.5, -1.5)
    for i in range(part, dp, num_parts):
        row, z_row, cov_row = at(r, i * ld), at(z, i * ld), at(cov, i * d)
        clear(row, 0, 1, dp)
        clear(z_row, 0, 1, dp)
        if i < d:
            for j in range(d):
                value = get(cov_row, j) / divisor / cast(r, 3.0)
                put(row, j, value)
                put(z_row, j, cast(r, of_r) * value)
            diagonal = (get(cov_row, i) + eps) / trace / 3
            put(row, i, diagonal)
            put(z_row, i, of_identity + of_r * diagonal)


@device_function
def _start_derivative(args, memory, block, part, num_parts):
    """Store the derivatives of r and Z along the symmetric part of the gradient, whose rows are scaled first."""
    d, dp, grad = args.d, padded(args.d), at(args.grad, block * args.d * args.d)
    dr, dz, ld = _matrix(memory, 4, dp), _matrix(memory, 6, dp), dp + LD_PADDING
    row_scale = _block_values(args.row_scale, block * d)
    of_both = 0.0 if args.steps == 2 else -0.25
    for i in range(part, dp, num_parts):
        row, z_row = at(dr, i * ld), at(dz, i * ld)
        clear(row, 0, 1, dp)
        clear(z_row, 0, 1, dp)
        if i < d:
            factor = _value_or_one(row_scale, i)
            for j in range(d):
                both = factor * get(grad, i * d + j) + _value_or_one(row_scale, j) * get(grad, j * d + i)
                put(row, j, both / cast(dr, 6.0))
                put(z_row, j, cast(dr, of_both) * both)


@device_function
def _product(target, beta, base, alpha, a, b, n, ld, upper, mirrors, zeros, part, num_parts):
    """Compute target = beta base + alpha A B; the target may be the base, but not A or B.

    If `upper`, only the tiles on and above the diagonal are computed. If `mirrors`, they are copied below it.
    """
    step = TILE_PAIR if n >= 2 * TILE_PAIR * num_parts else TILE
    strips = (n + step - 1) // step
    for turn in range((strips + num_parts - 1) // num_parts):
        place = turn * num_parts + (part if turn % 2 == 0 else num_parts - 1 - part)
        # the longest strips come first, so that those that some workers wait for in the end are short
        left = step * (strips - 1 - place)
        rows = 0 if left < 0 else min(n, left + step) if upper else n
        for i in range(0, rows, TILE):
            j = left + TILE if upper and i > left else left
            columns = min(n, left + step) - j
            gemm_microkernel(
                Matrix(at(target, i * ld + j), ld),
                beta,
                Matrix(at(base, i * ld + j), ld),
                alpha,
                StridedMatrix(at(a, i * ld), ld, 1),
                Matrix(at(b, j), ld),
                n,
                columns,
                False,
                PrefetchList(as_int64(zeros), 0, 0, 0),
            )
            for k in range(j, j + columns, TILE):
                if mirrors and i < k:
                    transpose_tile(at(target, k * ld + i), ld, at(target, i * ld + k), ld, ())


@device_function
def _add_transposed(target, m, factor, n, ld, part, num_parts):
    """Compute target = M + factor M'."""
    for j in range(part * TILE, n, num_parts * TILE):
        for i in range(0, n, TILE):
            add_transposed_tile(at(target, i * ld + j), at(m, i * ld + j), at(m, j * ld + i), factor, ld)


@device_function
def _add_scaled(target, alpha, a, beta, b, n, ld, part, num_parts):
    """Compute target = alpha A + beta B."""
    for j in range(part * TILE, n, num_parts * TILE):
        for i in range(n):
            row, a_row, b_row = at(target, i * ld + j), at(a, i * ld + j), at(b, i * ld + j)
            for l in range(TILE):
                put(row, l, cast(row, alpha) * get(a_row, l) + cast(row, beta) * get(b_row, l))
