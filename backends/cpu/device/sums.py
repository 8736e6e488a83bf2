"""Sums of adjacent elements."""

from polywhiten.cpu.device.device_function import device_function
from polywhiten.cpu.device.pointers import at, get, put


@device_function(fastmath={"reassoc"})
def sum_of(values, count):
    total = get(values, 0)
    for t in range(1, count):
        total += get(values, t)
    return total


@device_function(fastmath={"reassoc"})
def sum_of_differences(values, count, offset):
    """Return the sum of the values less an offset."""
    total = get(values, 0) - offset
    for t in range(1, count):
        total += get(values, t) - offset
    return total


@device_function
def add_row_sums(sums, rows, ld, d, count):
    """Add the sum of each of d rows."""
    for c in range(d):
        put(sums, c, get(sums, c) + sum_of(at(rows, c * ld), count))
