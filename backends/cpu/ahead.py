"""Compile kernels before they are needed, in several processes: Numba compiles one at a time in each."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import NamedTuple

import numba

from polywhiten.cpu.device import affine_map, averages, cross_moments, gradients, moments, newton
from polywhiten.cpu.runtime import first_use, workers
from polywhiten.cpu.runtime.cache import kernel_address, kernel_folder
from polywhiten.cpu.runtime.folder_lock import folder_lock
from polywhiten.cpu.runtime.kernel_files import NotKeptError, without_compiling
from polywhiten.cpu.runtime.openmp import loaded_openmp
from polywhiten.cpu.runtime.parallel import max_threads

DTYPES = ("float32", "float64")
# Those that take longest to compile come first, so that no process ends long after the others.
KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        cross_moments.cross_moments,
        moments.moments,
        affine_map.affine_map,
        newton.inverse_sqrt_adjoint,
        newton.inverse_sqrt,
        affine_map.pack_matrices,
        moments.combine_moments,
        averages.update_averages,
        cross_moments.combine_cross_moments,
        gradients.scale_whitener,
        gradients.gradient_terms,
    )
}
LOOPS = {loop.__name__: loop for loop in (workers.in_numba_threads, workers.openmp_region, workers.in_one_thread)}
_MAX_PROCESSES = 4  # more wait for the kernel that takes longest
_PATIENCE_SECONDS = 60.0  # for another process that compiles
_EVALUATION = {"pack_matrices", "affine_map"}  # the kernels that run without any others
_first_use_lock = Lock()
_tried: list[list[Job]] = []


class Job(NamedTuple):
    """A kernel to compile for a dtype, or one of the loops that run kernels, which have no dtype."""

    name: str
    dtype: str = ""

    def run(self) -> None:
        """Compile it in this process, or load its files."""
        if self.dtype:
            kernel_address(KERNELS[self.name], self.dtype)
        else:
            LOOPS[self.name]()


class CompileError(RuntimeError):
    """A process that compiles has ended early; its own messages are on standard error."""


def jobs(dtypes: Sequence[str] = DTYPES, beside_torch: bool = False) -> list[Job]:
    """Return all kernels for these dtypes, and the loops.

    Beside PyTorch they are without the loop in Numba's threads, which PyTorch's own replace: loading it starts Numba's
    threads, and PyTorch would then use as many of its own, whatever it was told.
    """
    loops = [name for name in LOOPS if not (beside_torch and name == workers.in_numba_threads.__name__)]
    return [*(Job(name, dtype) for name in KERNELS for dtype in dtypes), *map(Job, loops)]


def missing(wanted: Sequence[Job]) -> list[Job]:
    """Load those of the jobs that are kept, and return the others."""
    result = []
    for job in wanted:
        try:
            with without_compiling():
                job.run()
        except NotKeptError:
            result.append(job)
    return result


def folder(dtype: str) -> str | None:
    """Return the folder that keeps a dtype's kernels, or None if they aren't kept and no folder can be written to."""
    return kernel_folder(moments.moments, dtype)


def compile_at_first_use(kernels: Sequence[Callable[..., None]], dtype: str) -> None:
    """Compile these kernels and those that probably come next, in several processes, if these aren't kept yet.

    With one thread, or where other processes can't compile for this one, nothing happens: then `kernel_address`
    compiles one kernel after another, when it is needed. Of several processes, one begins, and the others wait.
    """
    number = min(max_threads(), _MAX_PROCESSES)
    if number < 2 or not _starts_python(sys.executable):
        return
    asked = [Job(kernel.__name__, dtype) for kernel in kernels]
    with _first_use_lock:
        if not missing(asked):
            return
        kept_in, wanted = folder(dtype), _wanted_with(asked, dtype)
        if kept_in is None or wanted in _tried:
            return
        _tried.append(wanted)
        with first_use.explained(kept_in) as begins:
            begins()
            with folder_lock(kept_in, _PATIENCE_SECONDS) as is_locked:
                todo = missing(wanted) if is_locked else []
                if todo:
                    _compile_and_load(todo, number)


def _wanted_with(asked: list[Job], dtype: str) -> list[Job]:
    wanted = jobs((dtype,), beside_torch=loaded_openmp() is not None)
    if _EVALUATION.issuperset(job.name for job in asked):
        return [job for job in wanted if job in asked or not job.dtype]
    return wanted


def _compile_and_load(todo: Sequence[Job], number: int) -> None:
    """Compile in several processes, as far as that is possible."""
    with suppress(CompileError):
        for job in compile_in_processes(todo, number, stderr=subprocess.DEVNULL):
            if missing([job]):  # the disk is full, for example
                return


def _starts_python(executable: str | None) -> bool:
    """Return whether this is Python, and not a program that embeds or freezes it and would start once more."""
    return Path(executable or "").name.lower().startswith("python") and not hasattr(sys, "frozen")


def compile_in_processes(
    todo: Sequence[Job], number: int = int(numba.config.NUMBA_DEFAULT_NUM_THREADS), stderr: int | None = None
) -> Iterator[Job]:
    """Compile in a number of processes, by default one for each processor, and yield each job when it is done.

    Raises
    ------
    CompileError
        A process has ended early, or can't be started.
    """
    number = min(len(todo), number)
    # the processes end first, so that no thread waits for an answer after Ctrl-C
    with ThreadPoolExecutor(number) as threads, _processes(number, stderr) as idle:

        def run(job: Job) -> Job:
            process = idle.get()
            try:
                process.run(job)
            finally:
                idle.put(process)
            return job

        for done in as_completed([threads.submit(run, job) for job in todo]):
            yield done.result()


def serve() -> None:
    """Compile the jobs on standard input, one a line, and repeat each on standard output when it is done."""
    first_use.logger.setLevel(logging.ERROR)  # the process that started this one says what is happening
    gc.disable()  # Numba's many small objects live as long as this process, which searches them for a tenth of its time
    for line in sys.stdin:
        Job(*line.split()).run()
        print(line, end="", flush=True)


class _Process:
    """A process that runs `serve`."""

    def __init__(self, stderr: int | None) -> None:
        code = f"import sys; sys.path[:] = {sys.path!r}; from polywhiten.cpu.ahead import serve; serve()"
        command = [sys.executable, "-c", code]
        pipe, environment = subprocess.PIPE, os.environ | {"NUMBA_CACHE_DIR": numba.config.CACHE_DIR}
        # in a session of its own, because Ctrl-C is for the process that started it
        self._popen = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=stderr, text=True, env=environment, start_new_session=True
        )

    def run(self, job: Job) -> None:
        """Return when the process has done the job."""
        line = " ".join(job).strip() + "\n"
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        try:
            self._popen.stdin.write(line)
            self._popen.stdin.flush()
        except OSError as error:
            raise CompileError(f"a process that compiles has ended before {job.name}") from error
        if self._popen.stdout.readline() != line:
            raise CompileError(f"a process that compiles has ended at {job.name}, with exit code {self._popen.wait()}")

    def end(self) -> None:
        """End the process, whatever it does."""
        self._popen.kill()
        self._popen.communicate()


@contextmanager
def _processes(number: int, stderr: int | None) -> Iterator[SimpleQueue[_Process]]:
    """Start processes, and end them after this `with` statement."""
    started: list[_Process] = []
    idle: SimpleQueue[_Process] = SimpleQueue()
    try:
        for _ in range(number):
            started.append(_Process(stderr))
            idle.put(started[-1])
        yield idle
    except OSError as error:  # no memory for a process, for example
        raise CompileError(f"no process can be started that compiles ({error})") from error
    finally:
        for process in started:
            process.end()
