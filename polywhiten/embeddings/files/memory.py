"""How much memory there is, how much this process takes, and how many rows may be read at once."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from polywhiten.rows import BLOCK_VALUES

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)

# A batch has so many bytes or so many rows, whichever is more, but no more values than a block of the kernels. Larger
# batches weren't faster, because merging moments takes a small share of the time.
BATCH_BYTES = 2**25
BATCH_ROWS = 2**14
LEAST_ROWS = 256  # with fewer, most of the time would go into merging moments

# Bytes for each number beside its own: copies in float64 of integers and in the whitening, and the output.
COPIES = 3 * 8
UNKNOWN_MACHINE = 2**33  # bytes, where the system doesn't say how much memory it has
CGROUP_LIMITS = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"


def parse_size(text: str) -> int:
    """Return a number of bytes such as "500MB", "2GiB" or "2G", of which the last two are the same.

    Examples
    --------
    >>> from polywhiten.embeddings.files.memory import parse_size
    >>> parse_size("500MB"), parse_size("2GiB"), parse_size("1.5k")
    (500000000, 2147483648, 1536)
    """
    match = SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a size: write a number and a unit, such as 2GiB or 500MB")
    number, prefix, suffix = match.groups()
    unit = UNITS[prefix.lower()]
    if suffix and suffix.lower() == "b":
        unit = 1000 ** list(UNITS.values()).index(unit)
    return int(float(number) * unit)


def machine_memory() -> int:
    """Return the bytes of memory that the machine has, or that the container of this process may use."""
    sizes = []
    with suppress(AttributeError, ValueError, OSError):  # Windows has no such function
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # "max" is no number
            sizes.append(int(Path(path).read_text(encoding="ascii")))
    return min(sizes, default=UNKNOWN_MACHINE)


def resident_memory() -> int:
    """Return the bytes of memory that this process takes now; where only the most so far is known, that."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # Windows
        return 2**28
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 2**10


def batch_rows(memory: int, dimension: int, itemsize: int, reserved: int) -> int:
    """Return how many rows may be read at once, such that this process takes no more than `memory` bytes.

    Parameters
    ----------
    memory : int
    dimension, itemsize : int
        Of the rows in their file.
    reserved : int
        Bytes that are taken beside what the process takes now and the rows.

    Raises
    ------
    ValueError
        There is not enough memory; the message says how much would do.
    """
    row = dimension * (2 * itemsize + COPIES)  # two batches are in memory, of which one is being read
    taken = resident_memory() + reserved
    most = max(BATCH_BYTES // (dimension * itemsize), min(BATCH_ROWS, BLOCK_VALUES // dimension), 1)
    rows = min((memory - taken) // row, most)
    least = min(most, LEAST_ROWS)
    if rows < least:
        needed = -(-(taken + least * row) // 2**20)
        raise ValueError(
            f"{memory / 2**20:,.0f} MiB are too few for rows of {dimension} numbers: at least {needed:,} MiB are needed"
        )
    return rows
