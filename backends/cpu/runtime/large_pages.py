"""Memory in large pages, of which a new result needs few: the first touch of a small one costs more than writing it."""

import ctypes
import mmap
from functools import cache
from typing import Any

_FROM = 1 << 23  # bytes; less comes from a heap that is often there already


def ask_for_large_pages(address: int, nbytes: int) -> None:
    """For memory that nothing was written to yet; where the system has none, nothing happens."""
    madvise = _madvise()
    if madvise is not None and nbytes >= _FROM:
        start, stop = -(-address // mmap.PAGESIZE), (address + nbytes) // mmap.PAGESIZE
        madvise(start * mmap.PAGESIZE, (stop - start) * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)


@cache
def _madvise() -> Any:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function
