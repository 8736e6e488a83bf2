"""Compiles what the cases need in several processes at once, before anything is measured.

Triton, torch.compile and CuPy cache what they compile on disk, where the process that measures finds it. By itself,
that process would compile some hundreds of kernels and whole networks on one core, which takes minutes.
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
MEMORY = 10e9  # bytes of the device reserved for each process: a step of ResNet-50 takes about 6e9
THREADS = "4"  # for torch.compile in each process, instead of one thread per core

Job = tuple[list[int], str]  # indices in the list of cases, and the structure of polywhiten's kernels


def jobs(found: Sequence[Case]) -> list[Job]:
    """Return the jobs, the longest first. Cases that need nearly the same kernels are in one job.

    In two jobs, two processes would compile the same kernels at the same time.
    """
    groups: dict[tuple[str, ...], dict[tuple[int, ...], int]] = {}
    for index, case in enumerate(found):
        mode = "eager" if case.mode == "graph" else case.mode  # a graph uses the kernels of eager mode
        groups.setdefault((case.what, mode, case.dtype, case.layout), {}).setdefault(case.shape, index)
    longest_first = sorted(groups, key=lambda group: group[1] == "eager")
    return [(list(groups[group].values()), structure) for group in longest_first for structure in STRUCTURES]


def compile_ahead(device: torch.device, parts: Sequence[str], found: Sequence[Case], processes: int) -> Iterator[str]:
    """Compile everything, and yield the reasons of failures, which will occur again in the measurements."""
    with ProcessPoolExecutor(processes, get_context("spawn"), _initialize) as pool:
        futures = [pool.submit(_compile, device.type, parts, *job) for job in jobs(found)]
        try:
            for future in as_completed(futures):
                yield from future.result()
        except BrokenProcessPool as error:
            yield str(error)


def processes_for(device: torch.device) -> int:
    """Return the number of processes that the cores and the device's memory allow."""
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(os.cpu_count() or 1, int(memory / MEMORY)))


def _initialize() -> None:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", THREADS)


def _compile(device_type: str, parts: Sequence[str], indices: Sequence[int], structure: str) -> list[str]:
    found = cases(torch.device(device_type), parts, tell=lambda reason: None)
    failures = Failures()
    for index in indices:
        with failures.recorded(str(found[index])):
            found[index].compile(structure)
    if device_type == "cuda":
        torch.cuda.empty_cache()  # leave the memory to the other processes
    return [f"{case}: {reason}" for case, reason in failures.items()]
