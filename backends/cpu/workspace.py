"""The memory that compiled kernels work in, which each thread keeps for its next call."""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polywhiten.cpu import tuning
from polywhiten.cpu.device.simd import CACHE_LINE


class Workspace(NamedTuple):
    """Memory and its address, which is that of a cache line: vectors across two lines cost twice as much."""

    memory: npt.NDArray[np.uint8]
    address: int


class _Kept(threading.local):
    workspace: Workspace | None = None


_KEPT = _Kept()


def workspace(nbytes: int) -> Workspace:
    """Return at least so many bytes: those of the last call in this thread if they suffice."""
    kept = _KEPT.workspace
    if kept is None or kept.memory.size < nbytes:
        memory = np.empty(nbytes + CACHE_LINE, np.uint8)
        start = -memory.ctypes.data % CACHE_LINE
        memory = memory[start : start + nbytes]
        kept = Workspace(memory, memory.ctypes.data)
        if nbytes <= tuning.MAX_KEPT_BYTES:
            _KEPT.workspace = kept
    return kept
