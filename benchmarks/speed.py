"""Measures time and memory of polywhiten and of other layers in every framework: `python benchmarks/speed.py`.

README.md in this folder says how.
"""

import os

# Otherwise OpenBLAS threads spin for about 20 ms after each product of NumPy, during the next competitor's turn.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
import machine
import numpy as np
from alternating import Failures, first_lines, host_timer, in_turns
from bars import FLOOR, Verdict, barred, verdicts
from competitors import BACKENDS, SAME_TRAFFIC, TEXTBOOK, Framework, Step, framework
from instruction_sets import INSTRUCTION_SETS, run_again_restricted
from problems import GROUP_WHITEN, ITER_NORM, LAYOUTS, MEMORY_SHAPES, SHAPES, Problem, problems
from records import SUBJECT, Record, written
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from textbook import product_flops

from polywhiten.analysis import InfeasibleWarning

MEASURES = ("training", "evaluation", "memory")
RESULTS = Path(__file__).with_name("results")
TOLERANCE = 1e-3  # relative, between polywhiten and the textbook in float32
NUMPY_ELEMENTS = 8_000_000  # at most, of feature maps: NumPy takes seconds per step for more
PRODUCT, TINY_PRODUCT = (512, 32, 28), (16, 2, 8)  # channels, batch and size of the products that give the rate
GUARD_SHAPES = [(32, 64, 56, 56), (32, 128, 28, 28), (32, 256, 14, 14), (256, 512)]
GUARD_GROUPS = 32


@dataclass(frozen=True)
class Case:
    """A measurement to take: `blank` is its row without results, `only` names the competitors if not all are wanted."""

    framework: Framework
    problem: Problem
    mode: str
    measure: str
    blank: Record
    only: frozenset[str] | None = None

    def wants(self, name: str) -> bool:
        return self.only is None or name in self.only

    def __str__(self) -> str:
        return f"{self.blank.backend} {self.mode} {self.measure}, {self.problem}"


def cases_of(
    backend: str, device: str, isa: str | None, found: list[Problem], measures: list[str], guard: bool
) -> Iterator[Case]:
    """Yield the cases, the most useful first in case the run is stopped; for the guard, only those with a bar."""
    library = framework(backend, device)
    about = machine.description() + (f"; {library.device_name()}" if device == "cuda" else "")
    about += f", restricted to {isa.upper()}" if isa else ""
    for measure, mode, problem in product(measures, library.MODES, found):
        if measure == "evaluation" and problem.what != ITER_NORM:
            continue  # group whitening does the same in training and in evaluation
        if measure == "memory" and problem.shape not in MEMORY_SHAPES:
            continue
        shape = "x".join(map(str, problem.shape))
        layer = problem.what, problem.group, mode, measure, shape, problem.layout, "float32"
        blank = Record(about, library.versions(), backend, device_in_files(device, isa), *layer, competitor=SUBJECT)
        if not guard:
            yield Case(library, problem, mode, measure, blank)
        elif only := needed(backend, problem.what, measure):
            yield Case(library, problem, mode, measure, blank, only)


def device_in_files(device: str, isa: str | None) -> str:
    """Return the name of a device, with the instruction set that it is restricted to, in rows and names of files."""
    return f"{device}-{isa}" if isa else device


def needed(backend: str, what: str, measure: str) -> frozenset[str]:
    """Return the competitors that have a bar and those needed to compute them, or nothing if there is no bar."""
    found = barred(backend, what, measure)
    return frozenset(found | {SUBJECT} | ({SAME_TRAFFIC[what]} if FLOOR in found else set())) if found else frozenset()


def measured(case: Case, seconds: float, rate: tuple[int, int, int]) -> list[Record]:
    """Measure a case and return one row per competitor."""
    failures = Failures()
    found: dict[str, Record] = {}
    with failures.recorded(SUBJECT):
        found = memory(case, failures) if case.measure == "memory" else times(case, seconds, rate, failures)
    found |= {name: replace(case.blank, competitor=name, failure=reason) for name, reason in failures.items()}
    return list(with_ratios(found).values())


def times(case: Case, seconds: float, rate: tuple[int, int, int], failures: Failures) -> dict[str, Record]:
    """Return the milliseconds of every competitor and of the floor."""
    library, training = case.framework, case.measure == "training"
    steps = (library.training if training else library.evaluation)(case.problem, case.mode)
    with failures.recorded(SUBJECT):
        compare(library, steps[SUBJECT], steps[TEXTBOOK])
    channels, batch, size = rate
    flops = {"convolution": 2 * channels**2 * batch * size**2, "matrices": 2 * (4 * channels) ** 3}
    products = library.products(case.mode, channels, batch, size) if training and case.wants(FLOOR) else {}
    timers: dict[str, Callable[[], float]] = {}
    for name, step in ({name: steps[name] for name in steps if case.wants(name)} | products).items():
        if name not in failures:
            with failures.recorded(name):
                timers[name] = host_timer(partial(library.run, step))
    taken = {name: values for name, values in in_turns(timers, seconds, failures).items() if name not in failures}
    found = {name: timed(case.blank, name, values) for name, values in taken.items() if name in steps}
    alike = found.get(SAME_TRAFFIC[case.problem.what])
    rates = [flops[name] / (1e6 * median(taken[name])) for name in products if name in taken]
    if alike is not None and alike.median_ms is not None and rates:
        least = product_flops(case.problem.shape, case.problem.group) / (1e6 * max(rates))
        floor = max(least, alike.median_ms)
        found[FLOOR] = replace(case.blank, competitor=FLOOR, median_ms=round(floor, 6), gflops=round(max(rates), 2))
    return found


def compare(library: Framework, subject: Step, textbook: Step) -> None:
    """Raise ArithmeticError if polywhiten's result is wrong, however fast it is."""
    results = [library.values(step()) for step in (subject, textbook)]
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(*results, strict=True)]
    if not max(errors) <= TOLERANCE:  # also true for NaN
        raise ArithmeticError(f"a relative difference of {max(errors):.1e} from the textbook")


def timed(blank: Record, name: str, values: list[float]) -> Record:
    low, middle, high = (round(value, 6) for value in quantiles(values, n=4, method="inclusive"))
    quartiles = {"median_ms": middle, "lower_quartile_ms": low, "upper_quartile_ms": high}
    return replace(blank, competitor=name, rounds=len(values), **quartiles)


def memory(case: Case, failures: Failures) -> dict[str, Record]:
    """Return the peak bytes of a training step, and the bytes that are saved for backward."""
    found: dict[str, Record] = {}
    kept = case.framework.kept_bytes(case.problem)
    for name, step in case.framework.training(case.problem, case.mode).items():
        if not case.wants(name):
            continue
        with failures.recorded(name):
            case.framework.run(step)  # so that what is allocated only once doesn't count
            peak = case.framework.peak_bytes(step)
            found[name] = replace(case.blank, competitor=name, rounds=1, peak_bytes=peak, kept_bytes=kept.get(name))
    return found


def with_ratios(found: dict[str, Record]) -> dict[str, Record]:
    """Add polywhiten's median (or peak) divided by the competitor's to every record."""
    subject = found.get(SUBJECT)
    for name, record in found.items():
        for field in ("median_ms", "peak_bytes"):
            ours, theirs = getattr(subject, field, None), getattr(record, field)
            if ours and theirs and name != SUBJECT:
                found[name] = replace(record, ratio=float(f"{ours / theirs:.5g}"))
    return found


def guard_problems(sets: list[str] | None, layouts: list[str]) -> list[Problem]:
    """Return the guard's problems: a few shapes, and one number of groups."""
    found = problems(sets or ["resnet50", "mlp"], layouts)
    return [
        problem
        for problem in found
        if (sets or problem.shape in GUARD_SHAPES) and (problem.what != GROUP_WHITEN or problem.group == GUARD_GROUPS)
    ]


def summary(found: list[Verdict]) -> Table:
    table = Table(
        "backend", "mode", "polywhiten / competitor", "measured", "bar", "worst at", caption="! misses its bar"
    )
    for verdict in found:
        bar = verdict.bar
        limit = f"{verdict.limit:.3g}" + (f", goal {bar.goal:g}" if bar.goal else "")
        value = f"{verdict.value:.3g}" + ("" if verdict.met else " !")
        table.add_row(bar.backend, verdict.mode, str(bar), value, limit, verdict.worst)
    return table


def chosen_backends(requested: tuple[str, ...], device: str, console: Console) -> list[str]:
    """Return the requested backends, or those that are installed if all were requested.

    Raise click.UsageError if one that was requested by name, or every backend, isn't available on the device.
    """
    found = []
    for name in BACKENDS if "all" in requested else dict.fromkeys(requested):
        try:
            framework(name, device)
        except (ImportError, ValueError) as error:
            if "all" not in requested:
                raise click.UsageError(f"--backend {name} --device {device}: {first_lines(error)}") from error
            console.print(f"{name} is skipped: {first_lines(error)}", markup=False)
        else:
            found.append(name)
    if not found:
        raise click.UsageError(f"no installed framework supports the device {device}")
    return found


def parsed_layouts(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    names = value.split(",")
    wrong = [name for name in names if name not in LAYOUTS]
    if wrong:
        raise click.BadParameter(f"unknown layout {', '.join(wrong)!r}, expected some of {', '.join(LAYOUTS)}")
    return names


@click.command()
@click.option(
    "--backend", "backends", multiple=True, type=click.Choice([*BACKENDS, "all"]), default=["all"], show_default=True
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--isa",
    type=click.Choice(INSTRUCTION_SETS),
    help="Restrict polywhiten and all competitors to an older instruction set than the processor's.",
)
@click.option(
    "--shapes",
    "sets",
    multiple=True,
    type=click.Choice([*SHAPES]),
    help="Sets of shapes; tiny is for a trial of the script.  [default: resnet50, others, mlp]",
)
@click.option(
    "--layouts",
    default=",".join(LAYOUTS),
    show_default=True,
    callback=parsed_layouts,
    help="Memory layouts of feature maps, separated by commas.",
)
@click.option("--measure", "measures", multiple=True, type=click.Choice(MEASURES), help="[default: all]")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=3.0,
    show_default=True,
    help="Time to measure every case for, in at least five rounds.",
)
@click.option("--large", is_flag=True, help=f"Include feature maps of more than {NUMPY_ELEMENTS:,} elements for NumPy.")
@click.option(
    "--guard",
    is_flag=True,
    help="Measure a quick subset, and fail if a ratio is 30 % above its bar. Write no file unless --out is given.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for speed-BACKEND-DEVICE.csv, which is replaced.  [default: results, beside this script]",
)
def main(
    backends: tuple[str, ...],
    device: str,
    isa: str | None,
    sets: tuple[str, ...],
    layouts: list[str],
    measures: tuple[str, ...],
    seconds: float,
    large: bool,
    guard: bool,
    out: Path | None,
) -> None:
    """Measure polywhiten against its bars.

    Options with several values are repeated: --backend torch --backend jax.
    """
    if "tiny" in sets and out is None and not guard:
        raise click.UsageError("--shapes tiny is a trial and would replace the real results: give a folder with --out")
    if isa:
        if device != "cpu":
            raise click.UsageError(f"--isa restricts the CPU, not the device {device}")
        try:
            run_again_restricted()
        except ValueError as error:
            raise click.UsageError(f"--isa {isa}: {error}") from error
    warnings.simplefilter("ignore", InfeasibleWarning)  # small shapes with many groups are timed too
    console = Console() if sys.stdout.isatty() else Console(width=140)
    names = list(dict.fromkeys(sets))
    found = guard_problems(names, layouts) if guard else problems(names or ["resnet50", "others", "mlp"], layouts)
    rate = TINY_PRODUCT if names == ["tiny"] else PRODUCT
    seconds = min(seconds, 0.5) if guard else seconds
    folder = out if guard else out or RESULTS
    records: list[Record] = []
    for backend in chosen_backends(backends, device, console):
        kept = [
            problem
            for problem in found
            if backend != "numpy" or large or not problem.is_picture or prod(problem.shape) <= NUMPY_ELEMENTS
        ]
        cases = list(cases_of(backend, device, isa, kept, list(dict.fromkeys(measures)) or list(MEASURES), guard))
        if not cases:
            continue  # without replacing the file of an earlier run
        path = None if folder is None else folder / f"speed-{backend}-{device_in_files(device, isa)}.csv"
        records += run(cases, path, seconds, rate, console)
    judged = verdicts(records)
    if not records:
        raise click.UsageError("nothing was measured: no case has these shapes, backends and measures")
    console.print(summary(judged))
    console.print(f"{records[0].machine}; {'; '.join(dict.fromkeys(r.versions for r in records))}", markup=False)
    conclude(records, judged if guard else [])


def run(
    cases: list[Case], path: Path | None, seconds: float, rate: tuple[int, int, int], console: Console
) -> list[Record]:
    """Measure the cases of a backend, and write the rows of each as soon as it is measured."""
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    records: list[Record] = []
    with written(path) as writer, Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            rows = measured(case, seconds, rate)
            for row in rows:
                if row.failure is not None:
                    console.print(f"failed: {case}, {row.competitor}: {row.failure}", markup=False, highlight=False)
            if writer is not None:
                writer.add(rows)
            records += rows
            progress.advance(task)
    return records


def conclude(records: list[Record], guarded: list[Verdict]) -> None:
    """Raise click.ClickException if measurements failed, or if the guard finds some too slow."""
    problems_found = [f"too slow: {verdict}" for verdict in guarded if not verdict.allowed]
    failed = sum(record.failure is not None for record in records)
    if failed:
        problems_found.append(f"{failed} of {len(records)} measurements failed for the reasons given above")
    if problems_found:
        raise click.ClickException("\n".join(problems_found))


if __name__ == "__main__":
    main()
