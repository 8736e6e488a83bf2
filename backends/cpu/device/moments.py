"""Mean and covariance of blocks, and the cross moments that their gradient needs, in one pass over the arrays."""

import numpy as np
from numba import njit

from polywhiten.cpu.device.gemm import multiply_add
from polywhiten.cpu.device.packing import (
    APART,
    COLUMNS,
    OWN,
    Channels,
    Place,
    channel_run,
    clear,
    gather_channels,
    has_runs,
    is_run,
    layout_at,
    load_columns,
    load_first,
    load_rows,
    padded,
    panels_memory,
    run_of,
    sum_columns,
    total_about,
    total_of,
    transposed,
    transposed_run,
    width_of_runs,
)
from polywhiten.cpu.device.simd import UNIT, at, centred_rows, doubles, get, integers, number, pointer, put

_ROWS = 1 << 12  # numbers of dY, and as many of X, that the first cache has room for beside their products


def moments(numbers, scratch, share):
    """A share of the products of panels about their own means, and these means less a block's first sample.

    Numbers: shares, chunks of a block, whether panels are rows, the addresses of x, of the sums of products (blocks,
    chunks, d, d) with d padded, and of the means (blocks, panels, d) with d padded; the layout of x.
    """
    shares, chunks, as_rows, layout = numbers[0], numbers[1], numbers[2] != 0, layout_at(numbers, 6)
    x, sums, means = pointer(numbers[3], scratch), pointer(numbers[4], scratch), pointer(numbers[5], scratch)
    d, count, step = layout.d, layout.outer * layout.inner, width_of_runs(layout)
    dp, panels, tasks = padded(d), (count + step - 1) // step, layout.blocks * chunks
    ld, ldc = dp + APART, COLUMNS + APART
    rows, columns = scratch, at(scratch, COLUMNS * ld)
    first = at(columns, dp * ldc)
    own, lines = at(first, dp), integers(at(scratch, panels_memory(d)))
    for task in range(share * tasks // shares, (share + 1) * tasks // shares):
        block, chunk = divmod(task, chunks)
        products = at(sums, task * dp * dp)
        clear(products, dp, dp, dp)
        load_first(first, x, layout, block)  # sums of what is left lose nothing to a large mean
        for panel in range(chunk * panels // chunks, (chunk + 1) * panels // chunks):
            start = panel * step
            n = min(step, count - start)
            here = Place(x, layout, block, start, n)
            ahead = Place(x, layout, block, start + n, min(step, count - start - n))
            off = at(means, (block * panels + panel) * dp)
            clear(off, 0, 1, dp)
            if as_rows:
                load_rows(rows, ld, here, first, off)
                _divide(off, d, n)
                for c in range(0, dp, UNIT):  # sums that nobody asks for go where columns would be
                    centred_rows(at(rows, c), ld, at(rows, c), ld, n, at(off, c), columns)
            elif is_run(here):
                run = run_of(here)
                for c in range(d):
                    put(off, c, total_about(at(run, c * layout.d_stride), n, get(first, c)) / n)
                transposed_run(rows, ld, here, first, off, own)
            else:
                load_columns(columns, ldc, here, first, own)
                sum_columns(off, columns, ldc, d, n)
                _divide(off, d, n)
                transposed(rows, ld, columns, ldc, dp, padded(n), off)
            multiply_add(
                products, dp, products, dp, rows, 1, ld, rows, ld, dp, dp, n, True, (ahead, ahead, ahead), 1, lines
            )


@njit
def _divide(values, count, divisor):
    for i in range(count):
        put(values, i, get(values, i) / divisor)


def whole_moments(numbers, scratch, share):
    """A share of the blocks' means (blocks, d) and covariances (blocks, d, d).

    What panels are off the mean of all is added to their products: a stable sum for any order of samples. Numbers: as
    of `moments`, and after them the addresses of mean and covariance.
    """
    shares, chunks, layout = numbers[0], numbers[1], layout_at(numbers, 6)
    sums, means = pointer(numbers[4], scratch), pointer(numbers[5], scratch)
    mean, cov = pointer(numbers[14], scratch), pointer(numbers[15], scratch)
    x, first = pointer(numbers[3], scratch), scratch
    d, count, step = layout.d, layout.outer * layout.inner, width_of_runs(layout)
    dp, panels = padded(d), (count + step - 1) // step
    for block in range(share * layout.blocks // shares, (share + 1) * layout.blocks // shares):
        products = _sum_of_chunks(sums, block, chunks, dp * dp)
        centres, whole = at(means, block * panels * dp), at(scratch, dp)
        load_first(first, x, layout, block)
        for c in range(d):
            off = 0.0
            for panel in range(panels):
                off += min(step, count - panel * step) * (get(centres, panel * dp + c) - get(centres, c))
            put(whole, c, get(centres, c) + off / count)
            put(mean, block * d + c, get(first, c) + get(whole, c))
        for panel in range(panels):
            difference, n = at(centres, panel * dp), min(step, count - panel * step)
            for c in range(d):
                put(difference, c, get(difference, c) - get(whole, c))
            for i in range(d):
                row, share = at(products, i * dp), number(difference, n * get(difference, i))
                for j in range(i, d):
                    put(row, j, get(row, j) + share * get(difference, j))
        result = at(cov, block * d * d)
        for i in range(d):
            for j in range(i, d):
                value = get(products, i * dp + j) / count
                put(result, i * d + j, value)
                put(result, j * d + i, value)


def cross_moments(numbers, scratch, share):
    """A share of the sums of dY (X - mean)' and dY 1.

    Where there is a whitener, dY is multiplied by the weight of its samples' channels first, and the
    gradients of weight and bias are added to (2, channels) of float64; panels must not be rows then. Numbers: shares,
    chunks of a block, whether panels are rows, the addresses of dy, x, mean, the sums (blocks, chunks, d (d + 1)) with
    d padded, whitener or 0 and weight, where these gradients are in scratch, the number of channels and how many
    positions each has; the layouts of dy and x.
    """
    shares, chunks, as_rows, affine = numbers[0], numbers[1], numbers[2] != 0, numbers[7] != 0
    dy, x, mean = pointer(numbers[3], scratch), pointer(numbers[4], scratch), pointer(numbers[5], scratch)
    sums, whitener = pointer(numbers[6], scratch), pointer(numbers[7], scratch)
    weight, channels = pointer(numbers[8], scratch), Channels(numbers[10], numbers[11])
    gradients = doubles(at(scratch, numbers[9]))
    dy_layout, layout = layout_at(numbers, 12), layout_at(numbers, 20)
    d, count, step = layout.d, layout.outer * layout.inner, width_of_runs(layout)
    together = 1
    if as_rows and d <= 4 * UNIT:
        step = min(step, _ROWS // padded(d) // UNIT * UNIT)
        together = COLUMNS // step
    dp, panels, tasks = padded(d), (count + step - 1) // step, layout.blocks * chunks
    ld, ldc, size = dp + APART, COLUMNS + APART, dp * (dp + 1)
    rows, columns = scratch, at(scratch, COLUMNS * ld)
    gradient = at(columns, dp * ldc)
    zeros = at(gradient, max(dp * ldc, COLUMNS * ld))
    centre = at(zeros, max(dp, COLUMNS))
    panel_sums, lost, own = at(centre, dp), at(centre, 2 * dp), at(centre, 3 * dp)
    matrix = at(own, OWN)
    white, lines = at(matrix, dp * dp), integers(at(scratch, panels_memory(d)))
    clear(zeros, 0, 1, max(dp, COLUMNS) + dp)
    for task in range(share * tasks // shares, (share + 1) * tasks // shares):
        block, chunk = divmod(task, chunks)
        products = at(sums, task * size)
        total = at(products, dp * dp)
        clear(products, 0, 1, size)
        clear(lost, 0, 1, dp)
        for c in range(d):
            put(centre, c, get(mean, block * d + c))
        if affine:
            clear(matrix, dp, dp, dp)
            for i in range(d):
                for j in range(d):
                    put(matrix, i * dp + j, get(whitener, (block * d + i) * d + j))
        first, end = chunk * panels // chunks, (chunk + 1) * panels // chunks
        for panel in range(first, end):
            start = panel * step
            n = min(step, count - start)
            left = min(step, count - start - n)
            here, there = Place(x, layout, block, start, n), Place(dy, dy_layout, block, start, n)
            next_x, next_dy = Place(x, layout, block, start + n, left), Place(dy, dy_layout, block, start + n, left)
            ahead, factors, row, column = (next_x, next_dy, next_dy), gradient, ldc, 1
            if as_rows:
                load_rows(rows, ld, here, centre, columns)  # sums that nobody asks for
                clear(panel_sums, 0, 1, dp)
                load_rows(gradient, ld, there, zeros, panel_sums)
                _add_exactly(total, lost, panel_sums, d)
                row, column = 1, ld
            else:
                if is_run(here) and is_run(there) and (not affine or has_runs(layout, channels)):
                    transposed_run(rows, ld, here, centre, zeros, own)
                    factors, row = run_of(there), dy_layout.d_stride
                else:
                    load_columns(columns, ldc, here, centre, own)
                    transposed(rows, ld, columns, ldc, dp, padded(n), zeros)
                    load_columns(gradient, ldc, there, zeros, own)
                if affine and has_runs(layout, channels):
                    given = products, total, white, zeros, matrix, factors, row, rows, ld, here
                    _add_runs(*given, channels, weight, gradients, ahead, lines)
                    continue
                if affine:
                    multiply_add(
                        white, ldc, zeros, 0, matrix, dp, 1, columns, ldc, dp, padded(n), dp, False, ahead, 0, lines
                    )
                    gather_channels(gradient, white, ldc, here, channels, weight, total, gradients, own)
                else:
                    sum_columns(total, factors, row, d, n)
            target, base, ld_base, turn = products, products, dp, (panel - first) % together
            if together > 1:  # sums of as many samples as larger panels have
                target, base, ld_base = (matrix, zeros, 0) if turn == 0 else (matrix, matrix, dp)
            multiply_add(target, dp, base, ld_base, factors, row, column, rows, ld, dp, dp, n, False, ahead, 2, lines)
            if together > 1 and (turn == together - 1 or panel == end - 1):
                for i in range(dp * dp):
                    put(products, i, get(products, i) + get(matrix, i))


@njit
def _add_exactly(totals, lost, values, count):
    """Kahan's sum: what a total is too large by is taken off with the next value."""
    for c in range(count):
        value, before = get(values, c) - get(lost, c), get(totals, c)
        put(totals, c, before + value)
        more = (get(totals, c) - before) - value
        put(lost, c, more if abs(more) < number(lost, np.inf) else number(lost, 0.0))


@njit(fastmath={"reassoc"})
def _add_runs(
    products, sums, own, zeros, whitener, gradient, ldc, rows, ld, place, channels, weight, parameters, ahead, lines
):
    """What a panel of dY gives where each of its runs is of one channel in every row: products of its own.

    A row of them, times that of the whitener, is what the weight's gradient gains: the whitened samples aren't needed.
    """
    layout, done, j, places = place.layout, 0, place.start % place.layout.inner, 2
    dp = padded(layout.d)
    while done < place.samples:
        n, following = channel_run(place, channels, done, j)
        k = j // channels.positions
        multiply_add(
            own,
            dp,
            zeros,
            0,
            at(gradient, done),
            ldc,
            1,
            at(rows, done * ld),
            ld,
            dp,
            dp,
            n,
            False,
            ahead,
            places,
            lines,
        )
        for i in range(layout.d):
            channel = i * (layout.inner // channels.positions) + k
            factor, total = get(weight, channel), total_of(at(gradient, i * ldc + done), n)
            row, target, other, product = at(own, i * dp), at(products, i * dp), at(whitener, i * dp), number(own, 0.0)
            for c in range(layout.d):
                product += get(row, c) * get(other, c)
                put(target, c, get(target, c) + factor * get(row, c))
            put(sums, i, get(sums, i) + factor * total)
            put(parameters, channel, get(parameters, channel) + product)
            put(parameters, channels.number + channel, get(parameters, channels.number + channel) + total)
        done, j, places = done + n, following, 0


def whole_cross_moments(numbers, scratch, share):
    """A share of s (blocks, d) and K (blocks, d, d).

    Numbers: shares, chunks of a block, blocks, d, the addresses of the sums, s and K.
    """
    shares, chunks, blocks, d = numbers[0], numbers[1], numbers[2], numbers[3]
    sums, s, k = pointer(numbers[4], scratch), pointer(numbers[5], scratch), pointer(numbers[6], scratch)
    dp = padded(d)
    for block in range(share * blocks // shares, (share + 1) * blocks // shares):
        products = _sum_of_chunks(sums, block, chunks, dp * (dp + 1))
        for i in range(d):
            put(s, block * d + i, get(products, dp * dp + i))
            for j in range(d):
                put(k, (block * d + i) * d + j, get(products, i * dp + j))


@njit
def _sum_of_chunks(sums, block, chunks, size):
    result = at(sums, block * chunks * size)
    for chunk in range(1, chunks):
        other = at(result, chunk * size)
        for i in range(size):
            put(result, i, get(result, i) + get(other, i))
    return result
