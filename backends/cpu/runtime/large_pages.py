"""Large pages for new results: the first touch of a small page costs more than writing the page."""

import ctypes
import mmap
from functools import cache
from typing import Any

from polywhiten.cpu.tuning import MIN_LARGE_PAGES_BYTES


def ask_for_large_pages(address: int, nbytes: int) -> None:
    """Ask the system to back memory that was never written to with large pages.

    Nothing happens for small amounts, and where the system has no such request.
    """
    madvise = _madvise()
    if madvise is not None and nbytes >= MIN_LARGE_PAGES_BYTES:
        start, stop = -(-address // mmap.PAGESIZE), (address + nbytes) // mmap.PAGESIZE
        madvise(start * mmap.PAGESIZE, (stop - start) * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)


@cache
def _madvise() -> Any:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function
