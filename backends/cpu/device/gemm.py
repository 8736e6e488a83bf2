"""Products of panels, and the memory that is asked for meanwhile: for the next panels, line by line."""

from numba import njit

from polywhiten.cpu.device.packing import COLUMNS, NEAR, padded
from polywhiten.cpu.device.simd import CHUNK, LINE, UNIT, WIDE, address, at, blocks_of_a_tile, put, tile

PLACES = 3  # that memory is asked for at most


def list_memory(d):
    """Numbers that the list of lines takes at most, of float32; of float64 half of them would do."""
    return 2 * PLACES * _most_lines.py_func(d)


@njit
def multiply_add(c, ldc, base, ld_base, a, row, column, b, ldb, m, n, k, upper, ahead, places, lines):
    """C = base + A B, of padded sizes; where `upper`, only the tiles on the diagonal and above it.

    Memory is asked for the first so many `places` in `ahead` meanwhile; `lines` has room for their list.
    """
    tiles = m // UNIT * (n // UNIT)
    if upper:
        tiles = (tiles + m // UNIT) // 2
    end, each = list_lines(lines, tiles * chunks_of_a_tile(c, k), ahead, places)
    multiply_listed(c, ldc, base, ld_base, a, row, column, b, ldb, m, n, k, upper, False, lines, 0, end, each)


@njit
def multiply_listed(c, ldc, base, ld_base, a, row, column, b, ldb, m, n, k, upper, past, lines, begin, end, each):
    """As `multiply_add`, or past the caches, with a list that is there, from `begin` on; the place that it came to."""
    chunks = chunks_of_a_tile(c, k)
    for pair in range(0, n, WIDE):
        for i in range(0, min(m, pair + WIDE) if upper else m, UNIT):
            j = pair + UNIT if upper and i > pair else pair
            columns = min(n, pair + WIDE) - j
            own, start, first, second = at(c, i * ldc + j), at(base, i * ld_base + j), at(a, i * row), at(b, j)
            of_c, of_a = (own, ldc, 1.0, start, ld_base, 1.0), (first, row, column)
            tile(*of_c, *of_a, second, ldb, k, past, columns, lines, begin, end, each)
            begin += each * chunks * (columns // UNIT)
    return begin


@njit
def chunks_of_a_tile(like, k):
    """Of UNIT columns and k steps: so often it can ask for memory."""
    return blocks_of_a_tile(like) * ((k + CHUNK - 1) // CHUNK)


@njit
def list_lines(lines, chunks, ahead, places):
    """List the first so many places in `ahead`: how many lines these are, and how many to ask for before every chunk.

    Asked for all at once, they would keep waiting what the products read.
    """
    count = 0
    for place in range(places):
        count = _listed(lines, count, (place + 1) * _most_lines(ahead[place].layout.d), ahead[place])
    return count, (count + chunks - 1) // chunks


@njit
def _most_lines(d):
    """Of a panel that are asked for."""
    return (2 * COLUMNS // UNIT + 4) * padded(d)


@njit
def _listed(lines, count, most, place):
    """Go on with a list up to so many lines."""
    layout = place.layout
    outer, j = divmod(place.start, layout.inner)
    row = at(place.array, place.block * layout.block_stride + outer * layout.outer_stride)
    done = 0
    while done < place.samples:
        n = min(layout.inner - j, place.samples - done)
        if layout.d_stride == 1:
            count = _rows(lines, count, most, at(row, j * layout.inner_stride), layout, n)
        elif layout.inner_stride == 1 and layout.d_stride == layout.inner and n == layout.inner:
            count = _run(lines, count, most, row, layout.d * n)
        elif layout.inner_stride == 1:
            for c in range(layout.d):
                count = _run(lines, count, most, at(row, c * layout.d_stride + j), n)
        row, done, j = at(row, layout.outer_stride), done + n, 0
    return count


@njit
def _rows(lines, count, most, start, layout, n):
    """Go on with those of so many rows."""
    distance = address(at(start, layout.inner_stride)) - address(start)
    if distance % LINE != 0:
        for t in range(n):
            count = _run(lines, count, most, at(start, t * layout.inner_stride), layout.d)
        return count
    first = address(start) // LINE * LINE
    number = (address(at(start, layout.d)) + LINE - 1 - first) // LINE
    for t in range(0, n, NEAR):
        for i in range(number):  # the first line of every row, then the second one: LLVM has vectors for that
            some = min(NEAR, n - t, most - count)
            for k in range(some):
                put(lines, count + k, first + (t + k) * distance + i * LINE)
            count += some
    return count


@njit
def _run(lines, count, most, start, n):
    first = address(start) // LINE
    number = min((address(at(start, n)) + LINE - 1) // LINE - first, most - count)
    for i in range(number):
        put(lines, count + i, (first + i) * LINE)
    return count + number
