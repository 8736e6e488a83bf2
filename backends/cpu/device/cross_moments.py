"""Cross moments of blocks of X and of dY, which their gradient needs, in one pass over both arrays."""

from typing import Any, NamedTuple

import numpy as np

from polywhiten.cpu.arguments import CombineCrossMomentsArgs, CrossMomentsArgs, unpack
from polywhiten.cpu.device.channels import channel_run, gather_channels, has_channel_runs
from polywhiten.cpu.device.device_function import device_function
from polywhiten.cpu.device.gemm import Sizes, multiply_add
from polywhiten.cpu.device.gemm_microkernel import Matrix, StridedMatrix
from polywhiten.cpu.device.moments import sum_of_chunks
from polywhiten.cpu.device.packing import pack_columns, pack_rows, pack_run_as_rows, transpose
from polywhiten.cpu.device.panels import (
    TILE_WORKSPACE,
    Panel,
    is_run,
    padded,
    panel_width_for_runs,
    panel_workspace_size,
    start_of_run,
)
from polywhiten.cpu.device.pointers import as_float64, as_int64, at, cast, clear, get, is_null, put
from polywhiten.cpu.device.prefetch import Prefetch
from polywhiten.cpu.device.sums import add_row_sums, sum_of
from polywhiten.cpu.tuning import LD_PADDING, PANEL_WIDTH, ROW_PANEL_SIZE, TILE


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
    count, step, together = layout.outer * layout.inner, panel_width_for_runs(layout), 1
    if args.as_rows and layout.d <= 4 * TILE:
        step = min(step, ROW_PANEL_SIZE // dp // TILE * TILE)
        together = PANEL_WIDTH // step
    panels, tasks = (count + step - 1) // step, layout.blocks * args.num_chunks
    memory = _divide_workspace(workspace, layout.d)
    clear(memory.zeros, 0, 1, max(dp, PANEL_WIDTH) + dp)
    for task in range(part * tasks // num_parts, (part + 1) * tasks // num_parts):
        block, chunk = divmod(task, args.num_chunks)
        products = at(args.sums, task * dp * (dp + 1))
        _start_block(args, memory, products, block)
        begin, end = chunk * panels // args.num_chunks, (chunk + 1) * panels // args.num_chunks
        for panel in range(begin, end):
            start = panel * step
            n = min(step, count - start)
            left = min(step, count - start - n)
            x, dy = Panel(args.x, layout, block, start, n), Panel(args.dy, args.dy_layout, block, start, n)
            next_x = Panel(args.x, layout, block, start + n, left)
            next_dy = Panel(args.dy, args.dy_layout, block, start + n, left)
            prefetched = next_x, next_dy, next_dy
            if args.as_rows:
                turn = (panel - begin) % together
                is_last = turn == together - 1 or panel == end - 1
                _add_rows(memory, products, x, dy, prefetched, together > 1, turn == 0, is_last)
            elif is_null(args.whitener):
                _add_columns(memory, products, x, dy, prefetched)
            elif has_channel_runs(layout, args.channels):
                _add_runs(args, memory, products, x, dy, prefetched)
            else:
                _add_gathered(args, memory, products, x, dy, prefetched)


@device_function(inline="always")
def _divide_workspace(workspace, d):
    dp = padded(d)
    rows_size, columns_size = PANEL_WIDTH * (dp + LD_PADDING), dp * (PANEL_WIDTH + LD_PADDING)
    gradient = at(workspace, rows_size + columns_size)
    zeros = at(gradient, max(columns_size, rows_size))
    centre = at(zeros, max(dp, PANEL_WIDTH))
    tile = at(centre, 3 * dp)
    matrix = at(tile, TILE_WORKSPACE)
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
        prefetch_list=as_int64(at(workspace, panel_workspace_size(d))),
    )


@device_function(inline="always")
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


@device_function(inline="always")
def _add_rows(memory, products, x, dy, prefetched, are_together, is_first, is_last):
    """Add what two panels of rows give; several small panels are added up before their sum is."""
    d, dp = x.layout.d, padded(x.layout.d)
    ld, ignored_sums = dp + LD_PADDING, memory.columns
    pack_rows(memory.rows, ld, x, memory.centre, ignored_sums)
    clear(memory.panel_sums, 0, 1, dp)
    pack_rows(memory.gradient, ld, dy, memory.zeros, memory.panel_sums)
    _add_exactly(at(products, dp * dp), memory.lost, memory.panel_sums, d)
    target, base, ld_base = products, products, dp
    if are_together:
        target, base, ld_base = (memory.matrix, memory.zeros, 0) if is_first else (memory.matrix, memory.matrix, dp)
    multiply_add(
        c=Matrix(target, dp),
        base=Matrix(base, ld_base),
        a=StridedMatrix(memory.gradient, 1, ld),
        b=Matrix(memory.rows, ld),
        sizes=Sizes(m=dp, n=dp, k=x.samples),
        upper=False,
        prefetch=Prefetch(prefetched, 2, memory.prefetch_list),
    )
    if are_together and is_last:
        for i in range(dp * dp):
            put(products, i, get(products, i) + get(memory.matrix, i))


@device_function
def _add_exactly(totals, lost, values, count):
    """Add values by Kahan's sum: what rounding has added to a total is taken off the next value."""
    for c in range(count):
        value, before = get(values, c) - get(lost, c), get(totals, c)
        put(totals, c, before + value)
        more = (get(totals, c) - before) - value
        put(lost, c, more if abs(more) < cast(lost, np.inf) else cast(lost, 0.0))


@device_function(inline="always")
def _add_columns(memory, products, x, dy, prefetched):
    """Add what two panels of columns give."""
    dp, n = padded(x.layout.d), x.samples
    gradient, ld = _load_both(memory, x, dy)
    add_row_sums(at(products, dp * dp), gradient, ld, x.layout.d, n)
    _add_products(memory, products, gradient, ld, n, dp, prefetched)


@device_function(inline="always")
def _load_both(memory, x, dy):
    """Load X as rows and dY as columns, and return where these are: in their array if both are runs."""
    dp, ld = padded(x.layout.d), PANEL_WIDTH + LD_PADDING
    if is_run(x) and is_run(dy):
        pack_run_as_rows(memory.rows, dp + LD_PADDING, x, memory.centre, memory.zeros, memory.tile)
        return start_of_run(dy), dy.layout.d_stride
    _load_columns(memory, x, dy)
    return memory.gradient, ld


@device_function
def _load_columns(memory, x, dy):
    """Load X as rows and as columns, and dY as columns."""
    dp, ld = padded(x.layout.d), PANEL_WIDTH + LD_PADDING
    pack_columns(memory.columns, ld, x, memory.centre, memory.tile)
    transpose(memory.rows, dp + LD_PADDING, memory.columns, ld, dp, padded(x.samples), memory.zeros)
    pack_columns(memory.gradient, ld, dy, memory.zeros, memory.tile)


@device_function(inline="always")
def _add_products(memory, products, gradient, ld, n, dp, prefetched):
    """Add the products of columns of dY and rows of X."""
    multiply_add(
        c=Matrix(products, dp),
        base=Matrix(products, dp),
        a=StridedMatrix(gradient, ld, 1),
        b=Matrix(memory.rows, dp + LD_PADDING),
        sizes=Sizes(m=dp, n=dp, k=n),
        upper=False,
        prefetch=Prefetch(prefetched, 2, memory.prefetch_list),
    )


@device_function(inline="always")
def _add_gathered(args, memory, products, x, dy, prefetched):
    """Add what panels give where adjacent samples are of different channels."""
    dp, n, ld = padded(x.layout.d), x.samples, PANEL_WIDTH + LD_PADDING
    _load_columns(memory, x, dy)
    multiply_add(
        c=Matrix(memory.white, ld),
        base=Matrix(memory.zeros, 0),
        a=StridedMatrix(memory.matrix, dp, 1),
        b=Matrix(memory.columns, ld),
        sizes=Sizes(m=dp, n=padded(n), k=dp),
        upper=False,
        prefetch=Prefetch(prefetched, 0, memory.prefetch_list),
    )
    parameters = as_float64(at(memory.rows, args.parameter_sums))
    panels, sums = (memory.gradient, memory.white, ld, x), (at(products, dp * dp), parameters)
    gather_channels(*panels, args.channels, args.weight, *sums, memory.tile)
    _add_products(memory, products, memory.gradient, ld, n, dp, prefetched)


@device_function(inline="always")
def _add_runs(args, memory, products, x, dy, prefetched):
    """Add what panels give where each run of adjacent samples is of one channel in every row.

    Each run has products of its own. A row of these, times that of the whitener, is what the weight's gradient gains:
    the whitened samples aren't needed.
    """
    layout, channels, num_prefetched = x.layout, args.channels, 2
    gradient, ld = _load_both(memory, x, dy)
    d, dp, sums = layout.d, padded(layout.d), at(products, padded(layout.d) ** 2)
    parameters, done, j = as_float64(at(memory.rows, args.parameter_sums)), 0, x.start % layout.inner
    while done < x.samples:
        n, following = channel_run(x, channels, done, j)
        first = j // channels.positions
        multiply_add(
            c=Matrix(memory.white, dp),
            base=Matrix(memory.zeros, 0),
            a=StridedMatrix(at(gradient, done), ld, 1),
            b=Matrix(at(memory.rows, done * (dp + LD_PADDING)), dp + LD_PADDING),
            sizes=Sizes(m=dp, n=dp, k=n),
            upper=False,
            prefetch=Prefetch(prefetched, num_prefetched, memory.prefetch_list),
        )
        for i in range(d):
            channel = i * (layout.inner // channels.positions) + first
            weight, total = get(args.weight, channel), sum_of(at(gradient, i * ld + done), n)
            row, target, white = at(memory.white, i * dp), at(products, i * dp), at(memory.matrix, i * dp)
            product = _add_row(target, row, weight, white, d)
            put(sums, i, get(sums, i) + weight * total)
            put(parameters, channel, get(parameters, channel) + product)
            put(parameters, channels.number + channel, get(parameters, channels.number + channel) + total)
        done, j, num_prefetched = done + n, following, 0


@device_function(fastmath={"reassoc"})
def _add_row(target, row, weight, white, d):
    """Add a row times a weight to the target, and return its scalar product with another one."""
    product = cast(row, 0.0)
    for c in range(d):
        product += get(row, c) * get(white, c)
        put(target, c, get(target, c) + weight * get(row, c))
    return product


def combine_cross_moments(packed, workspace, part, num_parts):
    """Compute s = dY 1 and K = dY (X - mean)' of a part of the blocks from the sums of `cross_moments`."""
    args = unpack(CombineCrossMomentsArgs, packed, workspace)
    blocks, d, dp = args.blocks, args.d, padded(args.d)
    for block in range(part * blocks // num_parts, (part + 1) * blocks // num_parts):
        products = sum_of_chunks(args.sums, block, args.num_chunks, dp * (dp + 1))
        for i in range(d):
            put(args.s, block * d + i, get(products, dp * dp + i))
            for j in range(d):
                put(args.k, (block * d + i) * d + j, get(products, i * dp + j))
