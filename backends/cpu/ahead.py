"""Compile all kernels before they are needed, in several processes: Numba compiles one at a time in each."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from queue import SimpleQueue
from typing import NamedTuple

import numba

from polywhiten.cpu.device import affine_map, averages, cross_moments, gradients, moments, newton
from polywhiten.cpu.runtime import first_use, workers
from polywhiten.cpu.runtime.cache import kernel_address, kernel_folder
from polywhiten.cpu.runtime.kernel_files import NotKeptError, without_compiling

DTYPES = ("float32", "float64")
# Those that take longest to compile come first, so that no process ends long after the others.
KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        cross_moments.cross_moments,
        moments.moments,
        newton.inverse_sqrt_adjoint,
        affine_map.affine_map,
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


def compile_in_processes(todo: Sequence[Job]) -> Iterator[Job]:
    """Compile in as many processes as there are processors, and yield each job when it is done.

    Raises
    ------
    CompileError
        A process has ended early, or can't be started.
    """
    number = min(len(todo), int(numba.config.NUMBA_DEFAULT_NUM_THREADS))
    # the processes end first, so that no thread waits for an answer after Ctrl-C
    with ThreadPoolExecutor(number) as threads, _processes(number) as idle:

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
    for line in sys.stdin:
        Job(*line.split()).run()
        print(line, end="", flush=True)


class _Process:
    """A process that runs `serve`."""

    def __init__(self) -> None:
        code = f"import sys; sys.path[:] = {sys.path!r}; from polywhiten.cpu.ahead import serve; serve()"
        command = [sys.executable, "-c", code]
        pipe = subprocess.PIPE
        # in a session of its own, because Ctrl-C is for the process that started it
        self._popen = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)

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
def _processes(number: int) -> Iterator[SimpleQueue[_Process]]:
    """Start processes, and end them after this `with` statement."""
    started: list[_Process] = []
    idle: SimpleQueue[_Process] = SimpleQueue()
    try:
        for _ in range(number):
            started.append(_Process())
            idle.put(started[-1])
        yield idle
    except OSError as error:  # no memory for a process, for example
        raise CompileError(f"no process can be started that compiles ({error})") from error
    finally:
        for process in started:
            process.end()
