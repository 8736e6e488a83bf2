"""Weight and bias of channels that lie along a block's samples, as in group whitening."""

from typing import NamedTuple

from polywhiten.cpu.device.device_function import device_function
from polywhiten.cpu.device.panels import is_interleaved
from polywhiten.cpu.device.pointers import at, cast, clear, get, put
from polywhiten.cpu.device.simd import accumulate, scale_and_shift
from polywhiten.cpu.tuning import PANEL_WIDTH, TILE


class Channels(NamedTuple):
    """The number of channels, and how many adjacent positions along the inner axis belong to each."""

    number: int
    positions: int


@device_function
def has_channel_runs(layout, channels):
    """Return whether adjacent samples of a panel belong to the same channel."""
    return is_interleaved(layout) or channels.positions > 1


@device_function
def channel_run(panel, channels, done, j):
    """Return how many samples follow from position j of the inner axis on, and the position after them.

    They belong to one channel, or each to the channel after that of the sample before. `done` samples of the panel come
    before them.
    """
    inner, left = panel.layout.inner, panel.samples - done
    if is_interleaved(panel.layout):
        n, j = panel.samples // inner, j + 1
    else:
        n = min(channels.positions - j % channels.positions if channels.positions > 1 else inner - j, left)
        j += n
    return n, 0 if j == inner else j


@device_function
def scale_channels(columns, ld, panel, channels, weight, bias, centre):
    """Multiply a panel of columns by its channels' weight, add their bias, and subtract a centre for each row."""
    layout, done, j = panel.layout, 0, panel.start % panel.layout.inner
    are_runs, channels_per_row = has_channel_runs(layout, channels), layout.inner // channels.positions
    while done < panel.samples:
        n, following = channel_run(panel, channels, done, j)
        first, in_tiles = j // channels.positions, n // TILE * TILE
        for c in range(layout.d):
            row, k, middle = at(columns, c * ld + done), c * channels_per_row + first, get(centre, c)
            if are_runs:
                factor, offset = get(weight, k), get(bias, k) - middle
                for t in range(n):
                    put(row, t, get(row, t) * factor + offset)
            else:
                for t in range(0, in_tiles, TILE):
                    scale_and_shift(at(row, t), at(row, t), at(weight, k + t), at(bias, k + t))
                    scale_and_shift(at(row, t), at(row, t), 1.0, -middle)
                for t in range(in_tiles, n):
                    put(row, t, get(row, t) * get(weight, k + t) + (get(bias, k + t) - middle))
        done, j = done + n, following


@device_function(fastmath={"reassoc"})
def gather_channels(gradient, white, ld, panel, channels, weight, row_sums, parameters, workspace):
    """Add what a panel of dY gives to its channels and rows, where adjacent samples belong to different channels.

    Each channel's two `parameters` (2, channels) get the sums of dY times the whitened samples, and of dY. dY itself is
    multiplied by the weight, and `row_sums` get the sums of its rows. The workspace has 2 PANEL_WIDTH elements.
    """
    inner, products, totals = panel.layout.inner, workspace, at(workspace, PANEL_WIDTH)
    dweight, dbias = parameters, at(parameters, channels.number)
    start, j = 0, panel.start % inner
    while start < panel.samples:
        n, repeats = min(inner - j, panel.samples - start), 1
        if j == 0 and n == inner:
            repeats = (panel.samples - start) // inner  # the same channels come again with each position along outer
        in_tiles = n // TILE * TILE
        for c in range(panel.layout.d):
            k = c * inner + j
            clear(products, 0, 1, n)
            clear(totals, 0, 1, n)
            for repeat in range(repeats):
                row, other = at(gradient, c * ld + start + repeat * n), at(white, c * ld + start + repeat * n)
                for t in range(0, in_tiles, TILE):
                    accumulate(at(products, t), at(totals, t), at(row, t), at(other, t))
                    scale_and_shift(at(row, t), at(row, t), at(weight, k + t), 0.0)
                for t in range(in_tiles, n):
                    value = get(row, t)
                    put(products, t, get(products, t) + value * get(other, t))
                    put(totals, t, get(totals, t) + value)
                    put(row, t, value * get(weight, k + t))
            row_sum = cast(row_sums, 0.0)
            for t in range(n):
                put(dweight, k + t, get(dweight, k + t) + get(products, t))
                put(dbias, k + t, get(dbias, k + t) + get(totals, t))
                row_sum += get(totals, t) * get(weight, k + t)
            put(row_sums, c, get(row_sums, c) + row_sum)
        start, j = start + repeats * n, (j + n) % inner
