"""Affine maps of blocks: sums of one or two matrices times a block."""

from typing import Any, NamedTuple

from polywhiten.cpu.arguments import AffineMapArgs, unpack
from polywhiten.cpu.device.channels import scale_channels
from polywhiten.cpu.device.device_function import device_function
from polywhiten.cpu.device.gemm import Sizes, intervals_per_tile, multiply_add, multiply_add_listed
from polywhiten.cpu.device.gemm_microkernel import Matrix, StridedMatrix
from polywhiten.cpu.device.packing import pack_columns, pack_rows, transpose, unpack_columns, unpack_rows
from polywhiten.cpu.device.panels import Panel, padded, panel_width, panel_workspace_size, subpanel
from polywhiten.cpu.device.pointers import as_int64, at, clear, fence, get, is_null, put
from polywhiten.cpu.device.prefetch import Prefetch, PrefetchList, list_lines
from polywhiten.cpu.tuning import LD_PADDING, PANEL_WIDTH, TILE


class _Memory(NamedTuple):
    """What is where in a part's workspace."""

    inputs: Any  # a panel of every term
    result: Any
    zeros: Any
    shift: Any  # a block's
    tile: Any
    prefetch_list: Any


def pack_matrices(packed, workspace, part, num_parts):
    """Pack the matrices of a part of the blocks, padded to tiles, in the layout that the product with a panel reads.

    A block's matrices lie side by side; for rows, transposed and below each other. The rows of the first one are
    multiplied by `row_scale` on the way, if there is one.
    """
    args = unpack(AffineMapArgs, packed, workspace)
    blocks, d, dp = args.y_layout.blocks, args.y_layout.d, padded(args.y_layout.d)
    depth = args.num_terms * dp
    clear(workspace, 0, 1, dp)
    for block in range(part * blocks // num_parts, (part + 1) * blocks // num_parts):
        target = at(args.packed_matrices, block * depth * dp)
        clear(target, 0, 1, depth * dp)
        _pack_matrix(target, args, 0, at(args.first.matrix, block * d * d), workspace)
        if args.num_terms == 2:
            _pack_matrix(target, args, 1, at(args.second.matrix, block * d * d), workspace)
        if not is_null(args.row_scale):
            for i in range(d):
                row = at(target, i * (dp if args.as_rows else depth))
                for j in range(d):
                    put(row, j, get(row, j) * get(args.row_scale, block * d + (j if args.as_rows else i)))


@device_function
def _pack_matrix(target, args, term, matrix, zeros):
    d, dp = args.y_layout.d, padded(args.y_layout.d)
    if args.as_rows and d == dp:
        transpose(at(target, term * d * d), d, matrix, d, d, d, zeros)
        return
    for i in range(d):
        for j in range(d):
            place = (term * dp + j) * dp + i if args.as_rows else i * args.num_terms * dp + term * dp + j
            put(target, place, get(matrix, i * d + j))


def affine_map(packed, workspace, part, num_parts):
    """Compute a part of the panels of y: the sum of the terms, plus the shift of each block.

    Channels along the samples may have a weight and a bias, applied to the first term's array or to the result. There
    are none where panels are rows.
    """
    args = unpack(AffineMapArgs, packed, workspace)
    layout = args.y_layout
    blocks, d, step = layout.blocks, layout.d, panel_width(layout)
    panels = (layout.outer * layout.inner + step - 1) // step
    memory = _divide_workspace(workspace, d, args.num_terms)
    clear(memory.zeros, 0, 1, max(padded(d), PANEL_WIDTH) + padded(d))
    items = blocks * panels
    for item in range(part * items // num_parts, (part + 1) * items // num_parts):
        block, start, n = _panel(layout, item, panels, step, args.panels_first)
        next_block, next_start, next_n = _panel(layout, item + 1, panels, step, args.panels_first)
        y = Panel(args.y, layout, block, start, n)
        first = Panel(args.first.array, args.first.layout, block, start, n)
        second = Panel(args.second.array, args.second.layout, block, start, n)
        prefetched = (
            Panel(args.first.array, args.first.layout, next_block, next_start, next_n),
            Panel(args.second.array, args.second.layout, next_block, next_start, next_n if args.num_terms == 2 else 0),
            y,
        )
        for c in range(d):
            put(memory.shift, c, 0.0 if is_null(args.shift) else get(args.shift, block * d + c))
        if args.as_rows:
            _map_rows(args, memory, y, first, second, prefetched)
        else:
            _map_columns(args, memory, y, first, second, prefetched)
    if args.nontemporal:
        fence()


@device_function(inline="always")
def _divide_workspace(workspace, d, terms):
    dp, ld = padded(d), PANEL_WIDTH + LD_PADDING
    result = at(workspace, max(PANEL_WIDTH * (terms * dp + LD_PADDING), terms * dp * ld))
    zeros = at(result, dp * ld)
    shift = at(zeros, max(dp, PANEL_WIDTH))
    return _Memory(workspace, result, zeros, shift, at(shift, dp), as_int64(at(workspace, panel_workspace_size(d))))


@device_function
def _panel(layout, item, panels, step, panels_first):
    """Return the block, first sample and number of samples of a panel in the order of work; none after the last."""
    if panels_first:
        panel, block = divmod(item, layout.blocks)
    else:
        block, panel = divmod(item, panels)
    start = panel * step
    return block, start, min(step, layout.outer * layout.inner - start) if item < layout.blocks * panels else 0


@device_function(inline="always")
def _map_columns(args, memory, y, first, second, prefetched):
    d, dp, n, ld = y.layout.d, padded(y.layout.d), y.samples, PANEL_WIDTH + LD_PADDING
    depth = args.num_terms * dp
    matrix, centre = at(args.packed_matrices, y.block * depth * dp), at(args.first.centre, y.block * d)
    if is_null(args.input_weight):
        pack_columns(memory.inputs, ld, first, centre, memory.tile)
    else:
        pack_columns(memory.inputs, ld, first, memory.zeros, memory.tile)
        scale_channels(memory.inputs, ld, first, args.channels, args.input_weight, args.channel_bias, centre)
    if args.num_terms == 2:
        pack_columns(at(memory.inputs, dp * ld), ld, second, at(args.second.centre, y.block * d), memory.tile)
    multiply_add(
        c=Matrix(memory.result, ld),
        base=Matrix(memory.zeros, 0),
        a=StridedMatrix(matrix, depth, 1),
        b=Matrix(memory.inputs, ld),
        sizes=Sizes(m=dp, n=padded(n), k=depth),
        upper=False,
        prefetch=Prefetch(prefetched, 3, memory.prefetch_list),
    )
    if not is_null(args.output_weight):
        weight = args.output_weight
        scale_channels(memory.result, ld, first, args.channels, weight, args.channel_bias, memory.zeros)
    unpack_columns(y, memory.result, ld, memory.shift, memory.tile)


@device_function(inline="always")
def _map_rows(args, memory, y, first, second, prefetched):
    """Map a few rows at a time: the next ones are read while the products of those before are computed."""
    layout, n, d, dp = y.layout, y.samples, y.layout.d, padded(y.layout.d)
    depth, several = args.num_terms * dp, TILE * max(1, 8 * TILE // dp)
    ld, tiles, ignored_sums = depth + LD_PADDING, padded(n) // TILE * (dp // TILE), memory.result
    matrix = at(args.packed_matrices, y.block * depth * dp)
    centre, second_centre = at(args.first.centre, y.block * d), at(args.second.centre, y.block * d)
    intervals = tiles * intervals_per_tile(memory.shift, depth)
    begin, prefetch_list = 0, list_lines(Prefetch(prefetched, 2, memory.prefetch_list), intervals)
    are_direct = d == dp and layout.outer == 1 and layout.d_stride == 1
    for done in range(0, n, several):
        some = min(several, n - done)
        pack_rows(memory.inputs, ld, subpanel(first, done, some), centre, ignored_sums)
        if args.num_terms == 2:
            pack_rows(at(memory.inputs, dp), ld, subpanel(second, done, some), second_centre, ignored_sums)
        for i in range(0, some, TILE):
            target, ldt, is_direct = memory.result, dp, are_direct and i + TILE <= some
            if is_direct:
                ldt = layout.inner_stride
                target = at(y.array, y.block * layout.block_stride + (y.start + done + i) * ldt)
            begin = multiply_add_listed(
                c=Matrix(target, ldt),
                base=Matrix(memory.shift, 0),
                a=StridedMatrix(at(memory.inputs, i * ld), ld, 1),
                b=Matrix(matrix, dp),
                sizes=Sizes(m=TILE, n=dp, k=depth),
                upper=False,
                nontemporal=args.nontemporal and is_direct,
                prefetch_list=PrefetchList(memory.prefetch_list, begin, prefetch_list.end, prefetch_list.per_interval),
            )
            if not is_direct:
                unpack_rows(subpanel(y, done + i, min(TILE, some - i)), memory.result, dp)
