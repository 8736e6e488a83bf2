"""Measures how the time of IterNorm's training step grows with M, d and T: `python benchmarks/growth.py`.

There is one group of C = d channels. The products over the data (covariance and map forward; K, A' dY and B X backward)
take 10 d² M operations. So the time is linear in M and, once these products outweigh the elementwise work (d M),
quadratic in d. A step of Newton's iteration is a fixed number of products of d x d matrices, forward and backward, so
the time is a + b T. (For a fixed number of channels cut into groups of d, the products over the data are linear in d,
and the iterations of all groups are quadratic.)
"""

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import click
import machine
import numpy as np
from alternating import Failures, host_timer, in_turns
from competitors import BACKENDS, framework
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from problems import ITER_NORM, Problem
from records import SUBJECT
from rich.console import Console
from rich.progress import track

SIDE = 32  # height and width of an image: M = N * SIDE**2
NUMBERS = {
    "M": [1, 4, 16, 64, 256, 1024],  # numbers of images, which together have 1e3 to 1e6 positions
    "d": [8, 16, 32, 64, 128, 256],
    "T": [1, 2, 4, 7, 10, 15, 20],
}
TINY = {"M": [1, 2, 4, 8], "d": [4, 8, 16, 32], "T": [1, 2, 4, 8]}  # for a quick trial of the script
IMAGES = {"d": 16, "T": 4}  # while d varies, enough that products outweigh the iteration; while T varies, fewer
D = 64


class Point(NamedTuple):
    """The time for one setting of M, d and T, in a sweep that varies one of them."""

    sweep: str
    value: int
    m: int
    d: int
    t: int
    median_ms: float = float("nan")


def points(numbers: dict[str, list[int]], images: dict[str, int]) -> list[Point]:
    pixels = SIDE**2
    return [
        *(Point("M", n * pixels, n * pixels, D, 5) for n in numbers["M"]),
        *(Point("d", d, images["d"] * pixels, d, 5) for d in numbers["d"]),
        *(Point("T", t, images["T"] * pixels, D, t) for t in numbers["T"]),
    ]


def exponent(x: np.ndarray, y: np.ndarray) -> float:
    """Return p of y = c x^p, fitted by least squares to the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Return a, b and R² of y = a + b x, fitted by least squares."""
    b, a = np.polyfit(x, y, 1)
    return float(a), float(b), float(1 - np.var(y - a - b * x) / np.var(y))


def fitted(sweep: str, x: np.ndarray, y: np.ndarray) -> str:
    """Return the fit of a sweep in words."""
    if sweep == "T":
        a, b, r2 = line(x, y)
        return f"T: {a:.3g} + {b:.3g} T ms, R² = {r2:.4f} (expected: linear)"
    upper = len(x) // 2
    expected = {"M": "1", "d": "up to 2, where products dominate"}[sweep]
    overall, half = exponent(x, y), exponent(x[upper:], y[upper:])
    return f"{sweep}: exponent {overall:.2f}, in the upper half {half:.2f} (expected: {expected})"


def draw(axes: Axes, sweep: str, x: np.ndarray, y: np.ndarray) -> None:
    axes.plot(x, y, "o", color="#d55e00", label="measured")
    if sweep == "T":
        a, b, _ = line(x, y)
        axes.plot(x, a + b * x, color="#0072b2", label="a + b T")
    else:
        power = {"M": 1, "d": 2}[sweep]
        axes.plot(x, y[-1] * (x / x[-1]) ** power, color="#0072b2", label=f"slope {power}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=sweep, ylabel="milliseconds")
    axes.set_title(fitted(sweep, x, y).partition(" (")[0], fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()


def measured(backend: str, points_without_times: list[Point], seconds: float, console: Console) -> list[Point]:
    """Measure the points in turns, and return them with their median times."""
    competitors = framework(backend, "cpu")
    mode = competitors.MODES[-1]
    failures = Failures()
    timers: dict[str, Callable[[], float]] = {}
    for point in track(points_without_times, "preparing", console=console):
        problem = Problem(ITER_NORM, point.d, (point.m // SIDE**2, point.d, SIDE, SIDE), "NCHW", point.t)
        step = competitors.training(problem, mode)[SUBJECT]
        timers[f"{point.sweep} = {point.value}"] = host_timer(partial(competitors.run, step))
    with console.status("measuring"):
        taken = in_turns(timers, seconds, failures)
    if failures:
        raise click.ClickException("; ".join(f"{name}: {reason}" for name, reason in failures.items()))
    return [p._replace(median_ms=round(median(taken[f"{p.sweep} = {p.value}"]), 6)) for p in points_without_times]


@click.command()
@click.option("--backend", type=click.Choice([*BACKENDS]), default="torch", show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0), default=60.0, show_default=True, help="Time to measure for.")
@click.option("--tiny", is_flag=True, help="Measure few, small points, to try the script.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for growth-BACKEND.csv and .png.  [default: results, beside this script]",
)
def main(backend: str, seconds: float, tiny: bool, out: Path | None) -> None:
    """Fit how the time grows with the samples, the channels and the iterations."""
    if tiny and out is None:
        raise click.UsageError("--tiny is a trial and would replace the real results: give another folder with --out")
    folder = out or Path(__file__).with_name("results")
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    wanted = points(TINY, {"d": 1, "T": 1}) if tiny else points(NUMBERS, IMAGES)
    try:
        found = measured(backend, wanted, seconds, console)
    except ImportError as error:
        raise click.UsageError(f"--backend {backend}: {error}") from error
    about = f"{machine.description()}; {framework(backend, 'cpu').versions()}"
    path = folder / f"growth-{backend}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["about", *Point._fields])
        writer.writerows([about, *point] for point in found)
    figure = Figure(figsize=(13, 4), layout="constrained")
    figure.suptitle(f"IterNorm's training step, one group; {about}", fontsize=10)
    for axes, sweep in zip(figure.subplots(1, 3), NUMBERS, strict=True):
        swept = [point for point in found if point.sweep == sweep]
        x, y = np.array([p.value for p in swept], float), np.array([p.median_ms for p in swept])
        draw(axes, sweep, x, y)
        console.print(fitted(sweep, x, y), markup=False, highlight=False)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    console.print(f"{path}, {path.with_suffix('.png').name}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
