"""Counts the launches, allocations and array operations of a call, on NumPy arrays whose values don't matter."""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any

import array_api_compat.numpy
import numpy as np


class Counts:
    """The numbers of launched kernels, `empty` arrays, and operations, for each of which CuPy launches a kernel."""

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.allocations = 0
        self.operations: Counter[str] = Counter()


class CountedArray(np.ndarray):
    """An array whose operations are counted, also those of its views."""

    counts: Counts

    def __array_finalize__(self, base: Any) -> None:
        self.counts = getattr(base, "counts", None)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        self.counts.operations[ufunc.__name__] += 1
        plain = [a.view(np.ndarray) if isinstance(a, CountedArray) else a for a in inputs]
        kwargs["out"] = tuple(a.view(np.ndarray) for a in kwargs.get("out", ())) or None
        return counted(np.asarray(getattr(ufunc, method)(*plain, **kwargs)), self.counts)

    def astype(self, *arguments: Any, **kwargs: Any) -> Any:
        result = super().astype(*arguments, **kwargs)
        self.counts.operations["astype"] += result is not self
        return result


def counted(array: np.ndarray, counts: Counts) -> CountedArray:
    array = array.view(CountedArray)
    array.counts = counts
    return array


class CountingNumPy(ModuleType):
    """NumPy, except that it counts the arrays that it allocates and the copies that make arrays contiguous."""

    def __init__(self, counts: Counts) -> None:
        super().__init__("counting_numpy")
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        return getattr(array_api_compat.numpy, name)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> CountedArray:
        self._counts.allocations += 1
        return counted(np.zeros(shape, dtype), self._counts)

    def ascontiguousarray(self, array: CountedArray) -> CountedArray:
        self._counts.operations["ascontiguousarray"] += not array.flags.c_contiguous
        return counted(np.ascontiguousarray(array), self._counts)


class NoLauncher:
    """Records the names of kernels instead of launching them."""

    processors = 132
    shared_memory = 227 * 1024

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._counters = np.zeros(10_000, np.uint32)

    def counters(self, count: int) -> np.ndarray:
        return self._counters[:count]

    def __call__(
        self, file: str, name: str, programs: int, threads: int, arguments: tuple[Any, ...], shared: int = 0
    ) -> None:
        self._counts.launches.append(name.partition("<")[0])
