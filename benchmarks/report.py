"""Draws figures of what speed.py measured, and writes the table in the README: `python benchmarks/report.py`."""

from itertools import product
from pathlib import Path

import click
from bars import AVX2, Verdict, verdicts
from marked import inserted
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from problems import GROUP_WHITEN
from records import SUBJECT, Record, read

HERE = Path(__file__).parent
MARK = "speed"
NAMES = {"iter_norm": "IterNorm", "group_whiten": "group whitening", "input": "the input's bytes, kept for backward"}
DEVICES = {AVX2: "AVX2"}
FRAMEWORKS = {"torch": "PyTorch", "tensorflow": "TensorFlow", "jax": "JAX", "numpy": "NumPy"}
SHOWN_GROUPS = 32  # the number of groups in the figures; one is enough
# The marker and colour of each competitor, the same in all figures. Colour-blind readers can tell the colours apart.
LOOKS = {
    SUBJECT: ("o", "#d55e00"),
    "textbook": ("s", "#0072b2"),
    "dbn (eigh)": ("D", "#cc79a7"),
    "3x3 convolution": ("^", "#009e73"),
    "batch norm": ("v", "#56b4e9"),
    "group norm": ("v", "#56b4e9"),
    "floor": ("|", "black"),
}


def figure(records: list[Record]) -> Figure:
    """Draw the milliseconds of a training step by shape, in a panel for each kind of whitening and mode."""
    kept = [r for r in records if r.measure == "training" and r.median_ms is not None]
    kept = [r for r in kept if r.what != GROUP_WHITEN or r.group == SHOWN_GROUPS]
    modes, kinds = (list(dict.fromkeys(values)) for values in ((r.mode for r in kept), (r.what for r in kept)))
    height = 1.2 + 0.22 * len({(r.shape, r.layout) for r in kept})
    found = Figure(figsize=(7 * len(kinds), 1.6 + height * len(modes)), layout="constrained")
    grid = found.subplots(len(modes), len(kinds), squeeze=False)
    for (mode, what), axes in zip(product(modes, kinds), grid.flat, strict=True):
        panel(axes, [r for r in kept if (r.mode, r.what) == (mode, what)])
        size = f", {SHOWN_GROUPS} groups" if what == GROUP_WHITEN else ""
        axes.set_title(f"{NAMES[what]}{size}, {mode}")
    entries = {name: entry for axes in grid.flat for entry, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    found.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=len(entries))
    first = kept[0]
    found.suptitle(f"{FRAMEWORKS[first.backend]}: forward and backward, float32\n{first.machine}; {first.versions}")
    return found


def panel(axes: Axes, records: list[Record]) -> None:
    cases = sorted({(r.elements, r.sizes, r.layout, r.group) for r in records}, reverse=True)
    positions = {case: position for position, case in enumerate(cases)}
    for name, (marker, colour) in LOOKS.items():
        shown = [r for r in records if r.competitor == name]
        if shown:
            heights = [positions[r.elements, r.sizes, r.layout, r.group] for r in shown]
            front = name == SUBJECT
            axes.scatter(
                [r.median_ms for r in shown], heights, marker=marker, color=colour, label=name, zorder=3 if front else 2
            )
    is_iter_norm = records[0].what != GROUP_WHITEN
    labels = [
        f"{'x'.join(map(str, sizes))} {layout}" + (f" d={group}" if is_iter_norm and group != 64 else "")
        for _, sizes, layout, group in cases
    ]
    axes.set_yticks(range(len(cases)), labels, fontsize=8)
    axes.set_ylim(-0.7, len(cases) - 0.3)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("milliseconds")
    axes.grid(alpha=0.3)


def table(records: list[Record]) -> str:
    """Return the bars and what was measured as Markdown."""
    by_run = {(r.backend, r.device): (r.machine, r.versions) for r in records}
    machines: dict[str, list[str]] = {}
    for (backend, _), (machine, _) in by_run.items():
        machines.setdefault(machine, []).append(FRAMEWORKS[backend])
    where = "; ".join(
        machine if len(machines) == 1 else f"{machine} ({', '.join(frameworks)})"
        for machine, frameworks in machines.items()
    )
    versions = list(dict.fromkeys(part for _, of_run in by_run.values() for part in of_run.split(", ")))
    found = verdicts(records)
    devices = sorted({verdict.device for verdict in found}, key=lambda device: (device != "cpu", device))
    columns = [name for device in devices for name in (f"bar{on(device)}", f"measured{on(device)}")]
    lines = [
        "Time of polywhiten divided by that of a competitor in the same run, in float32. Training is forward and "
        "backward. The bar is the largest ratio that the project accepts.",
        "",
        f"| | competitor | statistic over shapes | {' | '.join(columns)} |",
        f"| --- | --- | --- |{' --- |' * len(columns)}",
    ]
    by_row: dict[tuple[str, ...], dict[str, Verdict]] = {}
    for verdict in found:
        by_row.setdefault(row_name(verdict), {})[verdict.device] = verdict
    for name, by_device in by_row.items():
        lines.append(f"| {' | '.join(name)} | {' | '.join(cells(by_device.get(device)) for device in devices)} |")
    return "\n".join([*lines, "", f"On {where}, with {', '.join(versions)}."])


def on(device: str) -> str:
    """Return what the names of a device's columns have in addition."""
    return "" if device == "cpu" else f", {DEVICES.get(device, device)}"


def row_name(verdict: Verdict) -> tuple[str, str, str]:
    """Return the first cells of a verdict's row, which are the same for all devices."""
    bar = verdict.bar
    low, high = bar.channels
    competitor = NAMES.get(bar.competitor, bar.competitor)
    if low > 1:
        competitor += f", {low:g} channels and more"
    elif high < float("inf"):
        competitor += f", below {high:g} channels"
    mode = "" if verdict.mode == "eager" else f" ({verdict.mode})"
    return f"{FRAMEWORKS[bar.backend]}{mode}: {NAMES[bar.what]}, {bar.measure}", competitor, bar.statistic


def cells(verdict: Verdict | None) -> str:
    """Return the bar and what was measured; empty cells for what wasn't measured on a device."""
    if verdict is None:
        return " | "
    goal = f" (goal {verdict.bar.goal:g})" if verdict.bar.goal else ""
    return f"{verdict.limit:.3g}{goal} | {verdict.value:.3g}{'' if verdict.met else ', missed'}"


@click.command()
@click.option(
    "--results",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=HERE / "results",
    help="Folder of speed-*.csv, where the figures are written too.  [default: results, beside this script]",
)
@click.option(
    "--readme",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=HERE.parent / "README.md",
    help="File that the table is written into.  [default: the project's README.md]",
)
def main(results: Path, readme: Path) -> None:
    """Draw speed-BACKEND-DEVICE.png, and write the table of the bars between two comments of the README."""
    paths = sorted(results.glob("speed-*.csv"))
    if not paths:
        raise click.ClickException(f"no speed-*.csv in {results}: run benchmarks/speed.py first")
    try:
        records = {path: read(path) for path in paths}
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    try:
        block = table([r for found in records.values() for r in found])
        text = inserted(readme.read_text(encoding="utf-8"), MARK, block)
    except ValueError as error:
        raise click.ClickException(f"{readme}: {error}") from error
    readme.write_text(text, encoding="utf-8")
    click.echo(readme)
    for path, found in records.items():
        if any(r.measure == "training" and r.median_ms is not None for r in found):
            image = path.with_suffix(".png")
            figure(found).savefig(image, dpi=110)
            click.echo(image)


if __name__ == "__main__":
    main()
