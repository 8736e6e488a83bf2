"""Several regions of memory in one allocation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from polywhiten.torch.triton.prepared_launch import Pointer


class MemoryRegions(NamedTuple):
    """Regions of float32 numbers: how many each has, and where it begins; and how many there are altogether."""

    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    total_size: int

    @classmethod
    def of(cls, *sizes: int) -> MemoryRegions:
        offsets, end = [], 0
        for size in sizes:
            offsets.append(end)
            end += -(-size // 4) * 4  # all regions are aligned to 16 bytes
        return cls(sizes, tuple(offsets), end)

    def allocate(self, like: Tensor, rank: int) -> list[Tensor]:
        """Return one tensor, or while PyTorch compiles one for each region.

        PyTorch would copy what kernels write through views. And it would merge empty tensors of the same shape: those
        of the regions have different numbers of dimensions, from `rank` on.
        """
        if torch.compiler.is_compiling():
            shapes = [(1,) * (rank + i) + (size,) for i, size in enumerate(self.sizes)]
            return [like.new_empty(shape, dtype=torch.float32) for shape in shapes]
        return [torch.empty(self.total_size, dtype=torch.float32, device=like.device)]

    def pointers(self, tensors: list[Tensor]) -> list[Pointer]:
        """Return pointers to the regions in what `allocate` has returned."""
        if len(tensors) == len(self.offsets):
            return list(tensors)
        return [(tensors[0], offset) for offset in self.offsets]
