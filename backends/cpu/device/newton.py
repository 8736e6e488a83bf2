"""Newton's iteration on r = R / 3 and its derivative, see `polywhiten.solvers.newton`, in phases.

A step is q = r - r r, then r <- 9/4 (q - q r); the next one begins with Z <- 3/2 (Z - Z r). The last two steps of Z are
taken as one, which saves a product, and two of the derivative: with q = 3/2 r - r r, they are Z <- 9/4 (Z - Z n) for
n = 23/32 r + 27/16 q - 9/4 q q.

Symmetric results are computed above their diagonals and copied. A phase needs all phases before it, but a column of
tiles in it needs no other column: several workers can share a matrix if they begin every phase together.
"""

from typing import Any, NamedTuple

import numpy as np

from polywhiten.cpu.arguments import InverseSqrtArgs, unpack
from polywhiten.cpu.device.device_function import device_function
from polywhiten.cpu.device.panels import padded
from polywhiten.cpu.device.pointers import at, cast, clear, get, is_null, put
from polywhiten.cpu.device.square_matrices import add_scaled, add_transposed, product
from polywhiten.cpu.tuning import LD_PADDING, TILE

_DERIVATIVES = 7  # matrices that the derivative works on
_PHASES = 2, 4  # of a step, likewise
_PHASES_AT_LAST = 4, 5  # of the last step
_PHASES_BEFORE = 1, 2  # the steps


def inverse_sqrt(packed, workspace, part, num_parts):
    """Compute W = (cov + eps I)^(-1/2) for a part of the blocks, or a part of one phase for all blocks."""
    args = unpack(InverseSqrtArgs, packed, workspace)
    turns = _divide_turns(args, num_phases(args.steps, False), part, num_parts)
    for block in range(turns.first_block, turns.end_block):
        matrices = workspace
        if turns.is_shared:
            matrices = at(args.matrices, block * workspace_size(args.d, False))
        memory = _divide_memory(args, workspace, matrices)
        for phase in range(turns.first_phase, turns.end_phase):
            _iterate(args, memory, phase, block, turns.part, turns.num_parts)


def inverse_sqrt_adjoint(packed, workspace, part, num_parts):
    """Compute the gradient with respect to cov for a part of the blocks, or a part of one phase for all blocks."""
    args = unpack(InverseSqrtArgs, packed, workspace)
    turns = _divide_turns(args, num_phases(args.steps, True), part, num_parts)
    for block in range(turns.first_block, turns.end_block):
        matrices = workspace
        if turns.is_shared:
            matrices = at(args.matrices, block * workspace_size(args.d, True))
        memory = _divide_memory(args, workspace, matrices)
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
    """Return the number of phases: those before the steps, those of the steps, and one after them."""
    kind = 1 if derivative else 0
    of_steps = 0 if steps == 1 else _PHASES[kind] * (steps - 2) + _PHASES_AT_LAST[kind]
    return _PHASES_BEFORE[kind] + of_steps + 1


@device_function
def workspace_size(d, derivative):
    """Return how many elements a block's matrices take."""
    size = iterates_size(d, 2)
    return size + _DERIVATIVES * padded(d) * (padded(d) + LD_PADDING) if derivative else size


@device_function
def iterates_size(d, num_kept):
    """Return how many elements the last r and Z take, so many of each, with what else the iteration works on."""
    return 2 * TILE + (2 * num_kept + 1) * padded(d) * (padded(d) + LD_PADDING)


class _Memory(NamedTuple):
    """A block's matrices."""

    iterates: Any  # zeros, the trace, and then r, Z and q
    num_kept: int  # of r and of Z: two if each step overwrites what the one before it has read
    derivatives: Any
    dp: int


@device_function(inline="always")
def _divide_memory(args, workspace, matrices):
    """Return where a block's matrices are; `matrices` is memory for all but kept iterates."""
    dp, iterates, num_kept, derivatives = padded(args.d), matrices, 2, at(matrices, iterates_size(args.d, 2))
    if args.kept >= 0:
        iterates, num_kept, derivatives = at(workspace, args.kept), args.steps, matrices
    return _Memory(iterates, num_kept, derivatives, dp)


@device_function
def _r(memory, step):
    """Return a pointer to r after so many steps."""
    return at(memory.iterates, 2 * TILE + step % memory.num_kept * memory.dp * (memory.dp + LD_PADDING))


@device_function
def _z(memory, change):
    """Return a pointer to Z after so many changes."""
    k = memory.num_kept + change % memory.num_kept
    return at(memory.iterates, 2 * TILE + k * memory.dp * (memory.dp + LD_PADDING))


@device_function
def _q(memory):
    return at(memory.iterates, 2 * TILE + 2 * memory.num_kept * memory.dp * (memory.dp + LD_PADDING))


@device_function
def _derivative(memory, k):
    """Return a pointer to a matrix of the derivative: two of r, two of Z, and three more."""
    return at(memory.derivatives, k * memory.dp * (memory.dp + LD_PADDING))


class _Step(NamedTuple):
    """Which step a phase belongs to, and what it is there."""

    phase: int
    number: int
    is_last: bool
    changes: int  # of Z before the step; the first step changes it only if it is the last one too
    changes_z: bool


@device_function
def _step(phase, steps, derivative):
    """Return the step of a phase that is neither before the steps nor after them."""
    kind = 1 if derivative else 0
    phase -= _PHASES_BEFORE[kind]
    number = min(phase // _PHASES[kind], steps - 2)
    place, is_last = phase - number * _PHASES[kind], number == steps - 2
    changes_z = place == _PHASES_AT_LAST[kind] - 1 if is_last else place == 0 and number > 0
    return _Step(place, number, is_last, max(number - 1, 0), changes_z)


@device_function
def _all_changes(steps):
    """Return how often Z changes in all steps."""
    return 0 if steps == 1 else max(steps - 3, 0) + 1


@device_function(inline="always")
def _iterate(args, memory, phase, block, part, num_parts):
    """Compute a part of a phase for one block."""
    d, cov, whitener = args.d, at(args.cov, block * args.d * args.d), at(args.whitener, block * args.d * args.d)
    dp, last, zeros = memory.dp, num_phases(args.steps, False) - 1, memory.iterates
    ld = dp + LD_PADDING
    if phase == 0:
        _start(args, memory, cov, part, num_parts)
        return
    if phase == last:
        _store_whitener(whitener, memory, _z(memory, _all_changes(args.steps)), ld, d, part, num_parts)
        return
    step, q = _step(phase, args.steps, False), _q(memory)
    r, next_r = _r(memory, step.number), _r(memory, step.number + 1)
    if step.phase == 0:
        product(q, 1.5 if step.is_last else 1.0, r, -1.0, r, r, dp, ld, True, True, zeros, part, num_parts)
    elif step.is_last and step.phase == 1:
        add_scaled(next_r, 23 / 32, r, 27 / 16, q, dp, ld, part, num_parts)
    elif not step.changes_z:
        beta, base, b = (1.0, next_r, q) if step.is_last else (2.25, q, r)
        product(next_r, beta, base, -2.25, q, b, dp, ld, True, True, zeros, part, num_parts)
    if step.changes_z:
        z, next_z = _z(memory, step.changes), _z(memory, step.changes + 1)
        factor, b = (2.25, next_r) if step.is_last else (1.5, r)
        product(next_z, factor, z, -factor, z, b, dp, ld, True, True, zeros, part, num_parts)


@device_function(inline="always")
def _iterate_derivative(args, memory, phase, block, part, num_parts):
    """Compute a part of a phase for one block, with the derivative along the gradient's symmetric part."""
    dp, last, zeros = memory.dp, num_phases(args.steps, True) - 1, memory.iterates
    ld, computes_iterates = dp + LD_PADDING, args.kept < 0
    if phase == 0:
        if computes_iterates:
            _start(args, memory, at(args.cov, block * args.d * args.d), part, num_parts)
        _load_gradient(args, memory, block, part, num_parts)
        return
    if phase == 1:
        _start_derivative(memory, args.steps, part, num_parts)
        return
    if phase == last:
        changes = _all_changes(args.steps)
        _store_gradient(args, memory, _z(memory, changes), _dz(memory, changes), block, part, num_parts)
        return
    step, q = _step(phase, args.steps, True), _q(memory)
    number, changes, is_last = step.number, step.changes, step.is_last
    r, next_r, dr, next_dr = _r(memory, number), _r(memory, number + 1), _dr(memory, number), _dr(memory, number + 1)
    p, more, half = _derivative(memory, 4), _derivative(memory, 5), _derivative(memory, 6)
    if step.phase == 0:
        product(p, 0.75 if is_last else 1 / 3, dr, -1.0, dr, r, dp, ld, False, False, zeros, part, num_parts)
        if computes_iterates:
            product(q, 1.5 if is_last else 1.0, r, -1.0, r, r, dp, ld, True, True, zeros, part, num_parts)
    elif step.phase == 1:
        # the derivative of q if this step is the last one, else (dr - 2 dr r - r dr) / 2
        add_transposed(more, p, 1.0 if is_last else 0.5, dp, ld, part, num_parts)
        if is_last:
            add_scaled(half, 23 / 64, dr, 27 / 32, more, dp, ld, part, num_parts)
        if is_last and computes_iterates:
            add_scaled(next_r, 23 / 32, r, 27 / 16, q, dp, ld, part, num_parts)
    elif step.phase == 2:
        scale, half_base, half_b = (1.0, half, q) if is_last else (2.25, more, r)
        product(half, scale, half_base, -2.25, more, half_b, dp, ld, False, False, zeros, part, num_parts)
        if computes_iterates:
            scale, base, b = (1.0, next_r, q) if is_last else (2.25, q, r)
            product(next_r, scale, base, -2.25, q, b, dp, ld, True, True, zeros, part, num_parts)
    elif step.phase == 3:
        add_transposed(next_dr, half, 1.0, dp, ld, part, num_parts)
    if step.changes_z:
        z, next_z = _z(memory, changes), _z(memory, changes + 1)
        dz, next_dz = _dz(memory, changes), _dz(memory, changes + 1)
        factor, b, db = (2.25, next_r, next_dr) if is_last else (1.5, r, dr)
        product(next_dz, factor, dz, -factor, dz, b, dp, ld, True, False, zeros, part, num_parts)
        product(next_dz, 1.0, next_dz, -factor, z, db, dp, ld, True, True, zeros, part, num_parts)
        if computes_iterates:
            product(next_z, factor, z, -factor, z, b, dp, ld, True, True, zeros, part, num_parts)


@device_function
def _dr(memory, step):
    """Return a pointer to the derivative of r after so many steps."""
    return _derivative(memory, step % 2)


@device_function
def _dz(memory, change):
    """Return a pointer to the derivative of Z after so many changes."""
    return _derivative(memory, 2 + change % 2)


@device_function
def _store_gradient(args, memory, z, dz, block, part, num_parts):
    """Store the gradient with respect to cov, less what the trace has of it, and the whitener if it is asked for."""
    d, ld = args.d, padded(args.d) + LD_PADDING
    cov, grad = at(args.cov, block * d * d), at(args.grad, block * d * d)
    row_scale = _block_values(args.row_scale, block * d)
    trace = get(memory.iterates, TILE)
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
    root = cast(z, get(memory.iterates, TILE) ** 0.5)
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
    if trace <= 0:  # without eps, the covariance of constant channels is 0: then Z / sqrt(trace) is 0, too
        trace = np.inf
    elif trace < args.smallest_normal:
        trace = args.smallest_normal
    if part == 0:
        clear(memory.iterates, 0, 1, TILE)
        put(memory.iterates, TILE, trace)
    r, z, ld, divisor = _r(memory, 0), _z(memory, 0), dp + LD_PADDING, cast(cov, trace)
    of_identity, of_r = (1.0, 0.0) if args.steps == 2 else (1.5, -1.5)
    for i in range(part, dp, num_parts):
        row, z_row, cov_row = at(r, i * ld), at(z, i * ld), at(cov, i * d)
        clear(row, 0, 1, dp)
        clear(z_row, 0, 1, dp)
        if i < d:
            for j in range(d):
                value = get(cov_row, j) / divisor * cast(r, 1 / 3)
                put(row, j, value)
                put(z_row, j, cast(r, of_r) * value)
            diagonal = (get(cov_row, i) + eps) / trace / 3
            put(row, i, diagonal)
            put(z_row, i, of_identity + of_r * diagonal)


@device_function
def _load_gradient(args, memory, block, part, num_parts):
    """Store a sixth of the gradient, whose rows are scaled first."""
    d, dp, grad = args.d, memory.dp, at(args.grad, block * args.d * args.d)
    sixth, row_scale = _derivative(memory, 6), _block_values(args.row_scale, block * d)
    for i in range(part, dp, num_parts):
        row = at(sixth, i * (dp + LD_PADDING))
        clear(row, 0, 1, dp)
        if i < d:
            factor = cast(row, _value_or_one(row_scale, i) / 6.0)
            for j in range(d):
                put(row, j, factor * get(grad, i * d + j))


@device_function
def _start_derivative(memory, steps, part, num_parts):
    """Store the derivatives of r and Z along the symmetric part of the gradient."""
    dp, ld, dr, dz = memory.dp, memory.dp + LD_PADDING, _dr(memory, 0), _dz(memory, 0)
    add_transposed(dr, _derivative(memory, 6), 1.0, dp, ld, part, num_parts)
    add_scaled(dz, 0.0 if steps == 2 else -1.5, dr, 0.0, dr, dp, ld, part, num_parts)
