"""Running averages."""

import numpy as np
from numba import njit

from polywhiten.cpu.device.simd import get, integers, number, pointer, put
from polywhiten.cpu.runtime.parallel import real


def average(numbers, scratch, share):
    """A step of running averages, with a batch's statistics, and of their count.

    None where other statistics aren't finite, or an average wouldn't be any more.

    Numbers: shares, which is 1, the momentum, or less than 0 for the plain average of all batches, the address of the
    count, how many other arrays are to be finite, and how many are averaged; of each of the former its size and
    address, of the latter the size and the addresses of average and statistics.
    """
    momentum, count, judged, averaged = real(numbers, 1), integers(pointer(numbers[2], scratch)), numbers[3], numbers[4]
    for i in range(judged):
        k = 5 + 2 * i
        if not _are_finite(pointer(numbers[k + 1], scratch), numbers[k]):
            return
    factor = 1.0 / (get(count, 0) + 1) if momentum < 0.0 else momentum
    for write in range(2):  # all averages are looked at before any is changed
        for i in range(averaged):
            k = 5 + 2 * judged + 3 * i
            running, batch = pointer(numbers[k + 1], scratch), pointer(numbers[k + 2], scratch)
            if write == 1:
                _approach(running, batch, numbers[k], factor)
            elif not _stay_finite(running, batch, numbers[k], factor):
                return
    put(count, 0, get(count, 0) + 1)


@njit
def _are_finite(values, count):
    others = 0
    for i in range(count):
        if not abs(get(values, i)) < number(values, np.inf):
            others += 1
    return others == 0


@njit
def _stay_finite(averages, values, count, factor):
    own, rest = number(averages, factor), number(averages, 1.0 - factor)
    others = 0
    for i in range(count):
        if not abs(_between(get(averages, i), get(values, i), factor, own, rest)) < number(averages, np.inf):
            others += 1
    return others == 0


@njit
def _approach(averages, values, count, factor):
    own, rest = number(averages, factor), number(averages, 1.0 - factor)
    for i in range(count):
        put(averages, i, _between(get(averages, i), get(values, i), factor, own, rest))


@njit
def _between(before, value, factor, own, rest):
    """From the nearer end, so that a factor of 1 gives the value."""
    return before + own * (value - before) if factor < 0.5 else value - rest * (value - before)
