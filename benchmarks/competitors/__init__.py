"""Who takes part in the measurements, by framework: a module each, imported only when asked for.

A step is a call without arguments that returns what it computes; it holds its arrays itself. Training is forward and
backward: the output and the gradients of x, weight and bias.
"""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from problems import EPS, ITER_NORM, Problem

import polywhiten as pw

Step = Callable[[], Any]

TEXTBOOK, DBN = "textbook", "dbn (eigh)"
BATCH_NORM, GROUP_NORM = "batch norm", "group norm"
CONV, GROUPED_CONV = "3x3 convolution", "grouped 1x1 convolution"
# what moves the same bytes, by what is measured
SAME_TRAFFIC = {"iter_norm": BATCH_NORM, "group_whiten": GROUP_NORM}

BACKENDS = {
    "torch": "competitors.in_torch",
    "tensorflow": "competitors.in_tensorflow",
    "jax": "competitors.in_jax",
    "numpy": "competitors.in_numpy",
}


class Framework(ABC):
    """What measurements ask of a framework on a device ("cpu" or "cuda")."""

    MODES: ClassVar[tuple[str, ...]] = ("eager",)
    PACKAGES: ClassVar[tuple[str, ...]]

    def __init__(self, device: str) -> None:
        """Raise ValueError where the framework has no such device."""
        self.device = device

    @abstractmethod
    def training(self, problem: Problem, mode: str) -> dict[str, Step]:
        """Forward and backward of every competitor, by name."""

    @abstractmethod
    def evaluation(self, problem: Problem, mode: str) -> dict[str, Step]:
        """IterNorm with frozen statistics, and what stands beside it."""

    @abstractmethod
    def products(self, mode: str, channels: int, batch: int, size: int) -> dict[str, Step]:
        """Large products of as many multiplications: a 1x1 convolution of (batch, channels, size, size), a matrix's."""

    def wait(self, result: Any) -> None:  # noqa: B027  # most have nothing to wait for on a CPU
        """Return when the result is there."""

    def run(self, step: Step) -> None:
        """From its beginning to its end."""
        self.wait(step())

    def values(self, result: Any) -> list[np.ndarray]:
        """As NumPy arrays, channels where the problem's arrays have them."""
        return [np.asarray(part) for part in result]

    def peak_bytes(self, step: Step) -> int:
        """What a warm step holds at most, above what is there before it."""
        return peak_of_host(partial(self.run, step))

    def kept_bytes(self, problem: Problem) -> dict[str, int]:
        """Alive between forward and backward beside input, output and parameters; empty where that can't be seen."""
        return {}

    def device_name(self) -> str:
        """Of the accelerator."""
        raise NotImplementedError(f"{type(self).__name__} has no accelerator")

    def versions(self) -> str:
        return ", ".join(f"{name} {version(name)}" for name in ("polywhiten", *self.PACKAGES))


def subject(problem: Problem) -> Callable[[Any, Any, Any], Any]:
    """polywhiten's function of x, weight and bias, for frameworks that differentiate it."""
    options: dict[str, Any] = {"axis": problem.axis, "iterations": problem.iterations, "eps": EPS}
    if problem.what == ITER_NORM:
        return lambda x, w, b: pw.iter_norm(x, weight=w, bias=b, group_size=problem.group, **options)
    return lambda x, w, b: pw.group_whiten(x, weight=w, bias=b, num_groups=problem.group, **options)


def framework(backend: str, device: str) -> Framework:
    """The framework's competitors on the device; ImportError or ValueError where that isn't to be had."""
    found: Framework = import_module(BACKENDS[backend]).FRAMEWORK(device)
    return found


def peak_of_host(call: Callable[[], object]) -> int:
    """Peak of the bytes that a call allocates, by native code too."""
    from memray import FileReader, Tracker  # it has no wheels for Windows

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "allocations"
        with Tracker(path):
            call()
        with FileReader(path) as reader:
            return int(reader.metadata.peak_memory)
