"""Running averages."""

import numpy as np
from numba import njit

from polywhiten.compiled.parallel import real
from polywhiten.compiled.tile import get, integers, number, pointer, put


def average(numbers, scratch, share):
    """A step of running averages: with a batch's statistics, unless one of these isn't finite, and with their count.

    Numbers: shares, which is 1, the momentum, or less than 0 for the plain average of all batches, the address of the
    count, how many arrays are to be finite, and how many are averaged; of each of the former its size and address, of
    the latter the size and the addresses of average and statistics.
    """
    momentum, count, judged, averaged = real(numbers, 1), integers(pointer(numbers[2], scratch)), numbers[3], numbers[4]
    for i in range(judged):
        k = 5 + 2 * i
        if not _are_finite(pointer(numbers[k + 1], scratch), numbers[k]):
            return
    put(count, 0, get(count, 0) + 1)
    factor = 1.0 / get(count, 0) if momentum < 0.0 else momentum
    for i in range(averaged):
        k = 5 + 2 * judged + 3 * i
        _approach(pointer(numbers[k + 1], scratch), pointer(numbers[k + 2], scratch), numbers[k], factor)


@njit
def _are_finite(values, count):
    others = 0
    for i in range(count):
        if not abs(get(values, i)) < number(values, np.inf):
            others += 1
    return others == 0


@njit
def _approach(averages, values, count, factor):
    """From the nearer end, so that a factor of 1 gives the values."""
    own, rest = number(averages, factor), number(averages, 1.0 - factor)
    for i in range(count):
        before, value = get(averages, i), get(values, i)
        put(averages, i, before + own * (value - before) if factor < 0.5 else value - rest * (value - before))
