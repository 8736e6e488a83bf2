"""Makes runs, in this process or in several at once, and reports each epoch of them."""

import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from threading import Thread
from typing import Any

import torch

from polywhiten.analysis import InfeasibleWarning
from polywhiten.cli.demo.data import DataError
from study.experiments import BY_NAME
from study.runs import Place

POLL_SECONDS = 0.05
ENDED = "its process ended without an error message, as when memory is full"


@dataclass(frozen=True)
class Job:
    """Runs of an experiment that one process makes, one after the other."""

    experiment: str
    settings: tuple[Any, ...]


@dataclass(frozen=True)
class Update:
    """What became of a run: a part of it is done, with the results so far, or it ended, perhaps with an error."""

    experiment: str
    settings: Any
    fraction: float
    results: dict[str, Any] | None = None
    ended: bool = False
    error: str | None = None


def updates(job: Job, place: Place, stopped: Callable[[], bool]) -> Iterator[Update]:
    """Make the runs of a job until they are to stop, which is asked before each run and after each epoch.

    A run that fails doesn't keep the others from being made.
    """
    perform = BY_NAME[job.experiment].perform
    for settings in job.settings:
        if stopped():
            return
        yield Update(job.experiment, settings, 0.0)
        start = time.perf_counter()
        try:
            for fraction, results in perform(settings, place):
                measured = None
                if results is not None:
                    measured = {"seconds": round(time.perf_counter() - start, 3)} | results
                yield Update(job.experiment, settings, fraction, measured)
                if fraction < 1 and stopped():
                    return
            yield Update(job.experiment, settings, 1.0, ended=True)
        except DataError:
            raise  # no run can be made with these pictures
        except Exception:
            yield Update(job.experiment, settings, 0.0, ended=True, error=traceback.format_exc())


@dataclass(frozen=True)
class Maker:
    """Makes runs, and calls `report` with each update. No run begins or goes on after the deadline."""

    place: Place
    deadline: float  # as time.time() gives it
    threads: int | None
    report: Callable[[Update], None]

    def make(self, jobs: list[Job], processes: int) -> None:
        """Make the runs of all jobs, which begin in their order, in this process or in several others."""
        if processes == 1:
            for job in jobs:
                for update in updates(job, self.place, lambda: time.time() > self.deadline):
                    self.report(update)
            return
        interrupted: list[Job] = []
        while jobs:
            jobs, stopped = self._make_together(jobs, processes)
            interrupted += stopped
        while interrupted:  # one of them ended a process, and now it ends its own alone
            job = interrupted.pop(0)
            _, stopped = self._make_together([job], 1)
            for again in stopped:
                self.report(Update(again.experiment, again.settings[0], 0.0, ended=True, error=ENDED))
                interrupted += [Job(again.experiment, again.settings[1:])] if again.settings[1:] else []

    def _make_together(self, jobs: list[Job], processes: int) -> tuple[list[Job], list[Job]]:
        """Make runs in new processes. If one of them ends early, return the jobs not begun and the interrupted ones."""
        context = get_context("spawn")  # a fork of a process that has used CUDA can't use it
        messages, stopping = context.SimpleQueue(), context.Event()
        current: dict[int, Update] = {}  # what each job is doing

        def receive() -> None:
            while not messages.empty():
                number, update = messages.get()
                current[number] = update
                self.report(update)

        arguments = (messages, stopping, self.place, self.deadline, self.threads)
        with ProcessPoolExecutor(processes, context, _begin, arguments) as pool:
            futures = [pool.submit(_work, number, job) for number, job in enumerate(jobs)]
            try:
                _wait(futures, receive)
            except KeyboardInterrupt:
                stopping.set()  # runs end after their epoch
                for future in futures:
                    future.cancel()
                _wait(futures, receive)
                raise
        return left_of(jobs, [future.exception() for future in futures], current)


def _wait(futures: list[Future[None]], receive: Callable[[], None]) -> None:
    """Receive messages until all is done. They are sent before a job is done, so none is missed."""
    while not all(future.done() for future in futures):
        receive()
        time.sleep(POLL_SECONDS)
    receive()


def left_of(
    jobs: list[Job], errors: list[BaseException | None], current: dict[int, Update]
) -> tuple[list[Job], list[Job]]:
    """Return the jobs that a process that ended early kept from beginning, and what is left of those that had begun."""
    unbegun, interrupted = [], []
    for number, (job, error) in enumerate(zip(jobs, errors, strict=True)):
        if error is None:
            continue
        if not isinstance(error, BrokenProcessPool) or not current:  # without any update, no process could begin
            raise error
        if number not in current:
            unbegun.append(job)
            continue
        last = current[number]
        remaining = job.settings[job.settings.index(last.settings) + last.ended :]
        interrupted += [Job(job.experiment, remaining)] if remaining else []
    return unbegun, interrupted


_state: dict[str, Any] = {}  # of a process that makes runs


def _begin(messages: SimpleQueue, stopping: Event, place: Place, deadline: float, threads: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides what an interrupt stops
    Thread(target=_end_with_parent, daemon=True).start()
    if threads:
        torch.set_num_threads(threads)
    prepare(place.device)
    _state.update(messages=messages, place=place, stopped=lambda: stopping.is_set() or time.time() > deadline)


def _end_with_parent() -> None:
    """End this process when the first one was killed; otherwise it would wait for jobs forever."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work(number: int, job: Job) -> None:
    for update in updates(job, _state["place"], _state["stopped"]):
        _state["messages"].put((number, update))


def prepare(device: str) -> None:
    """Let cuDNN choose its convolutions by trying some, as training scripts do, and silence expected warnings."""
    warnings.simplefilter("ignore", InfeasibleWarning)  # infeasible numbers of groups are measured on purpose
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.benchmark_limit = 3  # the default takes long for each shape
