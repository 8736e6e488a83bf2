"""Sums of matrices times blocks."""

from numba import njit

from polywhiten.compiled.panels import (
    APART,
    COLUMNS,
    OWN,
    Channels,
    Place,
    clear,
    layout_at,
    load_columns,
    load_rows,
    multiply_add,
    padded,
    spread,
    store_columns,
    store_rows,
    times,
    transposed,
    width,
)
from polywhiten.compiled.tile import at, get, pointer, put

SOURCES = 11  # where the two terms begin, of which each takes as many, among a kernel's numbers


@njit
def _source_at(numbers, i, scratch):
    """A term matrix (array - centre): its layout, and pointers to array, matrix and centre."""
    array, matrix, centre = numbers[i], numbers[i + 1], numbers[i + 2]
    return layout_at(numbers, i + 3), pointer(array, scratch), pointer(matrix, scratch), pointer(centre, scratch)


def arrange(numbers, scratch, worker):
    """A worker's share of the blocks' matrices, padded, as panels are multiplied with them: side by side, or stacked.

    Numbers: as of `affine_map`.
    """
    workers, terms, as_rows, layout = numbers[0], numbers[1], numbers[2] != 0, layout_at(numbers, 3 * SOURCES)
    arranged = pointer(numbers[3], scratch)
    clear(scratch, 0, 1, padded(layout.d))
    d, dp = layout.d, padded(layout.d)
    depth = terms * dp
    for block in range(worker * layout.blocks // workers, (worker + 1) * layout.blocks // workers):
        own = at(arranged, block * depth * dp)
        clear(own, 0, 1, depth * dp)
        for term in range(terms):
            _, _, matrices, _ = _source_at(numbers, SOURCES * (1 + term), scratch)
            matrix = at(matrices, block * d * d)
            if as_rows and d == dp:
                transposed(at(own, term * d * d), d, matrix, d, d, d, scratch)
            else:
                for i in range(d):
                    for j in range(d):
                        place = (term * dp + j) * dp + i if as_rows else i * depth + term * dp + j
                        put(own, place, get(matrix, i * d + j))


def affine_map(numbers, scratch, worker):
    """A worker's share of the panels of Y, the sum of one or two terms, plus shift (blocks, d).

    Values of the channels that samples are of, 0 for none: the first term's array is multiplied with `before`, the
    result with `after`, and then `bias` is added; panels must not be rows where there are any. Numbers: workers, terms,
    whether panels are rows, the addresses of the arranged matrices, of y, of shift or 0, of these three, and how many
    positions a channel has; for two terms the addresses of array, matrix and centre, and the array's layout; the
    layout of y.
    """
    workers, terms, as_rows, layout = numbers[0], numbers[1], numbers[2] != 0, layout_at(numbers, 3 * SOURCES)
    arranged, target, shift = pointer(numbers[3], scratch), pointer(numbers[4], scratch), pointer(numbers[5], scratch)
    shifted, has_before, has_after, has_bias = numbers[5] != 0, numbers[6] != 0, numbers[7] != 0, numbers[8] != 0
    channels, two = Channels(0, numbers[9]), terms == 2
    x_layout, x, _, centres = _source_at(numbers, SOURCES, scratch)
    other_layout, other, _, other_centres = _source_at(numbers, 2 * SOURCES, scratch)
    blocks, d, count, step = layout.blocks, layout.d, layout.outer * layout.inner, width(layout)
    dp, panels = padded(d), (count + step - 1) // step
    depth = terms * dp
    ld, ldr, ldc = depth + APART, dp + APART, COLUMNS + APART
    panel, result = scratch, at(scratch, max(COLUMNS * ld, depth * ldc))
    zeros = at(result, max(COLUMNS * ldr, dp * ldc))
    line = at(zeros, max(dp, COLUMNS))
    own = at(line, dp)
    before = at(own, OWN)
    after, bias = at(before, dp * ldc), at(before, 2 * dp * ldc)
    clear(zeros, 0, 1, max(dp, COLUMNS) + dp)
    items, blocks_inside = blocks * panels, as_rows or layout.block_stride < layout.outer_stride
    known = (-1, 0)
    for item in range(worker * items // workers, (worker + 1) * items // workers):
        block, start = _item(item, blocks, panels, step, blocks_inside)
        next_block, next_start = _item(item + 1, blocks, panels, step, blocks_inside)
        n, left = min(step, count - start), min(step, count - next_start) if item + 1 < items else 0
        here, there = Place(x, x_layout, block, start, n), Place(other, other_layout, block, start, n)
        place = Place(target, layout, block, start, n)
        ahead = (
            Place(x, x_layout, next_block, next_start, left),
            Place(other, other_layout, next_block, next_start, left if two else 0),
            place,
        )
        matrix, centre = at(arranged, block * depth * dp), at(centres, block * d)
        for c in range(d):
            put(line, c, get(shift, block * d + c) if shifted else 0.0)
        if as_rows:
            load_rows(panel, ld, here, centre)
            if two:
                load_rows(at(panel, dp), ld, there, at(other_centres, block * d))
            multiply_add(result, ldr, line, 0, panel, ld, 1, matrix, dp, padded(n), dp, depth, False, ahead, 3)
            store_rows(place, result, ldr)
            continue
        if known != (start % layout.inner, n):  # else channels lie along the samples as in the last panel
            known = (start % layout.inner, n)
            if has_before:
                spread(before, ldc, pointer(numbers[6], scratch), channels, here)
            if has_after:
                spread(after, ldc, pointer(numbers[7], scratch), channels, here)
            if has_bias:
                spread(bias, ldc, pointer(numbers[8], scratch), channels, here)
        if has_before:
            load_columns(panel, ldc, here, zeros, own)
            times(panel, before, ldc, d, n)
            for c in range(d):
                row, middle = at(panel, c * ldc), get(centre, c)
                for t in range(n):
                    put(row, t, get(row, t) - middle)
        else:
            load_columns(panel, ldc, here, centre, own)
        if two:
            load_columns(at(panel, dp * ldc), ldc, there, at(other_centres, block * d), own)
        multiply_add(result, ldc, zeros, 0, matrix, depth, 1, panel, ldc, dp, padded(n), depth, False, ahead, 3)
        if has_after:
            times(result, after, ldc, d, n)
        if has_bias:
            for c in range(d):
                row, offsets = at(result, c * ldc), at(bias, c * ldc)
                for t in range(n):
                    put(row, t, get(row, t) + get(offsets, t))
        store_columns(place, result, ldc, line, own)


@njit
def _item(item, blocks, panels, step, blocks_inside):
    """Block and first sample of the panel that comes in that place."""
    if blocks_inside:
        panel, block = divmod(item, blocks)
    else:
        block, panel = divmod(item, panels)
    return block, panel * step
