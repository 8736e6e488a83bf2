"""A tensor in pieces along its first axis that stay in the cache, and the memory to work on them.

What is computed from a piece, its centred copy say, is read again while it is there. It is written to memory that is
kept: PyTorch's allocator gives large tensors back to the system, and a new one costs more in page faults than in
arithmetic.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

_BYTES = 2**22
PARTS = 8  # of a piece's rows


def pieces(x: Tensor) -> Iterator[slice]:
    """Slices of axis 0, all but the last of the same length: a multiple of PARTS, where it is not less."""
    step = max(1, _BYTES // (math.prod(x.shape[1:]) * x.element_size()))
    step -= step % PARTS if step > PARTS else 0
    for start in range(0, len(x), step):
        yield slice(start, min(start + step, len(x)))


class _Workspace(threading.local):
    """A thread's tensors, as large as they had to be so far."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, torch.dtype], Tensor] = {}


_WORKSPACE = _Workspace()


def workspace(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The thread's memory of that name, until it is asked for again; for tensors of a piece's size."""
    count = math.prod(shape)
    kept = _WORKSPACE.tensors.get((name, dtype))
    if kept is None or kept.numel() < count:
        kept = torch.empty(count, dtype=dtype)
        if count * kept.element_size() <= 2 * _BYTES:  # else of a sample that is a piece of its own
            _WORKSPACE.tensors[name, dtype] = kept
    return kept[:count].view(shape)
