"""Packing: copies of panels between arrays of any strides and memory that stays in the cache."""

from polywhiten.cpu.device.device_function import device_function
from polywhiten.cpu.device.panels import is_interleaved, padded, start_of_run
from polywhiten.cpu.device.pointers import at, cast, clear, get, put
from polywhiten.cpu.device.simd import centre_rows, scale_and_shift, transpose_tile
from polywhiten.cpu.tuning import MAX_VECTORIZED_RUN, NEARBY_ROWS, TILE


@device_function
def load_shift(target, array, layout, block):
    """Load a block's first sample, which is subtracted from all of them before they are summed."""
    sample = at(array, block * layout.block_stride)
    for c in range(layout.d):
        put(target, c, get(sample, c * layout.d_stride))


@device_function
def pack_columns(target, ld, panel, centre, workspace):
    """Pack a panel less its centre as columns. The workspace is TILE_WORKSPACE, as in the functions below."""
    layout, count = panel.layout, panel.samples
    block = at(panel.array, panel.block * layout.block_stride)
    outer, j = divmod(panel.start, layout.inner)
    if is_interleaved(layout):
        source, n = at(block, outer * layout.outer_stride), count // layout.inner
        _pack_interleaved(target, ld, layout, source, n, centre, workspace)
    else:
        done = 0
        while done < count:
            n = min(layout.inner - j, count - done)
            for c in range(layout.d):
                run = at(block, c * layout.d_stride + outer * layout.outer_stride + j * layout.inner_stride)
                row, middle = at(target, c * ld + done), get(centre, c)
                if layout.inner_stride == 1:
                    _copy_shifted(row, run, n, -middle)
                else:
                    for t in range(n):
                        put(row, t, get(run, t * layout.inner_stride) - middle)
            done, outer, j = done + n, outer + 1, 0
    clear(at(target, count), ld, layout.d, padded(count) - count)
    clear(at(target, layout.d * ld), ld, padded(layout.d) - layout.d, padded(count))


@device_function
def _pack_interleaved(target, ld, layout, source, n, centre, workspace):
    """Pack n positions along the outer axis, each with (d, inner) adjacent elements."""
    size, lds = layout.d * layout.inner, layout.outer_stride
    clear(workspace, TILE, 2 * TILE, TILE)
    for o in range(0, n, TILE):
        for k in range(0, size, TILE):
            rows, columns = min(TILE, n - o), min(TILE, size - k)
            tile, ld_tile = at(source, o * lds + k), lds
            if rows < TILE or columns < TILE:
                for i in range(rows):
                    for j in range(columns):
                        put(workspace, i * TILE + j, get(tile, i * lds + j))
                tile, ld_tile = workspace, TILE
            transposed = at(workspace, TILE * TILE)
            transpose_tile(transposed, TILE, tile, ld_tile, ())
            c, j = divmod(k, layout.inner)
            for i in range(columns):
                row, line, middle = at(target, c * ld + j * n + o), at(transposed, i * TILE), get(centre, c)
                if rows == TILE:
                    scale_and_shift(row, line, 1.0, -middle)
                else:
                    for t in range(rows):
                        put(row, t, get(line, t) - middle)
                j += 1
                if j == layout.inner:
                    c, j = c + 1, 0


@device_function
def unpack_columns(panel, columns, ld, shift, workspace):
    """Write columns plus a shift of each row to a panel."""
    layout, count = panel.layout, panel.samples
    block = at(panel.array, panel.block * layout.block_stride)
    outer, j = divmod(panel.start, layout.inner)
    if is_interleaved(layout):
        target, n = at(block, outer * layout.outer_stride), count // layout.inner
        _unpack_interleaved(target, layout, n, columns, ld, shift, workspace)
        return
    done = 0
    while done < count:
        n = min(layout.inner - j, count - done)
        for c in range(layout.d):
            run = at(block, c * layout.d_stride + outer * layout.outer_stride + j * layout.inner_stride)
            row, offset = at(columns, c * ld + done), get(shift, c)
            if layout.inner_stride == 1:
                _copy_shifted(run, row, n, offset)
            else:
                for t in range(n):
                    put(run, t * layout.inner_stride, get(row, t) + offset)
        done, outer, j = done + n, outer + 1, 0


@device_function
def _unpack_interleaved(target, layout, n, columns, ld, shift, workspace):
    """Write n positions along the outer axis, each with (d, inner) adjacent elements."""
    size, ldt = layout.d * layout.inner, layout.outer_stride
    clear(workspace, TILE, 2 * TILE, TILE)
    for o in range(0, n, TILE):
        for k in range(0, size, TILE):
            rows, used = min(TILE, n - o), min(TILE, size - k)
            c, j = divmod(k, layout.inner)
            for i in range(used):
                row, line, offset = at(columns, c * ld + j * n + o), at(workspace, i * TILE), get(shift, c)
                if rows == TILE:
                    scale_and_shift(line, row, 1.0, offset)
                else:
                    for t in range(rows):
                        put(line, t, get(row, t) + offset)
                j += 1
                if j == layout.inner:
                    c, j = c + 1, 0
            tile = at(target, o * ldt + k)
            if rows == TILE and used == TILE:
                transpose_tile(tile, ldt, workspace, TILE, ())
            else:
                transposed = at(workspace, TILE * TILE)
                transpose_tile(transposed, TILE, workspace, TILE, ())
                for i in range(rows):
                    for j in range(used):
                        put(tile, i * ldt + j, get(transposed, i * TILE + j))


@device_function
def _copy_shifted(target, source, count, offset):
    """Copy adjacent elements plus an offset."""
    in_tiles = count // TILE * TILE if count < MAX_VECTORIZED_RUN else 0
    for t in range(0, in_tiles, TILE):
        scale_and_shift(at(target, t), at(source, t), 1.0, offset)
    for t in range(in_tiles, count):
        put(target, t, get(source, t) + offset)


@device_function
def pack_rows(target, ld, panel, centre, sums):
    """Pack a panel less its centre as rows, and add the differences up in `sums`. Its d variables are adjacent."""
    layout, count, d = panel.layout, panel.samples, panel.layout.d
    block, done, in_tiles = at(panel.array, panel.block * layout.block_stride), 0, d // TILE * TILE
    outer, j = divmod(panel.start, layout.inner)
    while done < count:
        n = min(layout.inner - j, count - done, NEARBY_ROWS)
        source = at(block, outer * layout.outer_stride + j * layout.inner_stride)
        rows = at(target, done * ld)
        for c in range(0, in_tiles, TILE):
            centre_rows(at(rows, c), ld, at(source, c), layout.inner_stride, n, at(centre, c), at(sums, c))
        for c in range(in_tiles, d):
            total = cast(target, 0.0)
            for t in range(n):
                value = get(source, t * layout.inner_stride + c) - get(centre, c)
                put(rows, t * ld + c, value)
                total += value
            put(sums, c, get(sums, c) + total)
        done, j = done + n, j + n
        if j == layout.inner:
            outer, j = outer + 1, 0
    clear(at(target, d), ld, count, padded(d) - d)
    clear(at(target, count * ld), ld, padded(count) - count, padded(d))


@device_function
def unpack_rows(panel, rows, ld):
    """Write rows to a panel."""
    layout = panel.layout
    block = at(panel.array, panel.block * layout.block_stride)
    outer, j = divmod(panel.start, layout.inner)
    for t in range(panel.samples):
        target = at(block, outer * layout.outer_stride + j * layout.inner_stride)
        row = at(rows, t * ld)
        if layout.d_stride == 1:
            for c in range(layout.d):
                put(target, c, get(row, c))
        else:
            for c in range(layout.d):
                put(target, c * layout.d_stride, get(row, c))
        j += 1
        if j == layout.inner:
            outer, j = outer + 1, 0


@device_function
def transpose(target, ldt, source, lds, m, n, centre):
    """Write (m, n) elements, less a centre of each row, as (n, m). Both sizes are padded."""
    for i in range(0, m, TILE):
        for j in range(0, n, TILE):
            transpose_tile(at(target, j * ldt + i), ldt, at(source, i * lds + j), lds, (at(centre, i),))


@device_function
def pack_run_as_rows(target, ldt, panel, first_centre, second_centre, workspace):
    """Pack a panel that is a run as rows, less two centres one after another."""
    source, lds, n = start_of_run(panel), panel.layout.d_stride, panel.samples
    for i in range(0, panel.layout.d, TILE):
        for j in range(0, n, TILE):
            tile, ld_tile = at(source, i * lds + j), lds
            if n - j < TILE:  # the memory after a run may not belong to the array
                for t in range(n - j):
                    for k in range(min(TILE, panel.layout.d - i)):  # TILE, but LLVM would unroll that for a second
                        put(workspace, k * TILE + t, get(tile, k * lds + t))
                tile, ld_tile = workspace, TILE
            transpose_tile(at(target, j * ldt + i), ldt, tile, ld_tile, (at(first_centre, i), at(second_centre, i)))
