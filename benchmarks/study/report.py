"""Writes the study's page: the claims with their measurements, tables of all runs, wall times, and the figures."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from marked import inserted

from study.claims import FINDINGS, accuracy, train_accuracy, train_loss
from study.conditioning import FISHER_FRACTION, FRACTION, Conditioning
from study.disturbance import DATA_LABELS, Disturbance
from study.figures import FIGURES, norms_of, same
from study.fitting import Fit, scaled_lr
from study.runs import Experiment, rows_of


def write(experiments: Sequence[Experiment], sizes: Sequence[str], folder: Path, page: Path) -> Iterator[Path]:
    """Draw EXPERIMENT-SIZE.png for every file of results, write the page's tables, and yield each path written.

    The files may also hold rows with settings that the plan doesn't have; those rows are ignored.
    """
    claims = ["| claim | measured | verdict | size | figure |", "| --- | --- | --- | --- | --- |"]
    times = ["| experiment | size | runs | diverged | wall time | machine |", "| --- | --- | --- | --- | --- | --- |"]
    blocks = {}
    for experiment in experiments:
        parts = []
        for size in sizes:
            path = experiment.path(folder, size)
            rows = planned(experiment, size, rows_of(experiment, path))
            if not rows:
                continue
            figure = path.with_suffix(".png")
            FIGURES[experiment.name](rows).savefig(figure, dpi=110)
            yield figure
            link = Path(os.path.relpath(figure, page.parent)).as_posix()
            parts.append(f"![{experiment.title}]({link})\n\n{table(rows)}")
            for found in FINDINGS[experiment.name](rows):
                where = f"[{figure.name}]({link})"
                claims.append(f"| {found.claim} | {found.measured} | {found.verdict} | {size} | {where} |")
            times += wall_times(experiment, size, rows)
        blocks[experiment.name] = "\n\n".join(parts)
    text = page.read_text(encoding="utf-8")
    for name, block in (blocks | {"claims": "\n".join(claims), "times": "\n".join(times)}).items():
        text = inserted(text, name, block)
    page.write_text(text, encoding="utf-8")
    yield page


def planned(experiment: Experiment, size: str, rows: list[Any]) -> list[Any]:
    """Return the latest row for each of the plan's settings, in the plan's order."""
    found = {experiment.settings_of(row): row for row in rows}
    seeds = 1 + max((row.seed for row in rows), default=-1)
    return [found[settings] for settings in experiment.plan(size, seeds) if settings in found]


def wall_times(experiment: Experiment, size: str, rows: list[Any]) -> Iterator[str]:
    """Yield one line per machine."""
    for about in dict.fromkeys(row.about for row in rows):
        of_machine = [row for row in rows if row.about == about]
        diverged = sum(isinstance(row, Fit) and row.diverged for row in of_machine)
        minutes = sum(row.seconds for row in of_machine) / 60
        yield f"| {experiment.name} | {size} | {len(of_machine)} | {diverged} | {minutes:.1f} min | {about} |"


def table(rows: list[Any]) -> str:
    """Return a Markdown table with one line per norm and setting."""
    tables = {Disturbance: disturbance_table, Conditioning: conditioning_table, Fit: fit_table}
    return "\n".join(tables[type(rows[0])](rows))


def disturbance_table(rows: list[Disturbance]) -> Iterator[str]:
    sizes = sorted({row.batch_size for row in rows})[::2]
    yield "SND by batch size for the first seed, with its standard error over the samples."
    yield ""
    yield f"| data | | {' | '.join(map(str, sizes))} |"
    yield "| --- " * (2 + len(sizes)) + "|"
    for data in dict.fromkeys(row.data for row in rows):
        for norm in norms_of(rows):
            mine = {r.batch_size: r for r in reversed(rows) if r.data == data and same(r, norm)}
            cells = (f"{mine[m].value:.4f} ± {mine[m].standard_error:.4f}" if m in mine else "" for m in sizes)
            yield f"| {DATA_LABELS[data]} | {norm.label} | {' | '.join(cells)} |"


def conditioning_table(rows: list[Conditioning]) -> Iterator[str]:
    part = f"{100 * FRACTION:.0f} %"
    columns = {
        "outputs_full": "normalized outputs, all",
        "outputs_partial": part,
        "inputs_full": "layer inputs, all",
        "inputs_partial": part,
        "gauss_newton_partial": f"Gauss-Newton, {100 * FISHER_FRACTION:.0f} %",
        "losses": "loss",
    }
    last = rows[0].measured_at[-1]
    seeds = len({row.seed for row in rows})
    yield f"Condition numbers after {last} steps, as geometric means over {seeds} seeds."
    yield ""
    yield f"| | {' | '.join(columns.values())} |"
    yield "| --- " * (1 + len(columns)) + "|"
    for norm in norms_of(rows):
        mine = [row for row in rows if same(row, norm)]
        values = (np.exp(np.mean([np.log(getattr(row, name)[-1]) for row in mine])) for name in columns)
        yield f"| {norm.label} | {' | '.join(f'{value:.3g}' for value in values)} |"


def fit_table(rows: list[Fit]) -> Iterator[str]:
    yield "Mean and standard deviation over the seeds after the last epoch."
    yield ""
    yield "| | batch | learning rate | seeds | training loss | training accuracy | test accuracy | ms per step |"
    yield "| --- " * 8 + "|"
    cases = dict.fromkeys((norm, row.batch_size, row.lr) for row in rows for norm in norms_of([row]))
    for norm, batch_size, lr in cases:
        mine = [row for row in rows if same(row, norm) and (row.batch_size, row.lr) == (batch_size, lr)]
        diverged = sum(row.diverged for row in mine)
        seeds = f"{len(mine)}" + (f", {diverged} diverged" if diverged else "")
        values = [
            spread([value(row) for row in mine], f)
            for value, f in ((train_loss, ".3f"), (train_accuracy, ".1f"), (accuracy, ".1f"))
        ]
        factor = lr / scaled_lr(batch_size)
        rate = f"{lr:g}" + (f" (x {factor:g})" if factor > 1 else "")
        ms = np.median([row.ms_per_step for row in mine])
        yield f"| {norm.label} | {batch_size} | {rate} | {seeds} | {' | '.join(values)} | {ms:.3g} |"


def spread(values: list[float], form: str) -> str:
    return f"{np.mean(values):{form}}" + (f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else "")
