"""Draws what gpu_speed.py measured, and writes the table of the README: `python benchmarks/gpu_report.py`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean

import click
from gpu_cases import COMBINATIONS, SUBJECTS, Row
from gpu_summary import DEVICE_BARS, RATIOS, Bar
from marked import inserted
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from records import SUBJECT

HERE = Path(__file__).parent
MARK = "gpu"
LAYERS = {"IterNorm": "IterNorm, groups of 64", "GroupWhitening": "group whitening, 32 groups"}
MODE = "graph"  # which has the device's time alone
NUMBERS = ("median_ms", "floor_ms", "ratio", "ratio_joined")
SEPARATE, JOINED = SUBJECTS.values()
# The marker and colour of each competitor. Colour-blind readers can tell the colours apart.
LOOKS = {
    SUBJECT: ("o", "#d55e00"),
    SEPARATE: ("o", "#d55e00"),
    JOINED: ("P", "#e69f00"),
    "textbook": ("s", "#0072b2"),
    "BatchNorm2d": ("v", "#56b4e9"),
    "GroupNorm": ("v", "#56b4e9"),
}


def read(path: Path) -> list[Row]:
    """Return the rows of a file, with numbers as numbers, and without empty cells."""
    with path.open(encoding="utf-8", newline="") as file:
        rows: list[Row] = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    for row in rows:
        row |= {name: float(row[name]) for name in NUMBERS if name in row}
    return rows


def figure(rows: Sequence[Row]) -> Figure:
    """Draw the milliseconds of a layer's forward and backward by shape, a panel for each dtype and memory order."""
    found = Figure(figsize=(16, 7), layout="constrained")
    grid = found.subplots(len(LAYERS), len(COMBINATIONS), sharex=True, sharey=True)
    for line, (layer, title) in zip(grid, LAYERS.items(), strict=True):
        for axes, (dtype, layout) in zip(line, COMBINATIONS, strict=True):
            panel(axes, of_layer(rows, layer, dtype, layout))
            axes.set_title(f"{title}\n{dtype}, {layout}", fontsize=10)
    entries = {name: entry for axes in grid.flat for entry, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    found.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=len(entries))
    found.suptitle(f"Forward and backward on the device\n{rows[0]['device']}; {rows[0]['versions']}")
    return found


def panel(axes: Axes, rows: Sequence[Row]) -> None:
    shapes = list(dict.fromkeys(row["shape"] for row in rows))[::-1]
    for name, (marker, colour) in LOOKS.items():
        shown = [row for row in rows if name_of(row) == name]
        if shown:
            heights = [shapes.index(row["shape"]) for row in shown]
            axes.scatter([row["median_ms"] for row in shown], heights, marker=marker, color=colour, label=name)
    floors = {row["shape"]: row["floor_ms"] for row in rows if "floor_ms" in row}
    heights = [shapes.index(shape) for shape in floors]
    axes.scatter(list(floors.values()), heights, marker="|", color="black", label="least time of memory and products")
    axes.set_yticks(range(len(shapes)), shapes, fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("milliseconds")
    axes.grid(alpha=0.3)


def of_layer(rows: Sequence[Row], layer: str, dtype: str, layout: str) -> list[Row]:
    """Return the rows of a layer that have a time, in one dtype and memory order."""
    wanted = layer, MODE, dtype, layout
    kept = [row for row in rows if (row["what"], row["mode"], row["dtype"], row.get("layout")) == wanted]
    return [row for row in kept if "median_ms" in row]


def name_of(row: Row) -> str:
    """Return the competitor, with the structure of polywhiten's kernels where the row says it."""
    return f"{row['competitor']}, {row['structure']}" if "structure" in row else row["competitor"]


def table(rows: Sequence[Row]) -> str:
    """Return the geometric means of the ratios over all shapes as Markdown."""
    names = [f"{dtype}, {layout.replace('_', ' ')}" for dtype, layout in COMBINATIONS]
    lines = [
        "On a GPU: the device's time of forward and backward, divided by that of a competitor, as a geometric mean "
        "over ResNet-50's shapes at batch 64.",
        "",
        f"| | kernels | {' | '.join(names)} | bar |",
        "| --- | --- |" + " --- |" * (len(names) + 1),
    ]
    for (what, competitor), bar in DEVICE_BARS.items():
        for structure, column in RATIOS.items():
            cells = [cell(of_layer(rows, what, *pair), competitor, column, bar) for pair in COMBINATIONS]
            if what in LAYERS and any(cells):
                lines.append(f"| {LAYERS[what]} / {competitor} | {structure} | {' | '.join(cells)} | {bar or ''} |")
    return "\n".join([*lines, "", f"On {rows[0]['device']}, with {rows[0]['versions']}."])


def cell(rows: Sequence[Row], competitor: str, column: str, bar: Bar | None) -> str:
    ratios = [row[column] for row in rows if row["competitor"] == competitor and column in row]
    if not ratios:
        return ""
    mean = geometric_mean(ratios)
    return f"{mean:.3g}" + (", missed" if bar is not None and mean > bar.limit else "")


@click.command()
@click.option(
    "--results",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=HERE / "results",
    help="Folder of gpu-*.csv, where the figures are written too.  [default: results, beside this script]",
)
@click.option(
    "--readme",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=HERE.parent / "README.md",
    help="File that the table is written into.  [default: the project's README.md]",
)
def main(results: Path, readme: Path) -> None:
    """Draw gpu-DEVICE.png, and write the ratios between two comments of the README."""
    found = {path: read(path) for path in sorted(results.glob("gpu-*.csv"))}
    if not found:
        raise click.ClickException(f"no gpu-*.csv in {results}: run benchmarks/gpu_speed.py first")
    try:
        text = inserted(readme.read_text(encoding="utf-8"), MARK, "\n\n".join(map(table, found.values())))
    except ValueError as error:
        raise click.ClickException(f"{readme}: {error}") from error
    readme.write_text(text, encoding="utf-8")
    click.echo(readme)
    for path, rows in found.items():
        image = path.with_suffix(".png")
        figure(rows).savefig(image, dpi=90)
        click.echo(image)


if __name__ == "__main__":
    main()
