"""Times of passes over several input sets on the device: launched one by one, or replayed as a CUDA graph."""

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
Step = Callable[..., Any]  # of one input set

MODES = ("eager", "graph")
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # relative, between competitors that compute the same


@dataclass(frozen=True, kw_only=True)
class DeviceCase(Case):
    """`build` gives the competitors' steps, by name, and the input sets."""

    build: Callable[[], tuple[dict[str, Step], list[Inputs]]]
    same: str | None = None  # the competitor that computes what polywhiten does
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  # of a pass over the input sets

    def measure(self, seconds: float, check_time: Callable[[], None]) -> Measured:
        """Milliseconds of a step."""
        times: dict[str, list[float]] = {}
        failures = Failures()
        with failures.kept(SUBJECT):
            check_time()
            steps, sets = self.build()
            times = {name: [] for name in steps}
            if self.same is not None:
                self._compare(steps, sets[0], self.same, failures)
            runs: dict[str, Callable[[], float]] = {}
            for name in [name for name in steps if name not in failures]:
                with failures.kept(name), launches_of(name):
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
        """A fast wrong result is a failure of polywhiten's."""
        results: dict[str, Any] = {}
        for name in [name for name in steps if name.startswith(SUBJECT) or name == same]:
            with failures.kept(name), launches_of(name), self.context():
                results[name] = steps[name](*inputs)
        expected = results.pop(same, None)
        for name, found in results.items():
            if expected is not None:
                with failures.kept(name):
                    self._check(found, expected)

    def _check(self, found: Any, expected: Any) -> None:
        found, expected = (r if isinstance(r, tuple) else (r,) for r in (found, expected))
        pairs = [(torch.as_tensor(a).float(), torch.as_tensor(b).float()) for a, b in zip(found, expected, strict=True)]
        error = torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max().item()
        if not error <= TOLERANCE[self.dtype]:  # nor where it is NaN
            raise ArithmeticError(f"a relative difference of {error:.1e} from {self.same}")

    def _prepared(self, step: Step, sets: list[Inputs]) -> Callable[[], None]:
        """A pass over all input sets, warm."""

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
        with torch.cuda.stream(stream):  # around the capture too: one that fails doesn't go back to the former stream
            for _ in range(3):  # kernels are loaded, and workspaces allocated, before the capture
                run()
            with torch.cuda.graph(graph, stream=stream):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph.replay()
        replay: Callable[[], None] = graph.replay
        return replay


def timer(run: Callable[[], None], calls: int, device: torch.device) -> Callable[[], float]:
    """Milliseconds of one of a pass' calls, measured over a batch of passes."""
    passes = repeats(milliseconds(run, 1, device))
    return lambda: milliseconds(run, passes, device) / (passes * calls)


def milliseconds(run: Callable[[], object], passes: int, device: torch.device) -> float:
    """Of so many passes, on a device that was idle."""
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
