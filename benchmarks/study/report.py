"""Writes the study's page: the claims with their measurements, tables of all runs, wall times, and the figures."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from marked import inserted

from study.claims import FINDINGS
from study.conditioning import Conditioning
from study.disturbance import Disturbance
from study.figures import FIGURES
from study.findings import ONE_SEED, Finding, verdict_of
from study.fitting import Fit
from study.runs import Experiment, Rows
from study.tables import heads, line, tables

LARGER = ("cpu", "gpu", "large")  # sizes on all pictures
NOT_MEASURED = "not measured yet"

Scaled = tuple[str, Finding]  # the scale, and what was found there


def write(experiments: Sequence[Experiment], sizes: Sequence[str], folder: Path, page: Path) -> Iterator[Path]:
    """Draw EXPERIMENT-SIZE.png for every file of results, write the page's tables, and yield each path written.

    The files may also hold rows with settings that the plan doesn't have; those rows are ignored.
    """
    found: dict[str, dict[str, list[Scaled]]] = {}
    times = [*heads("experiment", "size", "runs", "diverged", "time of all runs", "machine")]
    blocks = {}
    by_name = {experiment.name: experiment for experiment in experiments}
    for experiment in experiments:
        parts, shown = [], set()
        for size in sizes:
            rows = finished(experiment, folder, size)
            if not rows or shown.issuperset(map(experiment.settings_of, rows)):  # all are of a smaller size
                continue
            shown |= set(map(experiment.settings_of, rows))
            figure = experiment.path(folder, size).with_suffix(".png")
            FIGURES[experiment.name](rows, size).savefig(figure, dpi=110)
            yield figure
            link = Path(os.path.relpath(figure, page.parent)).as_posix()
            measured_steps = finished(by_name["steps"], folder, size) if isinstance(rows[0], Fit) else []
            parts.append(f"![{experiment.title}]({link})\n\n{tables(experiment.name, rows, size, measured_steps)}")
            for finding in findings_of(experiment, rows, size):
                found.setdefault(finding.claim, {}).setdefault(size, []).append((scale(rows[0]), finding))
            times += wall_times(experiment, size, rows)
        blocks[experiment.name] = "\n\n".join(parts) or f"*{NOT_MEASURED}*"
    text = page.read_text(encoding="utf-8")
    for name, block in (blocks | {"claims": "\n".join(claims(found)), "times": "\n".join(times)}).items():
        text = inserted(text, name, block)
    page.write_text(text, encoding="utf-8")
    yield page


def finished(experiment: Experiment, folder: Path, size: str) -> list[Any]:
    """Return the finished rows of the plan of a size, in its order."""
    if size not in experiment.sizes:
        return []
    rows = Rows(experiment, folder, size)
    return [rows.get(settings) for settings in experiment.wanted(size, rows.seeds) if rows.finished(settings)]


def findings_of(experiment: Experiment, rows: list[Any], size: str) -> Iterator[Finding]:
    """Yield what the rows say about the papers' claims; some experiments aren't about any."""
    if experiment.name in FINDINGS:
        yield from FINDINGS[experiment.name](rows, size)


def claims(found: dict[str, dict[str, list[Scaled]]]) -> Iterator[str]:
    """Yield a line for each claim, with what was found at a small scale and at the largest one that has it."""
    yield from heads("claim", "small scale", "larger scale", "verdict")
    for claim, by_size in found.items():
        small = next((by_size[size] for size in ("small", "tiny") if size in by_size), [])
        large = next((by_size[size] for size in reversed(LARGER) if size in by_size), [])
        verdict = verdict_of(finding for _, finding in large or small)
        if verdict == ONE_SEED and small:
            verdict = f"{verdict_of(finding for _, finding in small)} at the small scale"
        yield line(claim, cell(small), cell(large), verdict)


def cell(found: list[Scaled]) -> str:
    """Return measurements, those of one scale after each other."""
    by_scale: dict[str, list[str]] = {}
    for name, finding in found:
        where = f"{finding.where}: " if finding.where else ""
        by_scale.setdefault(name, []).append(f"{where}{finding.measured}")
    return " ".join(f"*{name}.* {'; '.join(measured)}." for name, measured in by_scale.items()) or NOT_MEASURED


def scale(row: Any) -> str:
    """Return what a reader has to know of the size of a run."""
    if isinstance(row, Fit):
        return f"{row.pictures:,} images, {row.epochs} epochs"
    if isinstance(row, Disturbance):
        return f"{row.dimension} features" if row.network is None else "A trained network's layers"
    return "Scikit-learn's digits" if isinstance(row, Conditioning) else "Alone on the device"


def wall_times(experiment: Experiment, size: str, rows: list[Any]) -> Iterator[str]:
    """Yield one line per machine."""
    for about in dict.fromkeys(row.about for row in rows):
        of_machine = [row for row in rows if row.about == about]
        diverged = sum(isinstance(row, Fit) and row.diverged for row in of_machine)
        minutes = sum(row.seconds for row in of_machine) / 60
        yield line(experiment.name, size, len(of_machine), diverged, f"{minutes:.1f} min", about)
