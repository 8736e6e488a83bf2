"""Draws a figure for each experiment."""

from collections.abc import Callable, Iterable, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from polywhiten.analysis import max_num_groups
from study import groups, training
from study.conditioning import FISHER_FRACTION, FRACTION, Conditioning
from study.disturbance import ACTIVATIONS, DATA_LABELS, GAUSSIAN, PICTURES, Disturbance
from study.findings import accuracy, runs, train_accuracy, train_loss
from study.fitting import Fit, scaled_lr
from study.norms import Norm, bn, dbn, gn, gw, iter_norm
from study.steps import Steps

# Okabe and Ito's colours, as in the demo's curves
COLOURS = {"bn": "#0072B2", "gn": "#E69F00", "iternorm": "#D55E00", "gw": "#009E73", "dbn": "#CC79A7"}
MARKERS = {"bn": "o", "gn": "s", "iternorm": "^", "gw": "D", "dbn": "v"}
SHADES = ("-", "--", ":", "-.")
GROUP_SHADES, T_MARKERS = {16: 1, 64: 2}, {3: "x", 7: "s"}  # of a trained network's layers
NORM_FIELDS = tuple(vars(bn()))
PANELS = {"train_losses": "training loss", "test_accuracies": "test accuracy, %"}


def figure(title: str, columns: int, lines: int = 1) -> tuple[Figure, Any]:
    found = Figure(figsize=(4.6 * columns, 0.6 + 3.6 * lines), layout="constrained")
    found.suptitle(fill(title, 45 * columns))
    return found, found.subplots(lines, columns, squeeze=False)


def finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    if x in ("epoch", "T"):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)


def look(norm: Norm, number: int = 0) -> dict[str, Any]:
    return {"color": COLOURS[norm.norm], "marker": MARKERS[norm.norm], "markersize": 4, "linestyle": SHADES[number % 4]}


def with_spread(axes: Axes, x: Iterable[float], values: list[np.ndarray], **style: Any) -> None:
    """Draw the mean and the range over the seeds, each an array, up to the length of the shortest."""
    if not values:
        return
    shortest = min(map(len, values))
    x, stacked = np.array([*x])[:shortest], np.stack([value[:shortest] for value in values])
    axes.plot(x, stacked.mean(0), **style)
    axes.fill_between(x, stacked.min(0), stacked.max(0), color=style["color"], alpha=0.15, linewidth=0)


def of_disturbance(rows: list[Disturbance], size: str) -> Figure:
    """Draw the disturbance of rows of features, or of a trained network's activations if there are any."""
    layers = sorted({row.layer for row in rows if row.layer is not None})
    if layers:
        return of_layers(rows, layers)
    found, grid = figure("Stochastic normalization disturbance", 2, 2)
    rows = [row for row in rows if row.group_size != 0]
    dimension = max(row.dimension for row in rows)
    sizes = sorted({row.batch_size for row in rows})
    for (by_batch, by_group), data in zip(grid, (GAUSSIAN, PICTURES), strict=True):
        mine = [row for row in rows if row.data == data and row.dimension == dimension]
        shown = [bn(), *(kind(d) for kind in (iter_norm, dbn) for d in sorted({16, 64, dimension}))]
        for number, norm in enumerate(shown):
            snd_line(
                by_batch, [r for r in mine if same(r, norm)], "batch_size", norm.label, look(norm, (number + 2) % 3)
            )
        for number, batch in enumerate(sizes[len(sizes) // 3 :: max(1, len(sizes) // 3)]):
            for kind in ("iternorm", "dbn"):
                line = [r for r in mine if r.norm == kind and r.batch_size == batch]
                name = f"{'DBN' if kind == 'dbn' else 'IterNorm'}, batch {batch}"
                snd_line(by_group, line, "group_size", name, look(line[0], number) if line else {})
        finish(by_batch, f"{DATA_LABELS[data]}, {dimension} features", "batch size", "SND")
        finish(by_group, f"{DATA_LABELS[data]}, {dimension} features", "group size", "SND")
    return found


def of_layers(rows: list[Disturbance], layers: list[int]) -> Figure:
    found, grid = figure("Stochastic normalization disturbance of a trained network's layers", 2, len(layers))
    for line, layer in zip(grid, layers, strict=True):
        for axes, data in zip(line, (ACTIVATIONS, GAUSSIAN), strict=True):
            mine = [row for row in rows if row.layer == layer and row.data == data]
            for norm in norms_of(mine):
                style = look(norm, GROUP_SHADES.get(norm.group_size, 0))
                if norm.iterations in T_MARKERS:
                    style |= {"marker": T_MARKERS[norm.iterations], "markersize": 7}
                snd_line(axes, [r for r in mine if same(r, norm)], "batch_size", norm.label, style)
            finish(axes, f"norm {layer}, {DATA_LABELS[data]}", "batch size", "SND")
    return found


def snd_line(axes: Axes, rows: list[Disturbance], x: str, label: str, style: dict[str, Any]) -> None:
    """Draw the mean over the seeds, with the standard error over the samples."""
    numbers = sorted({getattr(row, x) for row in rows})
    points = [[(row.value, row.standard_error) for row in rows if getattr(row, x) == number] for number in numbers]
    if points:
        means = np.array([np.mean(point, 0) for point in points])
        axes.errorbar(numbers, means[:, 0], means[:, 1], label=label, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")


def same(row: Any, norm: Norm) -> bool:
    return all(getattr(row, name) == getattr(norm, name) for name in NORM_FIELDS)


def norms_of(rows: Iterable[Any]) -> list[Norm]:
    return list(dict.fromkeys(Norm(**{name: getattr(row, name) for name in NORM_FIELDS}) for row in rows))


def of_conditioning(rows: list[Conditioning], size: str) -> Figure:
    found, grid = figure("A small perceptron on digits: condition numbers through training", 4)
    panels = {
        "outputs_partial": f"normalized outputs, {FRACTION:.0%} of the spectrum",
        "inputs_partial": f"layer inputs, {FRACTION:.0%} of the spectrum",
        "gauss_newton_partial": f"Gauss-Newton matrix, {FISHER_FRACTION:.0%} of the spectrum",
        "losses": "training loss",
    }
    for axes, (name, title) in zip(grid[0], panels.items(), strict=True):
        for norm in norms_of(rows):
            mine = [row for row in rows if same(row, norm)]
            values = [np.log10(getattr(row, name)) for row in mine]
            logged = [value for value in values if np.isfinite(value).all()]
            if logged:
                x = mine[0].measured_at
                style = look(norm)
                axes.plot(x, 10 ** np.mean(logged, 0), label=norm.label, **style)
                axes.fill_between(x, 10 ** np.min(logged, 0), 10 ** np.max(logged, 0), color=style["color"], alpha=0.15)
        axes.set_xscale("symlog", linthresh=10)
        axes.set_yscale("log")
        finish(axes, title, "step", "loss" if name == "losses" else "condition number")
    return found


def curves(
    axes: Axes, rows: Sequence[Fit], shown: list[Norm], name: str, suffix: str = "", shade: int = 0, **settings: Any
) -> None:
    """Draw the values of every epoch, in a line for each norm."""
    for number, norm in enumerate(shown):
        mine = list(runs(rows, norm, **settings).values())
        label = norm.label + suffix + (", diverged" if any(run.diverged for run in mine) else "")
        values = [np.array(getattr(run, name)) * (1 if name == "train_losses" else 100) for run in mine]
        epochs = range(1, 1 + max((len(value) for value in values), default=0))
        alike = sum(other.norm == norm.norm for other in shown[:number])
        with_spread(axes, epochs, values, label=label, **look(norm, alike + shade))


def ends(
    axes: Axes, points: dict[float, dict[int, Fit]], value: Callable[[Fit], float], norm: Norm, label: str
) -> None:
    """Draw the values after the last epoch against a setting: every seed as a dot, and the mean as a line."""
    points = {x: found for x, found in points.items() if found}
    if points:
        axes.plot(
            [*points], [np.mean([*map(value, found.values())]) for found in points.values()], label=label, **look(norm)
        )
        for x, found in points.items():
            axes.plot([x] * len(found), [*map(value, found.values())], ".", color=COLOURS[norm.norm], alpha=0.4)


def of_training(rows: list[Fit], size: str) -> Figure:
    compares_averages = any(row.recomputed_accuracies for row in rows)
    title = f"VGG-style network on {rows[0].pictures} images of CIFAR-10: mean, and range over seeds"
    plan = training.SIZES[size]
    batch_size = plan.batch_size
    usual = {"batch_size": batch_size, "lr": scaled_lr(batch_size)}
    found, grid = figure(title, 3 + bool(plan.batch_sizes), 2 + compares_averages)
    for line, (name, value, y) in enumerate(
        [("train_losses", train_loss, "training loss"), ("test_accuracies", accuracy, "test accuracy, %")]
    ):
        curve, iterations, sizes, *others = grid[line]
        curves(curve, rows, [*plan.compared, dbn(0), iter_norm(0)], name, **usual)
        finish(curve, f"batch size {batch_size}", "epoch", y)
        tried = sorted({row.iterations for row in rows if row.iterations})
        points = {t: runs(rows, iter_norm(iterations=t), **usual) for t in tried}
        ends(iterations, points, value, iter_norm(), "IterNorm, groups of 64")
        finish(iterations, "Newton's iterations", "T", y)
        largest = (4 if rows[0].depth == 4 else 8) * rows[0].width  # channels
        for kind, label in ((iter_norm, "IterNorm, T = 5"), (dbn, "DBN")):
            points = {d or largest: runs(rows, kind(d), **usual) for d in (8, 16, 64, 0)}
            ends(sizes, points, value, kind(), label)
        sizes.set_xscale("log", base=2)
        finish(sizes, "group size (the last: all channels)", "channels", y)
        for batches in others:
            by_batch_size(batches, rows, plan, value)
            finish(batches, "batch size", "images", y)
    if compares_averages:
        averages(grid[2], rows, plan.compared, usual)
    return found


def by_batch_size(axes: Axes, rows: list[Fit], plan: training.Size, value: Callable[[Any], float]) -> None:
    """Draw what runs with other batch sizes ended with, and beside them those with a high learning rate."""
    for norm in plan.compared:
        points = {
            m: runs(rows, norm, batch_size=m, lr=scaled_lr(m)) for m in sorted({plan.batch_size, *plan.batch_sizes})
        }
        ends(axes, points, value, norm, norm.label)
    for norm in plan.others if plan.high_lr else ():
        fast = runs(rows, norm, batch_size=plan.batch_size, lr=scaled_lr(plan.batch_size, training.HIGH_LR))
        values, label = [value(run) for run in fast.values()], f"{norm.label}, lr x {training.HIGH_LR}"
        axes.plot([plan.batch_size] * len(values), values, "x", color=COLOURS[norm.norm], label=label)
    axes.set_xscale("log", base=2)


def averages(line: Sequence[Axes], rows: list[Fit], shown: Sequence[Norm], usual: dict[str, Any]) -> None:
    """Draw the test accuracy after every epoch by each kind of average, in a panel for each norm."""
    names = {
        "test_accuracies": ("the layer's own average", "#D55E00"),
        "covariance_accuracies": ("average covariance", "#0072B2"),
        "recomputed_accuracies": ("computed again", "#009E73"),
    }
    with_averages = [norm for norm in shown if any(r.recomputed_accuracies for r in runs(rows, norm, **usual).values())]
    for axes, norm in zip(line, with_averages, strict=False):
        for name, (label, colour) in names.items():
            mine = [100 * np.array(getattr(run, name)) for run in runs(rows, norm, **usual).values()]
            values = [value for value in mine if len(value)]
            epochs = range(1, 1 + max((len(value) for value in values), default=0))
            with_spread(axes, epochs, values, label=label, color=colour, marker="o", markersize=3)
        finish(axes, f"{norm.label}, learning rate {usual['lr']:g}", "epoch", "test accuracy, %")
    for axes in line[len(with_averages) :]:
        axes.set_axis_off()


def of_evaluation(rows: list[Fit], size: str) -> Figure:
    rates, norms = sorted({row.lr for row in rows}), norms_of(rows)
    found, grid = figure(
        "Test accuracy by the statistics in evaluation: mean, and range over seeds", len(norms), len(rates)
    )
    for line, lr in zip(grid, rates, strict=True):
        averages(line, rows, norms, {"batch_size": rows[0].batch_size, "lr": lr})
    return found


def of_groups(rows: list[Fit], size: str) -> Figure:
    plan, name = groups.SIZES[size], "Perceptron" if rows[0].network == "mlp" else "VGG-style network"
    title = f"{name} of width {rows[0].width} on {rows[0].pictures} images of CIFAR-10"
    found, grid = figure(title, 1 + bool(plan.groups), 2)
    for (by_batch, *others), (value, y) in zip(
        grid, [(train_accuracy, "training accuracy"), (accuracy, "test accuracy")], strict=True
    ):
        for norm in (bn(), gn(plan.num_groups), gw(plan.num_groups)):
            points = {m: runs(rows, norm, batch_size=m) for m in plan.batch_sizes}
            ends(by_batch, points, value, norm, norm.label)
        by_batch.set_xscale("log", base=2)
        finish(by_batch, "batch size", "images", f"{y}, %")
        for by_groups in others:
            for kind, label, bound in ((gn, "GN", "group_norm"), (gw, "GW", "group_whitening")):
                points = {g: runs(rows, kind(g), batch_size=groups.BATCH_SIZE) for g in plan.groups}
                ends(by_groups, points, value, kind(1), label)
                most, colour = max_num_groups(bound, rows[0].width), COLOURS[kind(1).norm]
                by_groups.axvline(most, color=colour, linestyle=":", label=f"{label}: feasible up to {most}")
            by_groups.set_xscale("log", base=2)
            finish(by_groups, f"groups, batch size {groups.BATCH_SIZE}", "groups", f"{y}, %")
    return found


def of_resnet(rows: list[Fit], size: str) -> Figure:
    found, grid = figure(f"Residual network on {rows[0].pictures} images of CIFAR-10: mean, and range over seeds", 2)
    for axes, (name, y) in zip(grid[0], PANELS.items(), strict=True):
        for number, where in enumerate(dict.fromkeys(row.where for row in rows)):
            mine = [row for row in rows if row.where == where]
            curves(axes, mine, norms_of(mine), name, suffix="" if where == "all" else f", {where}", shade=number)
        finish(axes, y, "epoch", y)
    return found


def of_steps(rows: list[Steps], size: str) -> Figure:
    """Draw the time of a step of each network, and its peak of memory where that was measured."""
    names = [f"{row.network}, {row.label}, {row.where}, batch {row.batch_size}" for row in rows]
    measures = {"milliseconds": [row.median_ms for row in rows]}
    if any(row.peak_bytes is not None for row in rows):
        measures["peak memory, MiB"] = [(row.peak_bytes or 0) / 2**20 for row in rows]
    found, grid = figure(f"A training step: {rows[0].about}", len(measures))
    for axes, (x, values) in zip(grid[0], measures.items(), strict=False):
        axes.barh(names, values, color=[COLOURS[row.norm] for row in rows])
        axes.invert_yaxis()
        axes.tick_params(labelsize=6)
        finish(axes, "", x, "")
    return found


FIGURES: dict[str, Callable[[list[Any], str], Figure]] = {
    "disturbance": of_disturbance,
    "conditioning": of_conditioning,
    "training": of_training,
    "evaluation": of_evaluation,
    "groups": of_groups,
    "resnet": of_resnet,
    "steps": of_steps,
}
