"""Running averages of layers, updated by one call of compiled code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from polywhiten._types import Array
from polywhiten.cpu.arguments import AverageArgs, UpdateAveragesArgs, ValuesArgs
from polywhiten.cpu.device.averages import update_averages as update_averages_kernel
from polywhiten.cpu.launches import WORKSPACE, Address, LaunchBuilder, Program
from polywhiten.cpu.library import Library

MAX_AVERAGES, MAX_CHECKED = 2, 1


def update_averages(
    library: Library,
    averages: Sequence[Array],
    statistics: Sequence[Array],
    checked: Sequence[Array],
    count: Array,
    momentum: float | None,
) -> None:
    """Update averages and the count of batches in place, unless an average would no longer be finite.

    Nor is anything changed if a value that is checked is not finite. Averages are contiguous; there are at most
    `MAX_AVERAGES` of them, and `MAX_CHECKED` other arrays.
    """
    batch, others = [library.contiguous(array) for array in statistics], list(map(library.contiguous, checked))
    sizes = tuple(math.prod(array.shape) for array in (*averages, *others))
    program = _program(library.dtype_name(batch[0].dtype), sizes, len(averages), momentum)
    arrays = {"count": count} | {f"checked {i}": array for i, array in enumerate(others)}
    for i, pair in enumerate(zip(averages, batch, strict=True)):
        arrays |= dict(zip((f"running {i}", f"batch {i}"), pair, strict=True))
    program.run({name: library.address(array) for name, array in arrays.items()} | {WORKSPACE: 0})


@lru_cache(64)
def _program(dtype: str, sizes: tuple[int, ...], num_averages: int, momentum: float | None) -> Program:
    entries = [AverageArgs(sizes[i], Address(f"running {i}"), Address(f"batch {i}")) for i in range(num_averages)]
    checked = [ValuesArgs(size, Address(f"checked {i}")) for i, size in enumerate(sizes[num_averages:])]
    args = UpdateAveragesArgs(
        momentum=-1.0 if momentum is None else momentum,
        num_batches=Address("count"),
        mean=entries[0],
        matrices=entries[1] if num_averages > 1 else AverageArgs(0, 0, 0),
        checked=checked[0] if checked else ValuesArgs(0, 0),
    )
    builder = LaunchBuilder(dtype, num_workers=1, worker_size=0)
    builder.launch(update_averages_kernel, args)
    return builder.program()
