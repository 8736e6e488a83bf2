"""Measurements of competitors that take turns in one process, so that a slow minute of the machine meets them all."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from timeit import Timer

LEAST_ROUNDS = 5
LEAST_MS = 5  # of a measurement, in which shorter calls are repeated: clocks, and launches, cost hundredths of it


class Failures(dict[str, str]):
    """Why competitors have no times."""

    @contextmanager
    def kept(self, name: str) -> Iterator[None]:
        """Keep the first line of what is raised, and go on with the others."""
        try:
            yield
        except Exception as error:
            self[name] = told(error)


def told(error: BaseException) -> str:
    """The first line of an error, and of those before it: the end of a broken capture doesn't say what broke it."""
    line = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
    return line if error.__context__ is None else f"{line}, after {told(error.__context__)}"


def in_turns(
    measurements: Mapping[str, Callable[[], float]], seconds: float, failures: Failures
) -> dict[str, list[float]]:
    """Results of every measurement: rounds of one each, until the seconds are over; who fails is left out."""
    times: dict[str, list[float]] = {name: [] for name in measurements}
    left = dict(measurements)
    start, rounds = time.perf_counter(), 0
    while left and (rounds < LEAST_ROUNDS or time.perf_counter() - start < seconds):
        rounds += 1
        for name, measured in list(left.items()):
            with failures.kept(name):
                times[name].append(measured())
            if name in failures:
                del left[name]
    return times


def host_timer(call: Callable[[], object]) -> Callable[[], float]:
    """Milliseconds of a call, by the host's clock; the call is warmed up here, and before each measurement.

    In a loop, as training is one, it finds memory that its last call gave back, and not what a competitor left.
    """
    call()
    timer = Timer(call)
    number = repeats(1000 * timer.timeit(1))

    def measured() -> float:
        call()
        return 1000 * timer.timeit(number) / number

    return measured


def repeats(milliseconds: float) -> int:
    """How many calls of so long make a measurement."""
    return max(1, math.ceil(LEAST_MS / max(milliseconds, 1e-3)))
