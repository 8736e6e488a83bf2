"""The competitors in the measurements, with one module per framework, imported only when needed.

A step is a function without arguments that holds its arrays and returns what it computes. A training step returns the
output and the gradients of x, weight and bias.
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
# The competitor that moves the same bytes, for each layer.
SAME_TRAFFIC = {"iter_norm": BATCH_NORM, "group_whiten": GROUP_NORM}

BACKENDS = {
    "torch": "competitors.in_torch",
    "tensorflow": "competitors.in_tensorflow",
    "jax": "competitors.in_jax",
    "numpy": "competitors.in_numpy",
}


class Framework(ABC):
    """The interface of a framework for measurements on a device ("cpu" or "cuda")."""

    MODES: ClassVar[tuple[str, ...]] = ("eager",)
    PACKAGES: ClassVar[tuple[str, ...]]

    def __init__(self, device: str) -> None:
        """Raise ValueError if the framework has no such device."""
        self.device = device

    @abstractmethod
    def training(self, problem: Problem, mode: str) -> dict[str, Step]:
        """Return the training steps of all competitors by name."""

    @abstractmethod
    def evaluation(self, problem: Problem, mode: str) -> dict[str, Step]:
        """Return the evaluation steps of IterNorm with frozen statistics and of its competitors by name."""

    @abstractmethod
    def products(self, mode: str, channels: int, batch: int, size: int) -> dict[str, Step]:
        """Return steps that show the fastest rate of products: a large 1x1 convolution and a large matrix product.

        The convolution is of (batch, channels, size, size), the matrices have 4 channels x 4 channels elements.
        """

    def wait(self, result: Any) -> None:  # noqa: B027  # most frameworks have nothing to wait for on a CPU
        """Wait until the result has been computed."""

    def run(self, step: Step) -> None:
        """Run a step, and wait for its result."""
        self.wait(step())

    def values(self, result: Any) -> list[np.ndarray]:
        """Return the result as NumPy arrays in the layout of the problem."""
        return [np.asarray(part) for part in result]

    def peak_bytes(self, step: Step) -> int:
        """Return the peak memory of a warm step, above what was allocated before it."""
        return peak_of_host(partial(self.run, step))

    def kept_bytes(self, problem: Problem) -> dict[str, int]:
        """Return what each competitor saves for backward in addition to input, output and parameters.

        The dictionary is empty if the framework can't tell.
        """
        return {}

    def device_name(self) -> str:
        """Return the name of the accelerator."""
        raise NotImplementedError(f"{type(self).__name__} has no accelerator")

    def versions(self) -> str:
        return ", ".join(f"{name} {version(name)}" for name in ("polywhiten", *self.PACKAGES))


def subject(problem: Problem) -> Callable[[Any, Any, Any], Any]:
    """Return polywhiten's function of x, weight and bias, for frameworks with automatic differentiation."""
    options: dict[str, Any] = {"axis": problem.axis, "iterations": problem.iterations, "eps": EPS}
    if problem.what == ITER_NORM:
        return lambda x, w, b: pw.iter_norm(x, weight=w, bias=b, group_size=problem.group, **options)
    return lambda x, w, b: pw.group_whiten(x, weight=w, bias=b, num_groups=problem.group, **options)


def framework(backend: str, device: str) -> Framework:
    """Return the framework on the device. Raise ImportError or ValueError if it isn't available there."""
    found: Framework = import_module(BACKENDS[backend]).FRAMEWORK(device)
    return found


def peak_of_host(call: Callable[[], object]) -> int:
    """Return the peak of the bytes that a call allocates, including allocations of native code."""
    from memray import FileReader, Tracker  # imported here because it has no wheels for Windows

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "allocations"
        with Tracker(path):
            call()
        with FileReader(path) as reader:
            return int(reader.metadata.peak_memory)
