"""Launches of kernels that are prepared once: a call fills in addresses and runs them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from polywhiten.cpu.ahead import compile_at_first_use
from polywhiten.cpu.arguments import flattened, pack
from polywhiten.cpu.device.simd import CACHE_LINE
from polywhiten.cpu.geometry import padded
from polywhiten.cpu.runtime.cache import kernel_address
from polywhiten.cpu.runtime.parallel import run
from polywhiten.cpu.runtime.workers import Job

WORKSPACE = "workspace"


@dataclass(frozen=True)
class Address:
    """Stands in prepared args for the address of an array that a call names, plus bytes."""

    array: str
    offset: int = 0


@dataclass(frozen=True)
class IsAligned:
    """Stands in prepared args for whether an array that a call names begins where a cache line does."""

    array: str


class Program(NamedTuple):
    """Launches as they are in memory, complete but for addresses."""

    job: array[int]
    addresses: tuple[tuple[int, str, int], ...]  # index in the job, name of the array, and offset
    alignments: tuple[tuple[int, str], ...]  # index in the job, and name of the array
    num_workers: int
    waits: bool  # whether all workers end a launch before any begins the next

    def run(self, addresses: Mapping[str, int]) -> None:
        """Run the launches on the arrays at these addresses, which have to stay alive meanwhile."""
        job = self.job[:]
        for index, name, offset in self.addresses:
            job[index] = addresses[name] + offset
        for index, name in self.alignments:
            job[index] = addresses[name] % CACHE_LINE == 0
        run(job, self.num_workers, self.waits)


class LaunchBuilder:
    """Collects the launches and the temporary arrays of a call, and prepares programs.

    Parameters
    ----------
    dtype : {"float32", "float64"}
        Of the kernels.
    num_workers : int
        How many threads share the work.
    worker_size : int
        Elements of each worker's workspace.
    num_parts : int, optional
        A worker takes adjacent parts of the work, and runs all launches on one part before the next. By default, every
        worker has one part, and all workers end a launch before any begins the next.
    """

    def __init__(self, dtype: str, num_workers: int, worker_size: int, num_parts: int | None = None) -> None:
        self.dtype, self.itemsize = dtype, np.dtype(dtype).itemsize
        self.num_workers, self.num_parts = num_workers, num_parts
        self.worker_bytes = padded(worker_size) * self.itemsize
        self.workspace_bytes = num_workers * self.worker_bytes  # temporary arrays come after those of the workers
        self._launches: list[tuple[Callable[..., None], Any]] = []

    def temporary(self, size: int) -> Address:
        """Return the address of so many elements in the workspace."""
        address = Address(WORKSPACE, self.workspace_bytes)
        self.workspace_bytes += padded(size) * self.itemsize
        return address

    def launch(self, kernel: Callable[..., None], args: Any) -> None:
        """Add the launch of a kernel."""
        self._launches.append((kernel, args))

    def program(self, num_workers: int | None = None) -> Program:
        """Return the launches since the last program; for fewer workers if that is asked for."""
        launches, self._launches = self._launches, []
        compile_at_first_use([kernel for kernel, _ in launches], self.dtype)
        num_workers = num_workers or self.num_workers
        job = Job(
            workspace=0,
            workspace_stride=self.worker_bytes,
            num_workers=num_workers,
            num_parts=self.num_parts or num_workers,
            thread_num=0,
            team_size=0,
            barrier=0,
            first_launch=0,
            end_launch=len(launches),
        )
        data, end = array("q", job), len(job) + 2 * len(launches)
        addresses, alignments = [(Job._fields.index("workspace"), WORKSPACE, 0)], []
        all_args = array("q")
        for kernel, args in launches:
            data.extend((kernel_address(kernel, self.dtype), end + len(all_args)))
            values = list(flattened(args))
            for i, value in enumerate(values):
                if isinstance(value, Address):
                    addresses.append((end + len(all_args) + i, value.array, value.offset))
                elif isinstance(value, IsAligned):
                    alignments.append((end + len(all_args) + i, value.array))
            known = (0 if isinstance(value, Address | IsAligned) else value for value in values)
            all_args.frombytes(pack(type(args), known))
        return Program(data + all_args, tuple(addresses), tuple(alignments), num_workers, self.num_parts is None)
