"""The cases of a GPU: competitors on one shape that are measured in turns, and the rows of their results.

polywhiten's kernels have two structures (`polywhiten.gpu_launches`), which compete with each other. Here they are the
competitors "polywhiten, separate" and "polywhiten, joined"; in the rows, both are called "polywhiten", and the column
`structure` tells them apart.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from statistics import median, quantiles
from typing import Any, TypeVar

import gpu_floors as floors
import torch
from alternating import Failures
from gpu_floors import Work
from records import SUBJECT
from torch import Tensor

from polywhiten.gpu_launches import CHOICES, use_gpu_launches

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
COMBINATIONS = [(dtype, layout) for dtype in DTYPES for layout in LAYOUTS]

SUBJECTS = {structure: f"{SUBJECT}, {structure}" for structure in CHOICES}
SEPARATE, JOINED = CHOICES

FIELDS = [
    *("device", "versions", "what", "mode", "competitor", "shape", "dtype", "layout"),
    *("median_ms", "lower_quartile_ms", "upper_quartile_ms", "batches"),
    # The least memory traffic; the time of that or of the products, the longer one; the median divided by that time.
    *("floor_bytes", "floor_ms", "times_floor"),
    # `ratio` is polywhiten's median divided by this one; where there are two structures, the median of "separate".
    *("ratio", "failure"),
    "structure",  # the structure of polywhiten's kernels, where there are two
    "ratio_joined",  # the median of polywhiten's "joined" kernels divided by this one
    *("host_us", "host_lower_quartile_us", "host_upper_quartile_us"),  # by the host's clock, instead of median_ms
    "peak_mb",  # peak memory of a step, above what was allocated before the network
]

Shape = tuple[int, ...]
Row = dict[str, Any]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass
class Measured:
    """The times of a case's competitors: milliseconds of the device, or microseconds of the host if `is_host`."""

    times: dict[str, list[float]]
    failures: Failures
    peak_bytes: dict[str, int] = field(default_factory=dict)
    is_host: bool = False


@dataclass(frozen=True)
class Case(ABC):
    """Competitors on one shape, dtype and layout."""

    device: torch.device
    what: str
    mode: str
    shape: Shape
    dtype: str = "float32"
    layout: str = ""
    work: Work | None = None

    def __str__(self) -> str:
        return " ".join([self.what, self.mode, "x".join(map(str, self.shape)), self.dtype, self.layout]).strip()

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @abstractmethod
    def measure(self, seconds: float, check_time: Callable[[], None]) -> Measured:
        """Measure for this many seconds, preparations not counted.

        `check_time` is called before a competitor is prepared, and raises TimeoutError if it is too late to begin.
        """

    @abstractmethod
    def compile(self, structure: str) -> None:
        """Run each competitor of a structure once; "" means the competitors that have no structure."""

    def draw(self) -> Tensor:
        """Draw a random array of the case's shape, dtype and layout."""
        array = torch.randn(self.shape, device=self.device, dtype=DTYPES[self.dtype])
        return array.contiguous(memory_format=LAYOUTS[self.layout]) if self.layout else array

    def rows(self, measured: Measured, device_name: str) -> list[Row]:
        """Return a row for each competitor, polywhiten's first."""
        order = (SUBJECT, *SUBJECTS.values())
        names = sorted(measured.times.keys() | measured.failures.keys())
        names.sort(key=lambda name: order.index(name) if name in order else len(order))
        return [self._row(name, measured, device_name) for name in names]

    def _row(self, name: str, measured: Measured, device_name: str) -> Row:
        row: Row = {"what": self.what, "mode": self.mode}
        row |= {"competitor": name.partition(", ")[0], "structure": structure_of(name)}
        row |= {"shape": "x".join(map(str, self.shape)), "dtype": self.dtype, "layout": self.layout}
        row["failure"] = measured.failures.get(name)
        if name in measured.peak_bytes:
            row["peak_mb"] = round(measured.peak_bytes[name] / 1e6, 1)
        medians = {
            competitor: median(times)
            for competitor, times in measured.times.items()
            if times and competitor not in measured.failures
        }
        least = None
        if self.work is not None:
            row["floor_bytes"] = self.work.bytes
            least = floors.least_seconds(self.work, self.dtype, device_name)
        if least is not None:
            row["floor_ms"] = round(1000 * least, 6)
        if name in medians:
            row |= _statistics(measured.times[name], measured.is_host)
            if least is not None:
                row["times_floor"] = round(medians[name] / (1000 * least), 3)
            for column, subjects in (("ratio", (SUBJECT, SUBJECTS[SEPARATE])), ("ratio_joined", (SUBJECTS[JOINED],))):
                for subject in subjects:
                    if subject in medians:
                        row[column] = round(medians[subject] / medians[name], 5)
        return row


def _statistics(times: list[float], is_host: bool) -> Row:
    lower, _, upper = quantiles(times, n=4, method="inclusive")
    names = ("host_us", "host_lower_quartile_us", "host_upper_quartile_us")
    if not is_host:
        names = ("median_ms", "lower_quartile_ms", "upper_quartile_ms")
    digits = 2 if is_host else 6
    return {"batches": len(times)} | {
        name: round(value, digits) for name, value in zip(names, (median(times), lower, upper), strict=True)
    }


def structure_of(competitor: str) -> str:
    """Return the structure of polywhiten's kernels in a competitor, or "" if it has only one or isn't polywhiten."""
    return competitor.partition(", ")[2]


def launches_of(competitor: str) -> AbstractContextManager[None]:
    """Return a context in which polywhiten launches the kernels of the competitor's structure."""
    structure = structure_of(competitor)
    return use_gpu_launches(structure) if structure else nullcontext()


def launching(competitor: str, function: Function) -> Function:
    """Return the function so that it runs in the context `launches_of(competitor)`, both forward and backward."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        with launches_of(competitor):
            return function(*arguments)

    return call  # type: ignore[return-value]


def sets_larger_than_the_cache(case: Case, arrays: int) -> int:
    """Return how many sets of arrays fill the device's cache twice, and at least two."""
    cache = torch.cuda.get_device_properties(case.device).L2_cache_size if case.on_cuda else 0
    size = arrays * math.prod(case.shape) * floors.ITEMSIZE[case.dtype]
    return max(2, math.ceil(2 * cache / size))
