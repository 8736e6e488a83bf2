"""The tables of the study's page, as lines of Markdown."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from study import steps
from study.conditioning import FISHER_FRACTION, FRACTION, Conditioning
from study.disturbance import DATA_LABELS, GAUSSIAN, Disturbance, outputs_of
from study.figures import norms_of, same
from study.findings import accuracy, train_accuracy, train_loss
from study.fitting import Fit, scaled_lr
from study.norms import Norm
from study.steps import Steps

MIB = 2**20


def tables(experiment: str, rows: list[Any], size: str, measured_steps: Sequence[Steps]) -> str:
    """Return the Markdown tables of an experiment, with one line per norm and setting."""
    made: dict[str, list[Iterator[str]]] = {
        "conditioning": [conditioning_table(rows)],
        "disturbance": [disturbance_table(rows), readings_table(rows), layers_table(rows)],
        "evaluation": [averages_table(rows)],
        "steps": [steps_table(rows)],
    }
    lines = made.get(experiment, [fit_table(rows, size, measured_steps), averages_table(rows)])
    return "\n".join(line for part in lines for line in part).strip()


def heads(*names: str) -> Iterator[str]:
    yield f"| {' | '.join(names)} |"
    yield "| --- " * len(names) + "|"


def line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def disturbance_table(rows: list[Disturbance]) -> Iterator[str]:
    """Yield a table for rows of features, in groups."""
    grouped = [row for row in rows if row.network is None and row.group_size != 0]
    if not grouped:
        return
    dimension = max(row.dimension for row in grouped)
    grouped = [row for row in grouped if row.dimension == dimension]
    sizes = sorted({row.batch_size for row in grouped})[::2]
    yield "SND by batch size for the first seed, with its standard error over the samples."
    yield ""
    yield from heads("data", "", *map(str, sizes))
    yield from snd_lines(grouped, sizes)


def snd_lines(rows: list[Disturbance], sizes: list[int]) -> Iterator[str]:
    """Yield a line with the disturbance at each batch size, for all data and norms."""
    for name, norm, mine in lines_of(rows):
        cells = (f"{mine[m].value:.4f} ± {mine[m].standard_error:.4f}" if m in mine else "" for m in sizes)
        yield line(name, norm.label, *cells)


def lines_of(rows: list[Disturbance]) -> Iterator[tuple[str, Norm, dict[int, Disturbance]]]:
    """Yield the name of the data, the norm, and the first seed's rows by batch size."""
    for data in dict.fromkeys(row.data for row in rows):
        for norm in norms_of(rows):
            mine = {r.batch_size: r for r in reversed(rows) if r.data == data and same(r, norm)}
            if mine:
                yield DATA_LABELS[data], norm, mine


def readings_table(rows: list[Disturbance]) -> Iterator[str]:
    """Yield a table of three readings of the definition, for Gaussian data whose features are one group."""
    gaussian = [row for row in rows if row.network is None and row.data == GAUSSIAN]
    whitened = [row for row in gaussian if row.group_size == 0]
    if not whitened:
        return
    dimensions = sorted({row.dimension for row in whitened})
    bns = [row for row in gaussian if row.norm == "bn" and row.batch_size == whitened[0].batch_size]
    whole = bns + whitened
    readings = {
        "E of the norm": lambda row: row.value * row.dimension,
        "divided by d": lambda row: row.value,
        "divided by the norm of the output": relative,
    }
    yield ""
    yield (
        f"Three readings of the definition, for Gaussian data with d features in one group, at batch size "
        f"{whole[0].batch_size}."
    )
    yield ""
    yield from heads("reading", "", *(f"d = {d}" for d in dimensions))
    for name, reading in readings.items():
        for norm in norms_of(whole):
            mine = {row.dimension: reading(row) for row in whole if same(row, norm)}
            cells = (f"{mine[d]:.3g}" if math.isfinite(mine.get(d, math.nan)) else "" for d in dimensions)
            yield line(name, norm.label, *cells)


def layers_table(rows: list[Disturbance]) -> Iterator[str]:
    """Yield a table for each layer of a trained network, and Gaussian data of the same shape."""
    for number in sorted({row.layer for row in rows if row.layer is not None}):
        mine = [row for row in rows if row.layer == number]
        sizes = sorted({row.batch_size for row in mine})
        middle = sizes[len(sizes) // 2]
        yield ""
        yield (
            f"1000 SND of what the trained network's norm {number} gets ({mine[0].dimension} channels), by batch size; "
            f"and for batches of {middle} the mean distance divided by the mean norm of the output."
        )
        yield ""
        yield from heads("data", "", *map(str, sizes), f"{middle}, by the norm")
        for name, norm, by_size in lines_of(mine):
            cells = [f"{1000 * by_size[m].value:.2f} ± {1000 * by_size[m].standard_error:.2f}" for m in sizes]
            yield line(name, norm.label, *cells, f"{relative(by_size[middle]):.3f}")


def relative(row: Disturbance) -> float:
    """Return the mean distance of an output from its mean, divided by the mean norm of the output."""
    return row.value * outputs_of(row) / (row.output_norm or math.nan)


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
    last, seeds = rows[0].measured_at[-1], len({row.seed for row in rows})
    yield f"Condition numbers after {last} steps, as geometric means over {seeds} seeds."
    yield ""
    yield from heads("", *columns.values())
    for norm in norms_of(rows):
        mine = [row for row in rows if same(row, norm)]
        values = (np.exp(np.mean([np.log(getattr(row, name)[-1]) for row in mine])) for name in columns)
        yield line(norm.label, *(f"{value:.3g}" for value in values))


def fit_table(rows: list[Fit], size: str, measured_steps: Sequence[Steps]) -> Iterator[str]:
    """Yield a table of trained networks. Times and memory are those of an idle device, if they were measured there."""
    alone = {steps.EXPERIMENT.settings_of(row): row for row in measured_steps}
    has_memory = any(row.peak_bytes is not None for row in measured_steps)
    yield "Mean and standard deviation over the seeds after the last epoch."
    yield ""
    extra = ("peak MiB",) if has_memory else ()
    values = "training loss", "training accuracy", "test accuracy", "ms per step"
    yield from heads("", "batch", "learning rate", "seeds", *values, *extra)
    for mine in cases(rows):
        first = mine[0]
        diverged = sum(row.diverged for row in mine)
        seeds = f"{len(mine)}" + (f", {diverged} diverged" if diverged else "")
        measures = ((train_loss, ".3f"), (train_accuracy, ".1f"), (accuracy, ".1f"))
        means = [spread([value(row) for row in mine], form) for value, form in measures]
        step = alone.get(steps.step_settings(first, steps.SECONDS.get(size, 1.0)))
        ms = np.median([row.ms_per_step for row in mine]) if step is None else step.median_ms
        memory = [mebibytes(step and step.peak_bytes)] if has_memory else []
        yield line(named(first), first.batch_size, rate_of(first), seeds, *means, f"{ms:.3g}", *memory)


def cases(rows: list[Fit]) -> list[list[Fit]]:
    """Return lists of runs that differ in their seed alone."""
    found: dict[tuple[Norm, str, int, float], list[Fit]] = {}
    for row in rows:
        found.setdefault((norms_of([row])[0], row.where, row.batch_size, row.lr), []).append(row)
    return list(found.values())


def rate_of(row: Fit) -> str:
    factor = row.lr / scaled_lr(row.batch_size)
    return f"{row.lr:g}" + (f" (x {factor:g})" if factor > 1 else "")


def named(row: Fit) -> str:
    return row.label + {"all": "", "first": ", the first norm", "middle": ", middle norms"}[row.where]


def averages_table(rows: list[Fit]) -> Iterator[str]:
    """Yield a table of test accuracies by each kind of statistics in evaluation."""
    rows = [row for row in rows if row.recomputed_accuracies]
    if not rows:
        return
    names = {
        "own": lambda row: row.test_accuracies,
        "covariance": lambda row: row.covariance_accuracies,
        "computed again": lambda row: row.recomputed_accuracies,
    }
    yield ""
    yield (
        "Test accuracy by the statistics in evaluation: after the last epoch, as the mean over all epochs, and the "
        "largest loss from one epoch to the next. IterNorm's own average is that of whiteners, DBN's of covariances."
    )
    yield ""
    kinds = ("last epoch", "mean over epochs", "largest loss")
    yield from heads("", "batch", "learning rate", *(f"{name}: {kind}" for kind in kinds for name in names))
    for mine in cases(rows):
        cells = []
        for measure in (lambda a: a[-1], np.mean, lambda a: max(0, -np.diff(a).min()) if len(a) > 1 else 0):
            for get in names.values():
                found = [100 * measure(np.array(get(row))) for row in mine if get(row)]
                cells.append(spread(found, ".1f") if found else "")
        yield line(named(mine[0]), mine[0].batch_size, rate_of(mine[0]), *cells)


def steps_table(rows: list[Steps]) -> Iterator[str]:
    has_memory = any(row.peak_bytes is not None for row in rows)
    yield f"Time of a step on {rows[0].about}" + (", and the peak of the device's memory." if has_memory else ".")
    yield ""
    extra = ("peak MiB",) if has_memory else ()
    yield from heads("network", "", "norms replaced", "batch", "ms", "between the quartiles", *extra)
    for row in rows:
        memory = [mebibytes(row.peak_bytes)] if has_memory else []
        yield line(
            row.network, row.label, row.where, row.batch_size, f"{row.median_ms:.3g}", f"{row.iqr_ms:.2g}", *memory
        )


def mebibytes(number: int | None) -> str:
    return "" if number is None else f"{number / MIB:.0f}"


def spread(values: list[float], form: str) -> str:
    return f"{np.mean(values):{form}}" + (f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else "")
