"""Mean and covariance of blocks, in one pass over the array."""

from typing import Any, NamedTuple

from polywhiten.cpu.arguments import CombineMomentsArgs, MomentsArgs, unpack
from polywhiten.cpu.device.device_function import device_function
from polywhiten.cpu.device.gemm import Sizes, multiply_add
from polywhiten.cpu.device.gemm_microkernel import Matrix, StridedMatrix
from polywhiten.cpu.device.packing import load_shift, pack_columns, pack_rows, pack_run_as_rows, transpose
from polywhiten.cpu.device.panels import Panel, is_run, padded, panel_width_for_runs, panel_workspace_size, start_of_run
from polywhiten.cpu.device.pointers import as_int64, at, cast, clear, get, put
from polywhiten.cpu.device.prefetch import Prefetch
from polywhiten.cpu.device.simd import centre_rows
from polywhiten.cpu.device.sums import add_row_sums, sum_of_differences
from polywhiten.cpu.tuning import LD_PADDING, PANEL_WIDTH, TILE


class _Memory(NamedTuple):
    """What is where in a part's workspace."""

    rows: Any  # of a panel
    columns: Any
    first: Any  # a block's first sample
    tile: Any
    prefetch_list: Any


def moments(packed, workspace, part, num_parts):
    """Sum the products of panels about their own means, for a part of the chunks.

    The means are stored too, less the block's first sample: that loses nothing where they are large.
    """
    args = unpack(MomentsArgs, packed, workspace)
    layout = args.layout
    dp, count, step = padded(layout.d), layout.outer * layout.inner, panel_width_for_runs(layout)
    panels, tasks = (count + step - 1) // step, layout.blocks * args.num_chunks
    columns = at(workspace, PANEL_WIDTH * (dp + LD_PADDING))
    first = at(columns, dp * (PANEL_WIDTH + LD_PADDING))
    memory = _Memory(workspace, columns, first, at(first, dp), as_int64(at(workspace, panel_workspace_size(layout.d))))
    for task in range(part * tasks // num_parts, (part + 1) * tasks // num_parts):
        block, chunk = divmod(task, args.num_chunks)
        products = at(args.products, task * dp * dp)
        clear(products, dp, dp, dp)
        load_shift(first, args.x, layout, block)
        for panel in range(chunk * panels // args.num_chunks, (chunk + 1) * panels // args.num_chunks):
            start = panel * step
            n = min(step, count - start)
            x = Panel(args.x, layout, block, start, n)
            following = Panel(args.x, layout, block, start + n, min(step, count - start - n))
            mean = at(args.panel_means, (block * panels + panel) * dp)
            _add_panel(memory, products, mean, x, following, args.as_rows)


@device_function(inline="always")
def _add_panel(memory, products, mean, x, following, as_rows):
    """Add the products of a panel, and store its mean."""
    d, dp, n = x.layout.d, padded(x.layout.d), x.samples
    rows, ld, columns, ldc = memory.rows, dp + LD_PADDING, memory.columns, PANEL_WIDTH + LD_PADDING
    clear(mean, 0, 1, dp)
    if as_rows:
        pack_rows(rows, ld, x, memory.first, mean)
        _divide(mean, d, n)
        ignored_sums = columns
        for c in range(0, dp, TILE):
            centre_rows(at(rows, c), ld, at(rows, c), ld, n, at(mean, c), ignored_sums)
    elif is_run(x):
        run = start_of_run(x)
        for c in range(d):
            put(mean, c, sum_of_differences(at(run, c * x.layout.d_stride), n, get(memory.first, c)) / n)
        pack_run_as_rows(rows, ld, x, memory.first, mean, memory.tile)
    else:
        pack_columns(columns, ldc, x, memory.first, memory.tile)
        add_row_sums(mean, columns, ldc, d, n)
        _divide(mean, d, n)
        transpose(rows, ld, columns, ldc, dp, padded(n), mean)
    multiply_add(
        c=Matrix(products, dp),
        base=Matrix(products, dp),
        a=StridedMatrix(rows, 1, ld),
        b=Matrix(rows, ld),
        sizes=Sizes(m=dp, n=dp, k=n),
        upper=True,
        prefetch=Prefetch((following, following, following), 1, memory.prefetch_list),
    )


@device_function
def _divide(values, count, divisor):
    for i in range(count):
        put(values, i, get(values, i) / divisor)


def combine_moments(packed, workspace, part, num_parts):
    """Compute the mean and the covariance of a part of the blocks from the sums of `moments`.

    The products of the panels' means about the block's are added: this sum is stable for any order of the samples.
    """
    args = unpack(CombineMomentsArgs, packed, workspace)
    sums, layout = args.parts, args.parts.layout
    d, dp, count, step = layout.d, padded(layout.d), layout.outer * layout.inner, panel_width_for_runs(layout)
    panels = (count + step - 1) // step
    for block in range(part * layout.blocks // num_parts, (part + 1) * layout.blocks // num_parts):
        products = sum_of_chunks(sums.products, block, sums.num_chunks, dp * dp)
        panel_means, first, mean = at(sums.panel_means, block * panels * dp), workspace, at(workspace, dp)
        load_shift(first, sums.x, layout, block)
        for c in range(d):
            off = 0.0
            for panel in range(panels):
                off += min(step, count - panel * step) * (get(panel_means, panel * dp + c) - get(panel_means, c))
            put(mean, c, get(panel_means, c) + off / count)
            put(args.mean, block * d + c, get(first, c) + get(mean, c))
        for panel in range(panels):
            difference, n = at(panel_means, panel * dp), min(step, count - panel * step)
            for c in range(d):
                put(difference, c, get(difference, c) - get(mean, c))
            for i in range(d):
                row, factor = at(products, i * dp), cast(difference, n * get(difference, i))
                for j in range(i, d):
                    put(row, j, get(row, j) + factor * get(difference, j))
        cov = at(args.cov, block * d * d)
        for i in range(d):
            for j in range(i, d):
                value = get(products, i * dp + j) / count
                put(cov, i * d + j, value)
                put(cov, j * d + i, value)


@device_function
def sum_of_chunks(sums, block, chunks, size):
    """Add a block's chunks to the first one, and return that."""
    result = at(sums, block * chunks * size)
    for chunk in range(1, chunks):
        other = at(result, chunk * size)
        for i in range(size):
            put(result, i, get(result, i) + get(other, i))
    return result
