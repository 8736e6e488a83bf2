"""Measures passes over several input sets by the device's clock, launched one by one or replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from timeit import Timer
from typing import Any

import torch
from alternating import Failures, in_turns, repeats
from gpu_cases import Case, Measured, launches_of, launching, structure_of
from records import SUBJECT

Inputs = tuple[Any, ...]
Step = Callable[..., Any]  # takes one input set

MODES = ("eager", "graph")
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # relative difference of competitors that compute the same


@dataclass(frozen=True, kw_only=True)
class DeviceCase(Case):
    """A case measured by the device's clock; `build` makes the competitors' steps, by name, and the input sets."""

    build: Callable[[], tuple[dict[str, Step], list[Inputs]]]
    same: str | None = None  # the competitor that computes the same as polywhiten
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered for each pass over the input sets

    def measure(self, seconds: float, check_time: Callable[[], None]) -> Measured:
        """Measure the milliseconds of a step."""
        times: dict[str, list[float]] = {}
        failures = Failures()
        with failures.recorded(SUBJECT):
            check_time()
            steps, sets = self.build()
            times = {name: [] for name in steps}
            if self.same is not None:
                self._compare(steps, sets[0], self.same, failures)
            runs: dict[str, Callable[[], float]] = {}
            for name in [name for name in steps if name not in failures]:
                with failures.recorded(name), launches_of(name):
                    run = self._prepared(steps[name], sets)
                    runs[name] = launching(name, timer(run, len(sets), self.device))
            times |= in_turns(runs, seconds, failures)
        return Measured(times, failures)

    def compile(self, structure: str) -> None:
        steps, sets = self.build()
        for name, step in steps.items():
            if structure_of(name) == structure:
                with launches_of(name), self.context():
                    step(*sets[0])

    def _compare(self, steps: dict[str, Step], inputs: Inputs, same: str, failures: Failures) -> None:
        """Record a failure of polywhiten if its result differs from that of `same`, however fast it is."""
        results: dict[str, Any] = {}
        for name in [name for name in steps if name.startswith(SUBJECT) or name == same]:
            with failures.recorded(name), launches_of(name), self.context():
                results[name] = steps[name](*inputs)
        expected = results.pop(same, None)
        for name, found in results.items():
            if expected is not None:
                with failures.recorded(name):
                    self._check(found, expected)

    def _check(self, found: Any, expected: Any) -> None:
        found, expected = (r if isinstance(r, tuple) else (r,) for r in (found, expected))
        pairs = [(torch.as_tensor(a).float(), torch.as_tensor(b).float()) for a, b in zip(found, expected, strict=True)]
        error = torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max().item()
        if not error <= TOLERANCE[self.dtype]:  # also true for NaN
            raise ArithmeticError(f"a relative difference of {error:.1e} from {self.same}")

    def _prepared(self, step: Step, sets: list[Inputs]) -> Callable[[], None]:
        """Return a warm function that makes a pass over all input sets."""

        def run() -> None:
            with self.context():
                for inputs in sets:
                    step(*inputs)

        if self.mode == "eager" or not self.on_cuda:
            run()
            run()
            return run
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # restores the stream also after a failed capture, which doesn't do so itself
            for _ in range(3):  # load kernels and allocate workspaces before the capture
                run()
            with torch.cuda.graph(graph, stream=stream):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph.replay()
        replay: Callable[[], None] = graph.replay
        return replay


def timer(run: Callable[[], None], calls: int, device: torch.device) -> Callable[[], float]:
    """Return a function that measures the milliseconds of one call within a pass, over several passes."""
    passes = repeats(milliseconds(run, 1, device))
    return lambda: milliseconds(run, passes, device) / (passes * calls)


def milliseconds(run: Callable[[], object], passes: int, device: torch.device) -> float:
    """Measure the milliseconds of several passes together, on a device that is idle before."""
    if device.type != "cuda":
        return 1000 * Timer(run).timeit(passes)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(passes):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)
