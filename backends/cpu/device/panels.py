"""Panels: how blocks lie in memory, and how they are cut into parts that stay in the cache.

A panel has up to PANEL_WIDTH samples. Packed as *rows* it is (samples, d), packed as *columns* (d, samples). Both sizes
are padded to multiples of a tile, and lines are LD_PADDING elements longer than that, so that the elements of a column
don't all compete for the same places in the cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from polywhiten.cpu.device.device_function import device_function
from polywhiten.cpu.device.pointers import at
from polywhiten.cpu.tuning import LD_PADDING, PANEL_WIDTH, TILE

# elements of workspace that packing and `gather_channels` need
TILE_WORKSPACE = max(2 * TILE * TILE, 2 * PANEL_WIDTH)


class Layout(NamedTuple):
    """Where the elements of blocks are: (blocks, outer, d, inner) and the strides of these axes, in elements.

    A block's samples are counted by (outer, inner). Where inner is small and the d variables are adjacent to it, panels
    of columns are *interleaved*: their samples are counted by (inner, outer), and packing transposes what is in memory.
    """

    blocks: int
    outer: int
    d: int
    inner: int
    block_stride: int
    outer_stride: int
    d_stride: int
    inner_stride: int


class Panel(NamedTuple):
    """Some adjacent samples of a block."""

    array: Any  # pointer to the first element of all blocks
    layout: Layout
    block: int
    start: int
    samples: int


@device_function
def subpanel(panel, first, samples):
    """Return the panel's samples from the first one on."""
    return Panel(panel.array, panel.layout, panel.block, panel.start + first, samples)


@device_function
def padded(n):
    """Return the next multiple of a tile's size."""
    return (n + TILE - 1) // TILE * TILE


@device_function
def panel_workspace_size(d):
    """Return how many elements the largest kernel works in. The prefetch list is stored after them."""
    dp = padded(d)
    panel = PANEL_WIDTH * (dp + LD_PADDING) + dp * (PANEL_WIDTH + LD_PADDING)
    return 3 * panel + 2 * dp * dp + 4 * PANEL_WIDTH + 4 * dp + TILE_WORKSPACE


@device_function
def is_interleaved(layout):
    return layout.inner < TILE and layout.d_stride == layout.inner and (layout.inner_stride == 1 or layout.inner == 1)


@device_function
def panel_width(layout):
    """Return the number of samples in a panel: a multiple of a short inner axis, else nearly equal for all panels."""
    inner = layout.inner
    if is_interleaved(layout):
        return PANEL_WIDTH // inner // TILE * TILE * inner
    if 2 * inner <= PANEL_WIDTH:
        return PANEL_WIDTH // inner * inner
    count = layout.outer * inner
    panels = (count + PANEL_WIDTH - 1) // PANEL_WIDTH
    return padded((count + panels - 1) // panels)


@device_function
def panel_width_for_runs(layout):
    """Return `panel_width`, or a divisor of the inner axis that makes every panel a run.

    Only divisors from half of PANEL_WIDTH to all of it are large enough.
    """
    if layout.inner_stride == 1 and layout.d % TILE == 0 and not is_interleaved(layout):
        for n in range(min(PANEL_WIDTH, layout.inner), PANEL_WIDTH // 2 - 1, -1):
            if layout.inner % n == 0:
                return n
    return panel_width(layout)


@device_function
def is_run(panel):
    """Return whether the panel is a *run*: its samples are adjacent in each of d rows, and d needs no padding."""
    layout = panel.layout
    is_contiguous = panel.start % layout.inner + panel.samples <= layout.inner
    return is_contiguous and layout.inner_stride == 1 and layout.d_stride != 1 and layout.d % TILE == 0


@device_function
def start_of_run(panel):
    """Return a pointer to the first element of a panel that is a run."""
    layout = panel.layout
    outer, j = divmod(panel.start, layout.inner)
    return at(panel.array, panel.block * layout.block_stride + outer * layout.outer_stride + j)
