"""The bars: the largest ratios to competitors that polywhiten may have, and how measurements are judged by them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from statistics import geometric_mean

from records import SUBJECT, Record

INPUT, FLOOR = "input", "floor"
MEAN, WORST = "geometric mean", "worst"
AVX2 = "cpu-avx2"  # the device of `speed.py --isa avx2`
ALLOWANCE = 1.3  # how far above a bar the guard allows ratios, because machines and their load differ


@dataclass(frozen=True)
class Bar:
    """polywhiten may take at most `limit` times what the competitor takes.

    With the competitor "input", the bar limits the bytes saved for backward, as a fraction of the input's bytes.
    """

    backend: str
    what: str
    competitor: str
    statistic: str
    limit: float
    measure: str = "training"
    goal: float | None = None
    channels: tuple[float, float] = (1, inf)  # the bar concerns numbers of channels from the first to below the second
    avx2_limit: float | None = None  # with AVX2, if it is another one there

    def limit_on(self, device: str) -> float:
        return self.limit if device != AVX2 or self.avx2_limit is None else self.avx2_limit

    def __str__(self) -> str:
        low, high = self.channels
        some = f", {low:g} channels and more" if low > 1 else f", below {high:g} channels" if high < inf else ""
        measure = "" if self.measure == "training" else f", {self.measure}"
        return f"{self.what} / {self.competitor}{measure}{some} ({self.statistic})"

    def ratio(self, record: Record) -> float | None:
        """Return the ratio of a record that the bar concerns, else None."""
        low, high = self.channels
        concerned = self.backend, self.what, self.measure
        if (record.backend, record.what, record.measure) != concerned or not low <= record.sizes[1] < high:
            return None
        if self.competitor == INPUT:
            kept = record.kept_bytes if record.competitor == SUBJECT else None
            return None if kept is None else kept / (4 * record.elements)
        return record.ratio if record.competitor == self.competitor else None


@dataclass(frozen=True)
class Verdict:
    """A bar with what was measured for it in one mode on one device."""

    bar: Bar
    device: str
    mode: str
    value: float
    cases: int
    worst: str  # the case with the largest ratio

    @property
    def limit(self) -> float:
        return self.bar.limit_on(self.device)

    @property
    def met(self) -> bool:
        return self.value <= self.limit

    @property
    def allowed(self) -> bool:
        """Whether the guard accepts the value."""
        return self.value <= ALLOWANCE * self.limit

    def __str__(self) -> str:
        about = f"{self.bar.backend} {self.mode}, {self.bar}"
        return f"{about}: {self.value:.3g}, bar {self.limit:.3g}, worst at {self.worst}"


BARS = [
    Bar("torch", "iter_norm", "textbook", MEAN, 1 / 2.5, avx2_limit=0.36),
    Bar("torch", "iter_norm", "textbook", WORST, 1, avx2_limit=0.9),
    Bar("torch", "iter_norm", FLOOR, MEAN, 2, goal=1.5),
    Bar("torch", "iter_norm", "3x3 convolution", WORST, 0.25, channels=(128, inf)),
    Bar("torch", "iter_norm", "3x3 convolution", WORST, 0.4, channels=(1, 128)),
    Bar("torch", "iter_norm", "grouped 1x1 convolution", WORST, 1.3, "evaluation"),
    Bar("torch", "iter_norm", INPUT, WORST, 0.01, "memory"),
    Bar("torch", "group_whiten", "textbook", MEAN, 1 / 2.5, avx2_limit=0.42),
    Bar("torch", "group_whiten", "textbook", WORST, 1, avx2_limit=0.9),
    Bar("torch", "group_whiten", INPUT, WORST, 0.01, "memory"),
    Bar("tensorflow", "iter_norm", "textbook", MEAN, 0.65),
    Bar("tensorflow", "group_whiten", "textbook", MEAN, 0.8),
    Bar("jax", "iter_norm", "textbook", MEAN, 1 / 1.5),
    Bar("numpy", "iter_norm", "textbook", MEAN, 1 / 2),
]


def barred(backend: str, what: str, measure: str) -> set[str]:
    """Return the competitors for which there is a bar."""
    return {bar.competitor for bar in BARS if (bar.backend, bar.what, bar.measure) == (backend, what, measure)}


def verdicts(records: Iterable[Record], bars: Sequence[Bar] = BARS) -> list[Verdict]:
    """Return the verdicts by device and mode, for the bars that have measurements."""
    records = list(records)
    found = []
    for bar in bars:
        ratios: dict[tuple[str, str], list[tuple[float, str]]] = {}
        for record in records:
            ratio = bar.ratio(record)
            if ratio is not None:
                ratios.setdefault((record.device, record.mode), []).append((ratio, record.case))
        for (device, mode), pairs in ratios.items():
            worst, case = max(pairs)
            value = worst if bar.statistic == WORST else geometric_mean(ratio for ratio, _ in pairs)
            found.append(Verdict(bar, device, mode, value, len(pairs), case))
    return found
