"""Cross moments of blocks of X and of dY, which their gradient needs, in one pass over both arrays."""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from polywhiten.cpu.arguments import CrossMomentsArgs, FinishCrossMomentsArgs, unpack
from polywhiten.cpu.device.gemm import multiply_add
from polywhiten.cpu.device.moments import sum_of_chunks
from polywhiten.cpu.device.packing import (
    APART,
    COLUMNS,
    OWN,
    Place,
    channel_run,
    clear,
    gather_channels,
    has_runs,
    is_run,
    load_columns,
    load_rows,
    padded,
    panels_memory,
    run_of,
    sum_columns,
    total_of,
    transposed,
    transposed_run,
    width_of_runs,
)
from polywhiten.cpu.device.simd import UNIT, at, doubles, get, integers, is_null, number, put

_ROWS = 1 << 12  # numbers of dY, and as many of X, that the first cache has room for beside their products


class _Memory(NamedTuple):
    """What is where in a part's workspace."""

    rows: Any  # of a panel of X
    columns: Any
    gradient: Any  # rows or columns of a panel of dY
    zeros: Any
    centre: Any  # a block's mean
    panel_sums: Any
    lost: Any  # what rounding has added to the sums of dY
    tile: Any
    matrix: Any  # a block's whitener, or the products of several panels
    white: Any  # columns of a whitened panel
    prefetch_list: Any


def cross_moments(packed, workspace, part, num_parts):
    """Sum dY (X - mean)' and dY 1 over a part of the chunks.

    If there is a whitener, dY is first multiplied by the weights of its channels, and the gradients of weight and bias
    are added up too. Panels are not rows then.
    """
    args = unpack(CrossMomentsArgs, packed, workspace)
    layout, dp = args.x_layout, padded(args.x_layout.d)
    count, step, together = layout.outer * layout.inner, width_of_runs(layout), 1
    if args.as_rows and layout.d <= 4 * UNIT:
        step = min(step, _ROWS // dp // UNIT * UNIT)
        together = COLUMNS // step
    panels, tasks = (count + step - 1) // step, layout.blocks * args.num_chunks
    memory = _divide_workspace(workspace, layout.d)
    clear(memory.zeros, 0, 1, max(dp, COLUMNS) + dp)
    for task in range(part * tasks // num_parts, (part + 1) * tasks // num_parts):
        block, chunk = divmod(task, args.num_chunks)
        products = at(args.sums, task * dp * (dp + 1))
        _start_block(args, memory, products, block)
        begin, end = chunk * panels // args.num_chunks, (chunk + 1) * panels // args.num_chunks
        for panel in range(begin, end):
            start = panel * step
            n = min(step, count - start)
            left = min(step, count - start - n)
            x, dy = Place(args.x, layout, block, start, n), Place(args.dy, args.dy_layout, block, start, n)
            next_x = Place(args.x, layout, block, start + n, left)
            next_dy = Place(args.dy, args.dy_layout, block, start + n, left)
            prefetched = next_x, next_dy, next_dy
            if args.as_rows:
                turn = (panel - begin) % together
                is_last = turn == together - 1 or panel == end - 1
                _add_rows(memory, products, x, dy, prefetched, together > 1, turn == 0, is_last)
            elif is_null(args.whitener):
                _add_columns(memory, products, x, dy, prefetched)
            elif has_runs(layout, args.channels):
                _add_runs(args, memory, products, x, dy, prefetched)
            else:
                _add_gathered(args, memory, products, x, dy, prefetched)


@njit(inline="always")
def _divide_workspace(workspace, d):
    dp = padded(d)
    rows_size, columns_size = COLUMNS * (dp + APART), dp * (COLUMNS + APART)
    gradient = at(workspace, rows_size + columns_size)
    zeros = at(gradient, max(columns_size, rows_size))
    centre = at(zeros, max(dp, COLUMNS))
    tile = at(centre, 3 * dp)
    matrix = at(tile, OWN)
    return _Memory(
        rows=workspace,
        columns=at(workspace, rows_size),
        gradient=gradient,
        zeros=zeros,
        centre=centre,
        panel_sums=at(centre, dp),
        lost=at(centre, 2 * dp),
        tile=tile,
        matrix=matrix,
        white=at(matrix, dp * dp),
        prefetch_list=integers(at(workspace, panels_memory(d))),
    )


@njit(inline="always")
def _start_block(args, memory, products, block):
    d, dp = args.x_layout.d, padded(args.x_layout.d)
    clear(products, 0, 1, dp * (dp + 1))
    clear(memory.lost, 0, 1, dp)
    for c in range(d):
        put(memory.centre, c, get(args.mean, block * d + c))
    if not is_null(args.whitener):
        clear(memory.matrix, dp, dp, dp)
        for i in range(d):
            for j in range(d):
                put(memory.matrix, i * dp + j, get(args.whitener, (block * d + i) * d + j))


@njit(inline="always")
def _add_rows(memory, products, x, dy, prefetched, are_together, is_first, is_last):
    """Add what two panels of rows give; several small panels are added up before their sum is."""
    d, dp = x.layout.d, padded(x.layout.d)
    ld, ignored_sums, lines = dp + APART, memory.columns, memory.prefetch_list
    load_rows(memory.rows, ld, x, memory.centre, ignored_sums)
    clear(memory.panel_sums, 0, 1, dp)
    load_rows(memory.gradient, ld, dy, memory.zeros, memory.panel_sums)
    _add_exactly(at(products, dp * dp), memory.lost, memory.panel_sums, d)
    target, base, ld_base = products, products, dp
    if are_together:
        target, base, ld_base = (memory.matrix, memory.zeros, 0) if is_first else (memory.matrix, memory.matrix, dp)
    factors, sizes = (memory.gradient, 1, ld, memory.rows, ld), (dp, dp, x.samples)
    multiply_add(target, dp, base, ld_base, *factors, *sizes, False, prefetched, 2, lines)
    if are_together and is_last:
        for i in range(dp * dp):
            put(products, i, get(products, i) + get(memory.matrix, i))


@njit
def _add_exactly(totals, lost, values, count):
    """Add values by Kahan's sum: what rounding has added to a total is taken off the next value."""
    for c in range(count):
        value, before = get(values, c) - get(lost, c), get(totals, c)
        put(totals, c, before + value)
        more = (get(totals, c) - before) - value
        put(lost, c, more if abs(more) < number(lost, np.inf) else number(lost, 0.0))


@njit(inline="always")
def _add_columns(memory, products, x, dy, prefetched):
    """Add what two panels of columns give."""
    dp, n = padded(x.layout.d), x.samples
    gradient, ld = _load_both(memory, x, dy)
    sum_columns(at(products, dp * dp), gradient, ld, x.layout.d, n)
    _add_products(memory, products, gradient, ld, n, dp, prefetched)


@njit
def _load_both(memory, x, dy):
    """Load X as rows and dY as columns, and return where these are: in their array if both are runs."""
    dp, ld = padded(x.layout.d), COLUMNS + APART
    if is_run(x) and is_run(dy):
        transposed_run(memory.rows, dp + APART, x, memory.centre, memory.zeros, memory.tile)
        return run_of(dy), dy.layout.d_stride
    _load_columns(memory, x, dy)
    return memory.gradient, ld


@njit
def _load_columns(memory, x, dy):
    """Load X as rows and as columns, and dY as columns."""
    dp, ld = padded(x.layout.d), COLUMNS + APART
    load_columns(memory.columns, ld, x, memory.centre, memory.tile)
    transposed(memory.rows, dp + APART, memory.columns, ld, dp, padded(x.samples), memory.zeros)
    load_columns(memory.gradient, ld, dy, memory.zeros, memory.tile)


@njit(inline="always")
def _add_products(memory, products, gradient, ld, n, dp, prefetched):
    """Add the products of columns of dY and rows of X."""
    sums, factors = (products, dp), (gradient, ld, 1, memory.rows, dp + APART)
    multiply_add(*sums, *sums, *factors, dp, dp, n, False, prefetched, 2, memory.prefetch_list)


@njit(inline="always")
def _add_gathered(args, memory, products, x, dy, prefetched):
    """Add what panels give where adjacent samples are of different channels."""
    dp, n, ld = padded(x.layout.d), x.samples, COLUMNS + APART
    _load_columns(memory, x, dy)
    base, factors, sizes = (memory.zeros, 0), (memory.matrix, dp, 1, memory.columns, ld), (dp, padded(n), dp)
    multiply_add(memory.white, ld, *base, *factors, *sizes, False, prefetched, 0, memory.prefetch_list)
    parameters = doubles(at(memory.rows, args.parameter_sums))
    panels, sums = (memory.gradient, memory.white, ld, x), (at(products, dp * dp), parameters)
    gather_channels(*panels, args.channels, args.weight, *sums, memory.tile)
    _add_products(memory, products, memory.gradient, ld, n, dp, prefetched)


@njit(fastmath={"reassoc"})
def _add_runs(args, memory, products, x, dy, prefetched):
    """Add what panels give where each run of adjacent samples is of one channel in every row.

    Each run has products of its own. A row of these, times that of the whitener, is what the weight's gradient gains:
    the whitened samples aren't needed.
    """
    layout, channels, places = x.layout, args.channels, 2
    gradient, ld = _load_both(memory, x, dy)
    d, dp, sums = layout.d, padded(layout.d), at(products, padded(layout.d) ** 2)
    parameters, done, j = doubles(at(memory.rows, args.parameter_sums)), 0, x.start % layout.inner
    run = memory.white, dp
    while done < x.samples:
        n, following = channel_run(x, channels, done, j)
        first = j // channels.positions
        factors = at(gradient, done), ld, 1, at(memory.rows, done * (dp + APART)), dp + APART
        multiply_add(*run, memory.zeros, 0, *factors, dp, dp, n, False, prefetched, places, memory.prefetch_list)
        for i in range(d):
            channel = i * (layout.inner // channels.positions) + first
            weight, total = get(args.weight, channel), total_of(at(gradient, i * ld + done), n)
            row, target, white = at(memory.white, i * dp), at(products, i * dp), at(memory.matrix, i * dp)
            product = number(row, 0.0)
            for c in range(d):
                product += get(row, c) * get(white, c)
                put(target, c, get(target, c) + weight * get(row, c))
            put(sums, i, get(sums, i) + weight * total)
            put(parameters, channel, get(parameters, channel) + product)
            put(parameters, channels.number + channel, get(parameters, channels.number + channel) + total)
        done, j, places = done + n, following, 0


def finish_cross_moments(packed, workspace, part, num_parts):
    """Compute s = dY 1 and K = dY (X - mean)' of a part of the blocks from the sums of `cross_moments`."""
    args = unpack(FinishCrossMomentsArgs, packed, workspace)
    blocks, d, dp = args.blocks, args.d, padded(args.d)
    for block in range(part * blocks // num_parts, (part + 1) * blocks // num_parts):
        products = sum_of_chunks(args.sums, block, args.num_chunks, dp * (dp + 1))
        for i in range(d):
            put(args.s, block * d + i, get(products, dp * dp + i))
            for j in range(d):
                put(args.k, (block * d + i) * d + j, get(products, i * dp + j))
