"""Draws the pictures, from kept measurements or from formulas, and shows each in the colours of the reader's theme.

A page names a picture and describes it::

    ```{picture} whitening
    Two correlated channels before and after normalization.
    ```
"""

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import ClassVar

import gpu_report
import matplotlib as mpl
import numpy as np
import report
from docutils import nodes
from docutils.parsers.rst import Directive
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

import polywhiten as pw

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent.parent / "benchmarks"
PICTURES = HERE.parent / "generated" / "pictures"
THEMES = {"light": ("#1a1a1a", "#ffffff"), "dark": ("#d8d8d8", "#131416")}  # foreground, and Furo's background
ORANGE, BLUE, GREEN = "#d55e00", "#0072b2", "#009e73"  # colour-blind readers can tell them apart


def whitening() -> Figure:
    """Draw two correlated channels, and what batch normalization and whitening make of them."""
    x = np.random.default_rng(0).normal(size=(600, 2)) @ np.array([[1.6, 0.9], [0.0, 0.45]]) + [1.5, 0.8]
    panels = {
        "two channels": x,
        "batch normalization": (x - x.mean(0)) / x.std(0),
        "whitening": pw.iter_norm(x, method="eigh"),
    }
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, 3, sharex=True, sharey=True), panels.items(), strict=True):
        correlation = np.corrcoef(values.T)[0, 1]
        axes.scatter(*values.T, s=6, color=ORANGE, alpha=0.5, linewidths=0)
        axes.set_title(f"{title}\ncorrelation {abs(correlation):.2f}", fontsize=11)
        axes.set_aspect("equal")
        axes.axhline(0, lw=0.5, color="gray")
        axes.axvline(0, lw=0.5, color="gray")
        axes.set_xlim(-5, 5)
        axes.set_ylim(-4, 4)
    return figure


def newton() -> Figure:
    """Draw the variance that T of Newton's steps give a direction, by its share of the trace of the covariance."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    shares = np.logspace(-6, 0, 300)
    for steps, colour in zip((1, 3, 5, 7, 9), mpl.colormaps["viridis"](np.linspace(0.15, 0.9, 5)), strict=True):
        variance = shares
        for _ in range(steps):
            variance = variance * (3 - variance) ** 2 / 4
        axes.loglog(shares, variance, color=colour, label=f"T = {steps}")
    axes.set_xlabel("eigenvalue of the covariance, divided by its trace")
    axes.set_ylabel("variance of the output")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def training() -> Figure:
    """Draw the loss and the accuracy of the study's convolutional network by epoch, a line for each norm."""
    with (BENCHMARKS / "study" / "results" / "training-small.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["batch_size"], row["lr"]) == ("64", "0.05")]
    norms = {
        "batch normalization": (("bn", "", ""), BLUE),
        "exact whitening (DBN), groups of 16": (("dbn", "16", ""), GREEN),
        "IterNorm, groups of 64, T = 5": (("iternorm", "64", "5"), ORANGE),
    }
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = {"training loss": "train_losses", "test accuracy": "test_accuracies"}
    for axes, (title, column) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name, (norm, colour) in norms.items():
            runs = [r[column].split() for r in rows if (r["norm"], r["group_size"], r["iterations"]) == norm]
            values = [mean(map(float, epoch)) for epoch in zip(*runs, strict=True)]
            axes.plot(range(1, len(values) + 1), values, marker="o", ms=3, color=colour, label=name)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def speed(name: str) -> Figure:
    return narrowed(report.figure(report.read(BENCHMARKS / "results" / f"speed-{name}.csv")), 9.5)


def gpu() -> Figure:
    return narrowed(gpu_report.figure(gpu_report.read(BENCHMARKS / "results" / "gpu-nvidia-h200.csv")), 10.5)


def narrowed(figure: Figure, width: float) -> Figure:
    """Return a wide figure with a smaller width in inches, so that its letters can be read in the column of a page."""
    figure.set_size_inches(width, figure.get_figheight())
    return figure


DRAWN: dict[str, Callable[[], Figure]] = {
    "whitening": whitening,
    "newton": newton,
    "training": training,
    "gpu": gpu,
    **{f"speed-{name}": partial(speed, f"{name}-cpu") for name in ("torch", "tensorflow", "jax", "numpy")},
    "speed-torch-avx2": partial(speed, "torch-cpu-avx2"),
}


def draw_all(app: Sphinx) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWN.items():
        for theme in THEMES:
            save(draw, theme, PICTURES / f"{name}-{theme}.svg")


def save(draw: Callable[[], Figure], theme: str, path: Path) -> None:
    """Draw a picture in a theme's colours. The same data give the same file."""
    front, back = THEMES[theme]
    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor")
    colours = dict.fromkeys(keys, front) | dict.fromkeys(("figure.facecolor", "axes.facecolor"), back)
    colours |= {"legend.facecolor": back, "svg.hashsalt": path.stem}
    with mpl.rc_context(colours):
        figure = draw()
        for marks in figure.findobj(mpl.collections.PathCollection):
            if len(marks.get_facecolor()) and tuple(marks.get_facecolor()[0][:3]) == to_rgb("black"):
                marks.set_color(front)
        figure.savefig(path, metadata={"Date": None})


class Picture(Directive):
    """Shows a picture of `DRAWN`; its content is the text for readers who don't see it."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar = {}

    def run(self) -> list[nodes.Node]:
        (name,) = self.arguments
        if name not in DRAWN:
            raise self.error(f"there is no picture {name!r}: DRAWN in extensions/pictures.py has {', '.join(DRAWN)}")
        if not self.content:
            raise self.error(f"describe the picture {name!r} for readers who don't see it")
        return [
            nodes.image(
                uri=f"/{PICTURES.relative_to(HERE.parent).as_posix()}/{name}-{theme}.svg",
                alt=" ".join(self.content),
                classes=[f"only-{theme}", "picture"],
            )
            for theme in THEMES
        ]


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_directive("picture", Picture)
    app.connect("builder-inited", draw_all)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
