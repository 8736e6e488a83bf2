"""Parts of a block that stay in the cache: read from any strides, and written to them.

A panel has up to COLUMNS samples. As *rows* it is (samples, d), as *columns* (d, samples); both sizes are padded to
multiples of a tile, and lines are APART numbers longer than that, so that they don't share places in the cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import njit

from polywhiten.cpu.device.simd import (
    UNIT,
    at,
    centred_rows,
    gathered,
    get,
    number,
    put,
    scaled,
    transposed_tile,
)

COLUMNS = 256
APART = UNIT
NEAR = 4 * UNIT  # rows that are gone through column by column: the pages of more aren't all at hand
OWN = max(3 * UNIT * UNIT, 2 * COLUMNS)  # numbers that what loads and stores columns and `gather_channels` work in


class Layout(NamedTuple):
    """Where the numbers of blocks are: (blocks, outer, d, inner) and the strides of these, in numbers.

    A block's samples are counted by (outer, inner). Where inner is small and the d variables are adjacent to it, panels
    of columns are *interleaved*: their samples are counted by (inner, outer), a transposition of what is in memory.
    """

    blocks: int
    outer: int
    d: int
    inner: int
    block_stride: int
    outer_stride: int
    d_stride: int
    inner_stride: int


class Place(NamedTuple):
    """Where a panel is: in an array of that layout, so many samples of a block."""

    array: Any  # pointer to its first number
    layout: Layout
    block: int
    start: int
    samples: int


@njit
def part(place, first, samples):
    """Of a panel: so many samples from that one on."""
    return Place(place.array, place.layout, place.block, place.start + first, samples)


class Channels(NamedTuple):
    """How channels lie along samples: each has so many adjacent positions of (inner)."""

    number: int
    positions: int


@njit
def padded(n):
    return (n + UNIT - 1) // UNIT * UNIT


@njit
def panels_memory(d):
    """Numbers that the largest kernel's panels take, and what else it works in; what products take comes after."""
    dp = padded(d)
    panel = COLUMNS * (dp + APART) + dp * (COLUMNS + APART)
    return 3 * panel + 2 * dp * dp + 4 * COLUMNS + 4 * dp + OWN


@njit
def is_interleaved(layout):
    return layout.inner < UNIT and layout.d_stride == layout.inner and (layout.inner_stride == 1 or layout.inner == 1)


@njit
def width(layout):
    """Samples of a panel: whole runs of (inner), where these are shorter; else nearly the same for all."""
    inner = layout.inner
    if is_interleaved(layout):
        return COLUMNS // inner // UNIT * UNIT * inner
    if 2 * inner <= COLUMNS:
        return COLUMNS // inner * inner
    count = layout.outer * inner
    panels = (count + COLUMNS - 1) // COLUMNS
    return padded((count + panels - 1) // panels)


@njit
def width_of_runs(layout):
    """As `width`, such that each panel is a run where (inner) has a divisor from half of COLUMNS to COLUMNS."""
    if layout.inner_stride == 1 and layout.d % UNIT == 0 and not is_interleaved(layout):
        for n in range(min(COLUMNS, layout.inner), COLUMNS // 2 - 1, -1):
            if layout.inner % n == 0:
                return n
    return width(layout)


@njit
def is_run(place):
    """Whether a panel's samples are adjacent, of d rows that need no padding."""
    layout = place.layout
    whole = place.start % layout.inner + place.samples <= layout.inner
    return whole and layout.inner_stride == 1 and layout.d_stride != 1 and layout.d % UNIT == 0


@njit
def run_of(place):
    """Its first number."""
    layout = place.layout
    outer, j = divmod(place.start, layout.inner)
    return at(place.array, place.block * layout.block_stride + outer * layout.outer_stride + j)


@njit
def shift_run(target, source, count, offset):
    """Adjacent numbers plus an offset."""
    whole = count // UNIT * UNIT if count < 4 * UNIT else 0  # for more, LLVM's own loop is the faster one
    for t in range(0, whole, UNIT):
        scaled(at(target, t), at(source, t), 1.0, offset)
    for t in range(whole, count):
        put(target, t, get(source, t) + offset)


@njit
def load_columns(target, ld, place, centre, own):
    """A panel less its centre, as columns; `own` is memory for a tile."""
    layout, count = place.layout, place.samples
    block = at(place.array, place.block * layout.block_stride)
    outer, j = divmod(place.start, layout.inner)
    if is_interleaved(layout):
        _load_interleaved(
            target, ld, layout, at(block, outer * layout.outer_stride), count // layout.inner, centre, own
        )
    else:
        done = 0
        while done < count:
            n = min(layout.inner - j, count - done)
            for c in range(layout.d):
                run = at(block, c * layout.d_stride + outer * layout.outer_stride + j * layout.inner_stride)
                row, middle = at(target, c * ld + done), get(centre, c)
                if layout.inner_stride == 1:
                    shift_run(row, run, n, -middle)
                else:
                    for t in range(n):
                        put(row, t, get(run, t * layout.inner_stride) - middle)
            done, outer, j = done + n, outer + 1, 0
    clear(at(target, count), ld, layout.d, padded(count) - count)
    clear(at(target, layout.d * ld), ld, padded(layout.d) - layout.d, padded(count))


@njit
def _load_interleaved(target, ld, layout, source, n, centre, own):
    size, lines, zeros = layout.d * layout.inner, layout.outer_stride, at(own, 2 * UNIT * UNIT)
    clear(own, UNIT, 2 * UNIT + 1, UNIT)
    for o in range(0, n, UNIT):
        for k in range(0, size, UNIT):
            rows, columns = min(UNIT, n - o), min(UNIT, size - k)
            given, ld_given = at(source, o * lines + k), lines
            if rows < UNIT or columns < UNIT:
                for i in range(rows):
                    for j in range(columns):
                        put(own, i * UNIT + j, get(given, i * lines + j))
                given, ld_given = own, UNIT
            turned = at(own, UNIT * UNIT)
            transposed_tile(turned, UNIT, given, ld_given, (zeros,))
            c, j = divmod(k, layout.inner)
            for i in range(columns):
                row, line, middle = at(target, c * ld + j * n + o), at(turned, i * UNIT), get(centre, c)
                if rows == UNIT:
                    scaled(row, line, 1.0, -middle)
                else:
                    for t in range(rows):
                        put(row, t, get(line, t) - middle)
                j += 1
                if j == layout.inner:
                    c, j = c + 1, 0


@njit
def store_columns(place, columns, ld, shift, own):
    """A panel of columns plus a shift of each row, to its place."""
    layout, count = place.layout, place.samples
    block = at(place.array, place.block * layout.block_stride)
    outer, j = divmod(place.start, layout.inner)
    if is_interleaved(layout):
        _store_interleaved(
            at(block, outer * layout.outer_stride), layout, count // layout.inner, columns, ld, shift, own
        )
        return
    done = 0
    while done < count:
        n = min(layout.inner - j, count - done)
        for c in range(layout.d):
            run = at(block, c * layout.d_stride + outer * layout.outer_stride + j * layout.inner_stride)
            row, value = at(columns, c * ld + done), get(shift, c)
            if layout.inner_stride == 1:
                shift_run(run, row, n, value)
            else:
                for t in range(n):
                    put(run, t * layout.inner_stride, get(row, t) + value)
        done, outer, j = done + n, outer + 1, 0


@njit
def _store_interleaved(target, layout, n, columns, ld, shift, own):
    size, lines, zeros = layout.d * layout.inner, layout.outer_stride, at(own, 2 * UNIT * UNIT)
    clear(own, UNIT, 2 * UNIT + 1, UNIT)
    for o in range(0, n, UNIT):
        for k in range(0, size, UNIT):
            rows, numbers = min(UNIT, n - o), min(UNIT, size - k)
            c, j = divmod(k, layout.inner)
            for i in range(numbers):
                row, line, value = at(columns, c * ld + j * n + o), at(own, i * UNIT), get(shift, c)
                if rows == UNIT:
                    scaled(line, row, 1.0, value)
                else:
                    for t in range(rows):
                        put(line, t, get(row, t) + value)
                j += 1
                if j == layout.inner:
                    c, j = c + 1, 0
            place = at(target, o * lines + k)
            if rows == UNIT and numbers == UNIT:
                transposed_tile(place, lines, own, UNIT, (zeros,))
            else:
                turned = at(own, UNIT * UNIT)
                transposed_tile(turned, UNIT, own, UNIT, (zeros,))
                for i in range(rows):
                    for j in range(numbers):
                        put(place, i * lines + j, get(turned, i * UNIT + j))


@njit
def load_first(target, array, layout, block):
    """A block's first sample."""
    sample = at(array, block * layout.block_stride)
    for c in range(layout.d):
        put(target, c, get(sample, c * layout.d_stride))


@njit
def load_rows(target, ld, place, centre, sums):
    """A panel less its centre, as rows; what they add up to is added to `sums`. Channels are adjacent."""
    layout, count, d = place.layout, place.samples, place.layout.d
    block, done, whole = at(place.array, place.block * layout.block_stride), 0, d // UNIT * UNIT
    outer, j = divmod(place.start, layout.inner)
    while done < count:
        n = min(layout.inner - j, count - done, NEAR)
        source = at(block, outer * layout.outer_stride + j * layout.inner_stride)
        rows = at(target, done * ld)
        for c in range(0, whole, UNIT):
            centred_rows(at(rows, c), ld, at(source, c), layout.inner_stride, n, at(centre, c), at(sums, c))
        for c in range(whole, d):
            total = number(target, 0.0)
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


@njit
def store_rows(place, rows, ld):
    """A panel of rows to its place."""
    layout = place.layout
    block = at(place.array, place.block * layout.block_stride)
    outer, j = divmod(place.start, layout.inner)
    for t in range(place.samples):
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


@njit(fastmath={"reassoc"})
def total_of(numbers, count):
    value = get(numbers, 0)
    for t in range(1, count):
        value += get(numbers, t)
    return value


@njit(fastmath={"reassoc"})
def total_about(numbers, count, offset):
    """Of numbers less an offset."""
    value = get(numbers, 0) - offset
    for t in range(1, count):
        value += get(numbers, t) - offset
    return value


@njit
def sum_columns(sums, columns, ld, d, count):
    """Add those of each of d rows."""
    for c in range(d):
        put(sums, c, get(sums, c) + total_of(at(columns, c * ld), count))


@njit
def clear(target, ld, m, n):
    for i in range(m):
        row = at(target, i * ld)
        for j in range(n):
            put(row, j, 0.0)


@njit
def transposed(target, ldt, source, lds, m, n, centre):
    """Rows (m, n) less their centres as columns (n, m), of padded sizes."""
    for i in range(0, m, UNIT):
        for j in range(0, n, UNIT):
            transposed_tile(at(target, j * ldt + i), ldt, at(source, i * lds + j), lds, (at(centre, i),))


@njit
def transposed_run(target, ldt, place, centre, second, own):
    """A panel that is a run, less its centre and the second one, as rows; `own` is memory for a tile."""
    source, lds, n = run_of(place), place.layout.d_stride, place.samples
    for i in range(0, place.layout.d, UNIT):
        for j in range(0, n, UNIT):
            given, ld_given = at(source, i * lds + j), lds
            if n - j < UNIT:  # what comes after a run may be nobody's memory
                for k in range(UNIT):
                    for t in range(n - j):
                        put(own, k * UNIT + t, get(given, k * lds + t))
                given, ld_given = own, UNIT
            transposed_tile(at(target, j * ldt + i), ldt, given, ld_given, (at(centre, i), at(second, i)))


@njit
def has_runs(layout, channels):
    """Whether adjacent samples of a panel are of one channel."""
    return is_interleaved(layout) or channels.positions > 1


@njit(fastmath={"reassoc"})
def gather_channels(gradient, white, ld, place, channels, weight, sums, parameters, own):
    """What a panel of dY gives to its channels and rows, where adjacent samples are of different channels.

    Added are: to each channel's two `parameters` (2, channels) the sums of dY times the whitened samples, and of dY; to
    `sums` those of the rows of dY times the weight, which dY itself is multiplied by. `own` has 2 COLUMNS numbers.
    """
    inner, products, totals = place.layout.inner, own, at(own, COLUMNS)
    dweight, dbias = parameters, at(parameters, channels.number)
    start, j = 0, place.start % inner
    while start < place.samples:
        n, repeats = min(inner - j, place.samples - start), 1
        if j == 0 and n == inner:
            repeats = (place.samples - start) // inner  # whole runs
        whole = n // UNIT * UNIT
        for c in range(place.layout.d):
            k = c * inner + j
            clear(products, 0, 1, n)
            clear(totals, 0, 1, n)
            for repeat in range(repeats):
                row, other = at(gradient, c * ld + start + repeat * n), at(white, c * ld + start + repeat * n)
                for t in range(0, whole, UNIT):
                    gathered(at(products, t), at(totals, t), at(row, t), at(other, t))
                    scaled(at(row, t), at(row, t), at(weight, k + t), 0.0)
                for t in range(whole, n):
                    value = get(row, t)
                    put(products, t, get(products, t) + value * get(other, t))
                    put(totals, t, get(totals, t) + value)
                    put(row, t, value * get(weight, k + t))
            row_sum = number(sums, 0.0)
            for t in range(n):
                put(dweight, k + t, get(dweight, k + t) + get(products, t))
                put(dbias, k + t, get(dbias, k + t) + get(totals, t))
                row_sum += get(totals, t) * get(weight, k + t)
            put(sums, c, get(sums, c) + row_sum)
        start, j = start + repeats * n, (j + n) % inner


@njit
def scale_channels(columns, ld, place, channels, weight, bias, centre):
    """A panel of columns times its channels' weight, plus their bias, less centres of rows."""
    layout, done, j = place.layout, 0, place.start % place.layout.inner
    runs, of_row = has_runs(layout, channels), layout.inner // channels.positions
    while done < place.samples:
        n, following = channel_run(place, channels, done, j)
        first, whole = j // channels.positions, n // UNIT * UNIT
        for c in range(layout.d):
            row, k, middle = at(columns, c * ld + done), c * of_row + first, get(centre, c)
            if runs:
                factor, offset = get(weight, k), get(bias, k) - middle
                for t in range(n):
                    put(row, t, get(row, t) * factor + offset)
            else:
                for t in range(0, whole, UNIT):
                    scaled(at(row, t), at(row, t), at(weight, k + t), at(bias, k + t))
                    scaled(at(row, t), at(row, t), 1.0, -middle)
                for t in range(whole, n):
                    put(row, t, get(row, t) * get(weight, k + t) + (get(bias, k + t) - middle))
        done, j = done + n, following


@njit
def channel_run(place, channels, done, j):
    """From position j of (inner) on: adjacent samples of one channel, or of one after another; the position after."""
    inner, left = place.layout.inner, place.samples - done
    if is_interleaved(place.layout):
        n, j = place.samples // inner, j + 1
    else:
        n = min(channels.positions - j % channels.positions if channels.positions > 1 else inner - j, left)
        j += n
    return n, 0 if j == inner else j
