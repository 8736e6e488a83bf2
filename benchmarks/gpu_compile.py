"""Compiles what the cases need, in several processes at once, before anything is measured.

Triton, torch.compile and CuPy keep what they compile on disk, where the process that measures finds it. Alone it would
compile for minutes, on one core: some hundreds of kernels, and whole networks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from alternating import Failures
from gpu_cases import SUBJECTS, Case
from gpu_parts import cases

STRUCTURES = ("", *SUBJECTS)
MEMORY = 10e9  # bytes of the device that a process has room for: a step of ResNet-50's takes some 6e9
THREADS = "4"  # of each process' torch.compile, instead of as many as there are cores

Job = tuple[list[int], str]  # places in the list of cases, and the structure of polywhiten's kernels


def jobs(found: Sequence[Case]) -> list[Job]:
    """What needs the same kernels, but for a few, is one process' job: two would compile the same at the same time."""
    groups: dict[tuple[str, ...], dict[tuple[int, ...], int]] = {}
    for place, case in enumerate(found):
        mode = "eager" if case.mode == "graph" else case.mode  # the same kernels
        groups.setdefault((case.what, mode, case.dtype, case.layout), {}).setdefault(case.shape, place)
    longest_first = sorted(groups, key=lambda group: group[1] == "eager")
    return [(list(groups[group].values()), structure) for group in longest_first for structure in STRUCTURES]


def compile_ahead(device: torch.device, parts: Sequence[str], found: Sequence[Case], processes: int) -> Iterator[str]:
    """Yields why something can't be compiled, which is met again where it is measured."""
    with ProcessPoolExecutor(processes, get_context("spawn"), _initialize) as pool:
        futures = [pool.submit(_compile, device.type, parts, *job) for job in jobs(found)]
        try:
            for future in as_completed(futures):
                yield from future.result()
        except BrokenProcessPool as error:
            yield str(error)


def processes_for(device: torch.device) -> int:
    """As many as there are cores, and room on the device."""
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(os.cpu_count() or 1, int(memory / MEMORY)))


def _initialize() -> None:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", THREADS)


def _compile(kind: str, parts: Sequence[str], places: Sequence[int], structure: str) -> list[str]:
    found = cases(torch.device(kind), parts, tell=lambda reason: None)
    failures = Failures()
    for place in places:
        with failures.kept(str(found[place])):
            found[place].compile(structure)
    if kind == "cuda":
        torch.cuda.empty_cache()  # for the other processes
    return [f"{case}: {reason}" for case, reason in failures.items()]
