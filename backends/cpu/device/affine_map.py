"""Sums of matrices times blocks."""

from numba import njit

from polywhiten.cpu.device.gemm import chunks_of_a_tile, list_lines, multiply_add, multiply_listed
from polywhiten.cpu.device.packing import (
    APART,
    COLUMNS,
    Channels,
    Place,
    clear,
    layout_at,
    load_columns,
    load_rows,
    padded,
    panels_memory,
    part,
    scale_channels,
    store_columns,
    store_rows,
    transposed,
    width,
)
from polywhiten.cpu.device.simd import UNIT, at, fence, get, integers, is_null, pointer, put

# among the numbers: where the terms begin, how many each takes, the layout of y, and the weight
_TERMS, _TERM, _Y, _WEIGHT = 12, 11, 34, 42


@njit
def _term_at(numbers, k, scratch):
    """A term matrix (array - centre): its layout, and pointers to array, matrix and centre."""
    i = _TERMS + _TERM * k
    array, matrix, centre = numbers[i], numbers[i + 1], numbers[i + 2]
    return layout_at(numbers, i + 3), pointer(array, scratch), pointer(matrix, scratch), pointer(centre, scratch)


def arrange(numbers, scratch, share):
    """A share of the blocks' matrices, padded, as panels are multiplied with them: side by side, or stacked.

    The first ones' rows are multiplied with the weight (blocks, d), if there is one. Numbers: as of `affine_map`.
    """
    shares, terms, as_rows, layout = numbers[0], numbers[1], numbers[2] != 0, layout_at(numbers, _Y)
    arranged, weight = pointer(numbers[3], scratch), pointer(numbers[_WEIGHT], scratch)
    clear(scratch, 0, 1, padded(layout.d))
    d, dp = layout.d, padded(layout.d)
    depth = terms * dp
    for block in range(share * layout.blocks // shares, (share + 1) * layout.blocks // shares):
        own = at(arranged, block * depth * dp)
        clear(own, 0, 1, depth * dp)
        for term in range(terms):
            _, _, matrices, _ = _term_at(numbers, term, scratch)
            matrix = at(matrices, block * d * d)
            if as_rows and d == dp:
                transposed(at(own, term * d * d), d, matrix, d, d, d, scratch)
            else:
                for i in range(d):
                    for j in range(d):
                        place = (term * dp + j) * dp + i if as_rows else i * depth + term * dp + j
                        put(own, place, get(matrix, i * d + j))
        if not is_null(weight):
            for i in range(d):
                row = at(own, i * (dp if as_rows else depth))
                for j in range(d):
                    put(row, j, get(row, j) * get(weight, block * d + (j if as_rows else i)))


def affine_map(numbers, scratch, share):
    """A share of the panels of Y, the sum of one or two terms, plus shift (blocks, d) in the end.

    Values of the channels that samples are of, 0 for none: the first term's array is multiplied with `before`, or the
    result with `after`, and `bias` is added to it; panels must not be rows where there are any. Numbers: shares, terms,
    whether panels are rows, the addresses of the arranged matrices, of y, of shift or 0, of these three, how many
    positions a channel has, whether panels are counted before blocks, and whether rows go past the caches; for two
    terms the addresses of array, matrix and centre, and the array's layout; the layout of y; the address of a weight or
    0, which `arrange` alone asks for.
    """
    shares, terms, as_rows, layout = numbers[0], numbers[1], numbers[2] != 0, layout_at(numbers, _Y)
    arranged, target, shift = pointer(numbers[3], scratch), pointer(numbers[4], scratch), pointer(numbers[5], scratch)
    before, after, bias = pointer(numbers[6], scratch), pointer(numbers[7], scratch), pointer(numbers[8], scratch)
    channels, two = Channels(0, numbers[9]), terms == 2
    x_layout, x, _, centres = _term_at(numbers, 0, scratch)
    other_layout, other, _, other_centres = _term_at(numbers, 1, scratch)
    blocks, d, count, step = layout.blocks, layout.d, layout.outer * layout.inner, width(layout)
    dp, panels = padded(d), (count + step - 1) // step
    depth = terms * dp
    ldc = COLUMNS + APART
    panel, result = scratch, at(scratch, max(COLUMNS * (depth + APART), depth * ldc))
    zeros = at(result, dp * ldc)
    line = at(zeros, max(dp, COLUMNS))
    own, lines = at(line, dp), integers(at(scratch, panels_memory(d)))
    clear(zeros, 0, 1, max(dp, COLUMNS) + dp)
    items, panels_first, past = blocks * panels, numbers[10] != 0, numbers[11] != 0
    for item in range(share * items // shares, (share + 1) * items // shares):
        block, start = _item(item, blocks, panels, step, panels_first)
        next_block, next_start = _item(item + 1, blocks, panels, step, panels_first)
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
            put(line, c, 0.0 if is_null(shift) else get(shift, block * d + c))
        if as_rows:
            two_centres = centre, at(other_centres, block * d)
            _map_rows(place, here, there, terms, two_centres, matrix, line, panel, result, ahead, lines, past)
            continue
        if is_null(before):
            load_columns(panel, ldc, here, centre, own)
        else:
            load_columns(panel, ldc, here, zeros, own)
            scale_channels(panel, ldc, here, channels, before, bias, centre)
        if two:
            load_columns(at(panel, dp * ldc), ldc, there, at(other_centres, block * d), own)
        multiply_add(result, ldc, zeros, 0, matrix, depth, 1, panel, ldc, dp, padded(n), depth, False, ahead, 3, lines)
        if not is_null(after):
            scale_channels(result, ldc, here, channels, after, bias, zeros)
        store_columns(place, result, ldc, line, own)
    if past:
        fence()


@njit
def _map_rows(place, x, other, terms, centres, matrix, line, panel, result, ahead, lines, past):
    """Of a panel, few rows after another: they are read while the products of those before are computed."""
    layout, n, d = place.layout, place.samples, place.layout.d
    dp = padded(d)
    depth, several = terms * dp, UNIT * max(1, 8 * UNIT // dp)
    ld, tiles = depth + APART, padded(n) // UNIT * (dp // UNIT)
    begin, (end, each) = 0, list_lines(lines, tiles * chunks_of_a_tile(line, depth), ahead, 2)
    are_direct = d == dp and layout.outer == 1 and layout.d_stride == 1
    for first in range(0, n, several):
        some = min(several, n - first)
        load_rows(panel, ld, part(x, first, some), centres[0], result)  # sums that nobody asks for
        if terms == 2:
            load_rows(at(panel, dp), ld, part(other, first, some), centres[1], result)
        for i in range(0, some, UNIT):
            goal, lead, is_direct = result, dp, are_direct and i + UNIT <= some
            if is_direct:
                lead = layout.inner_stride
                goal = at(place.array, place.block * layout.block_stride + (place.start + first + i) * lead)
            rows, is_past = at(panel, i * ld), past and is_direct
            begin = multiply_listed(
                goal, lead, line, 0, rows, ld, 1, matrix, dp, UNIT, dp, depth, False, is_past, lines, begin, end, each
            )
            if not is_direct:
                store_rows(part(place, first + i, min(UNIT, some - i)), result, dp)


@njit
def _item(item, blocks, panels, step, panels_first):
    """Block and first sample of the panel that comes in that place."""
    if panels_first:
        panel, block = divmod(item, blocks)
    else:
        block, panel = divmod(item, panels)
    return block, panel * step
