"""Lists of the cache lines of panels, which are prefetched a few at a time.

Prefetched all at once, they would delay what the products read.
"""

from typing import Any, NamedTuple

from polywhiten.cpu.device.device_function import device_function
from polywhiten.cpu.device.panels import padded
from polywhiten.cpu.device.pointers import address, at, put
from polywhiten.cpu.device.simd import CACHE_LINE
from polywhiten.cpu.tuning import NEARBY_ROWS, PANEL_WIDTH, TILE

MAX_PANELS = 3  # in a list


class Prefetch(NamedTuple):
    """Panels to prefetch."""

    panels: Any  # a tuple of MAX_PANELS
    num_panels: int  # how many of them are prefetched, the first ones
    addresses: Any  # pointer to int64, with room for the list of their lines


class PrefetchList(NamedTuple):
    """Addresses of cache lines, some of which are prefetched in each interval of a product."""

    addresses: Any  # pointer to int64
    begin: int
    end: int
    per_interval: int


@device_function
def prefetch_list_size(d):
    """Return how many elements of float32 a list needs at most; of float64, half as many would do."""
    return 2 * MAX_PANELS * _max_lines(d)


@device_function
def list_lines(prefetch, num_intervals):
    """Return the list of all panels' lines, which lasts for that number of intervals."""
    count = 0
    for i in range(prefetch.num_panels):
        panel = prefetch.panels[i]
        count = _append_panel(prefetch.addresses, count, (i + 1) * _max_lines(panel.layout.d), panel)
    return PrefetchList(prefetch.addresses, 0, count, (count + num_intervals - 1) // num_intervals)


@device_function
def _max_lines(d):
    """Return how many lines of a panel are listed at most."""
    return (2 * PANEL_WIDTH // TILE + 4) * padded(d)


@device_function
def _append_panel(addresses, count, limit, panel):
    """Append the lines of a panel to a list of `count` lines, up to a limit; return the new count."""
    layout = panel.layout
    outer, j = divmod(panel.start, layout.inner)
    row = at(panel.array, panel.block * layout.block_stride + outer * layout.outer_stride)
    done = 0
    while done < panel.samples:
        n = min(layout.inner - j, panel.samples - done)
        if layout.d_stride == 1:
            count = _append_rows(addresses, count, limit, at(row, j * layout.inner_stride), layout, n)
        elif layout.inner_stride == 1 and layout.d_stride == layout.inner and n == layout.inner:
            count = _append_run(addresses, count, limit, row, layout.d * n)
        elif layout.inner_stride == 1:
            for c in range(layout.d):
                count = _append_run(addresses, count, limit, at(row, c * layout.d_stride + j), n)
        row, done, j = at(row, layout.outer_stride), done + n, 0
    return count


@device_function
def _append_rows(addresses, count, limit, start, layout, n):
    """Append the lines of n rows of d adjacent elements."""
    distance = address(at(start, layout.inner_stride)) - address(start)
    if distance % CACHE_LINE != 0:
        for t in range(n):
            count = _append_run(addresses, count, limit, at(start, t * layout.inner_stride), layout.d)
        return count
    first = address(start) // CACHE_LINE * CACHE_LINE
    lines_per_row = (address(at(start, layout.d)) + CACHE_LINE - 1 - first) // CACHE_LINE
    for t in range(0, n, NEARBY_ROWS):
        for i in range(lines_per_row):  # the first line of every row, then the second one: LLVM vectorizes this
            some = min(NEARBY_ROWS, n - t, limit - count)
            for k in range(some):
                put(addresses, count + k, first + (t + k) * distance + i * CACHE_LINE)
            count += some
    return count


@device_function
def _append_run(addresses, count, limit, start, n):
    """Append the lines of n adjacent elements."""
    first = address(start) // CACHE_LINE
    number = min((address(at(start, n)) + CACHE_LINE - 1) // CACHE_LINE - first, limit - count)
    for i in range(number):
        put(addresses, count + i, (first + i) * CACHE_LINE)
    return count + number
