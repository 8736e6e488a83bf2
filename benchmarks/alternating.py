"""Measures competitors in turns within one process, so that a slow minute of the machine affects all of them."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from timeit import Timer

MIN_ROUNDS = 5
MIN_MS = 5  # per measurement: shorter calls are repeated, so that clocks and launches cost only hundredths of it


class Failures(dict[str, str]):
    """The reasons why some competitors have no times, by the competitors' names."""

    @contextmanager
    def recorded(self, name: str) -> Iterator[None]:
        """Record an exception of the block as the reason of `name`, and continue after the block."""
        try:
            yield
        except Exception as error:
            self[name] = first_lines(error)


def first_lines(error: BaseException) -> str:
    """Return the first line of an error and of the errors that led to it.

    The error at the end of a broken CUDA graph capture doesn't say what broke the capture.
    """
    line = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
    return line if error.__context__ is None else f"{line}, after {first_lines(error.__context__)}"


def in_turns(
    measurements: Mapping[str, Callable[[], float]], seconds: float, failures: Failures
) -> dict[str, list[float]]:
    """Repeat rounds of one measurement each until the seconds are over, and return all results by name.

    A measurement that fails takes no part in later rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in measurements}
    left = dict(measurements)
    start, rounds = time.perf_counter(), 0
    while left and (rounds < MIN_ROUNDS or time.perf_counter() - start < seconds):
        rounds += 1
        for name, measured in list(left.items()):
            with failures.recorded(name):
                times[name].append(measured())
            if name in failures:
                del left[name]
    return times


def host_timer(call: Callable[[], object]) -> Callable[[], float]:
    """Return a function that measures the milliseconds of a call by the host's clock.

    The call runs once here and once before each measurement, as in a training loop: then a measured call finds the
    memory that its own last call freed, and not what a competitor left.
    """
    call()
    timer = Timer(call)
    number = repeats(1000 * timer.timeit(1))

    def measured() -> float:
        call()
        return 1000 * timer.timeit(number) / number

    return measured


def repeats(milliseconds: float) -> int:
    """Return how many calls of this duration make a measurement."""
    return max(1, math.ceil(MIN_MS / max(milliseconds, 1e-3)))
