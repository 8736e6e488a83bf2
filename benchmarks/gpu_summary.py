"""Tables that compare the GPU measurements with their bars, the largest ratios that the project accepts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import geometric_mean
from typing import NamedTuple

from gpu_cases import COMBINATIONS, JOINED, SEPARATE, Row
from gpu_host import EVALUATION, FORWARD, LAYERS, STEP
from gpu_networks import NETWORKS
from records import SUBJECT
from rich.table import Table


class Bar(NamedTuple):
    """The largest ratio that polywhiten's time may have to a competitor's, or a limit in microseconds."""

    limit: float
    goal: float | None = None

    def __str__(self) -> str:
        return f"{self.limit:.3g}" + ("" if self.goal is None else f", goal {self.goal}")


# Bars for geometric means over shapes, by the device's clock. Ratios with None have no bar, but are shown too.
DEVICE_BARS = {
    ("IterNorm", "BatchNorm2d"): Bar(1.5, goal=1.2),
    ("IterNorm", "textbook"): Bar(1 / 5),
    ("GroupWhitening", "GroupNorm"): Bar(1.5),
    ("GroupWhitening", "textbook"): Bar(1 / 5),
    ("inverse_sqrt", "eigh"): Bar(1 / 50),
    ("inverse_sqrt and gradient", "eigh"): None,
    ("CuPy, forward", "PyTorch"): Bar(1.5),
    ("CuPy, forward and pullback", "PyTorch"): None,
}
MICROSECONDS = {"inverse_sqrt": Bar(60), "inverse_sqrt and gradient": None}
HOST_BARS = {
    ("IterNorm", STEP): Bar(3),
    ("IterNorm", EVALUATION): Bar(2),
    ("GroupWhitening", FORWARD): Bar(3),
    ("GroupWhitening", STEP): Bar(3),
    ("GroupWhitening", EVALUATION): Bar(3),
}
NETWORK_BARS = {("ResNet-50 with IterNorm", "eager"): Bar(1.3, goal=1.15)}

RATIOS = {SEPARATE: "ratio", JOINED: "ratio_joined"}  # the columns of the ratios
CAPTION = "! is above the bar"


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Yield the tables that have rows."""
    yield from (table for table in (on_device(rows), on_host(rows), of_networks(rows)) if table.row_count)


def on_device(rows: Sequence[Row]) -> Table:
    """Return a table of geometric means beside their bars."""
    names = [f"{dtype}\n{layout}" for dtype, layout in COMBINATIONS]
    table = Table("time on the device", "kernels", "mode", *names, "all", "bar", caption=CAPTION)
    for (what, competitor), bar in DEVICE_BARS.items():
        kept = [row for row in rows if (row["what"], row["competitor"]) == (what, competitor)]
        for mode in dict.fromkeys(row["mode"] for row in kept):
            for structure, column in RATIOS.items():
                found = [row for row in kept if row["mode"] == mode and column in row]
                parts = [[r for r in found if (r["dtype"], r["layout"]) == pair] for pair in COMBINATIONS]
                cells = [mean([row[column] for row in part], bar) for part in (*parts, found)]
                if found:
                    shown = structure if _has_structures(rows, what) else ""
                    table.add_row(f"{what} / {competitor}", shown, mode, *cells, str(bar or ""))
    for row in rows:
        if row["what"] in MICROSECONDS and row["competitor"] == SUBJECT and "median_ms" in row:
            blank, bar = [""] * len(COMBINATIONS), MICROSECONDS[row["what"]]
            microseconds = mean([1000 * row["median_ms"]], bar)
            table.add_row(f"{row['what']}, microseconds", "", row["mode"], *blank, microseconds, str(bar or ""))
    return table


def on_host(rows: Sequence[Row]) -> Table:
    """Return a table of the host's microseconds per call, with their ratios to the framework's layer."""
    measures = (FORWARD, STEP, EVALUATION)
    table = Table(
        *("host, microseconds", "layer", "kernels", "mode", *measures),
        caption=f"In brackets: ratio to PyTorch's layer; {CAPTION}",
    )
    for layers in LAYERS:
        found = {name: [row for row in rows if row["what"] == f"{layers}, {name}"] for name in measures}
        keys = dict.fromkeys((r["mode"], r["competitor"], r["structure"]) for part in found.values() for r in part)
        for mode, competitor, structure in keys:
            cells = []
            for name in measures:
                of_mode = [row for row in found[name] if row["mode"] == mode]
                cells.append(_host_cell(of_mode, competitor, structure, HOST_BARS.get((layers, name))))
            table.add_row(layers, competitor, structure, mode, *cells)
    return table


def of_networks(rows: Sequence[Row]) -> Table:
    """Return a table of the milliseconds and the memory of a training step."""
    table = Table("network", "layer", "kernels", "mode", "arrays", "ms", "peak MB", "ratio", "bar", caption=CAPTION)
    for row in rows:
        if row["what"] in NETWORKS:
            ratio, bar = None, None
            if row["competitor"] == SUBJECT:
                theirs = next(other for other in rows if _same_case(other, row) and other["competitor"] != SUBJECT)
                ratio, bar = theirs.get(RATIOS[row["structure"]]), NETWORK_BARS.get((row["what"], row["mode"]))
            numbers = [f"{row[name]:.4g}" if name in row else "" for name in ("median_ms", "peak_mb")]
            shown = "" if ratio is None else mean([ratio], bar)
            arrays = f"{row['dtype']} {row['layout']}"
            table.add_row(
                row["what"], row["competitor"], row["structure"], row["mode"], arrays, *numbers, shown, str(bar or "")
            )
    return table


def mean(values: Sequence[float], bar: Bar | None) -> str:
    """Return the geometric mean as text, with a mark if it is above the bar."""
    if not values:
        return ""
    value = geometric_mean(values)
    return f"{value:.3g}" + (" !" if bar is not None and value > bar.limit else "")


def _host_cell(rows: Sequence[Row], competitor: str, structure: str, bar: Bar | None) -> str:
    times = [
        row["host_us"]
        for row in rows
        if (row["competitor"], row["structure"]) == (competitor, structure) and "host_us" in row
    ]
    if not times:
        return ""
    ratios = [
        row[RATIOS[structure]]
        for row in rows
        if row["competitor"] != SUBJECT and structure and RATIOS[structure] in row
    ]
    if not ratios:
        return f"{times[0]:.3g}"
    return f"{times[0]:.3g} ({mean(ratios, bar)}{'' if bar is None else f' of {bar}'})"


def _has_structures(rows: Sequence[Row], what: str) -> bool:
    return any(row["structure"] for row in rows if row["what"] == what)


def _same_case(one: Row, other: Row) -> bool:
    return all(one[name] == other[name] for name in ("what", "mode", "shape", "dtype", "layout"))
