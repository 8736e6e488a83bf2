"""Times of polywhiten on a GPU beside PyTorch's layers and the papers' algorithms: `python benchmarks/gpu_speed.py`.

Writes all that is measured to results/gpu-DEVICE.csv and prints the geometric means of those ratios that have a bar.

Competitors take turns in one process. A measurement is a batch of calls between two events on the device, each call on
another of several input sets, together larger than the device's cache: a network's layers don't find their input there
either. There are two modes: "eager", where small layers wait for Python to launch kernels, and "graph", the same calls
replayed as one CUDA graph. PyTorch's settings are its defaults: products of float32 in full float32.

`--device cpu` tries the script, not the library: tiny shapes, the host's clock, NumPy in CuPy's place.
"""

import csv
import math
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import geometric_mean, median, quantiles
from timeit import Timer
from types import ModuleType
from typing import Any

import click
import gpu_floors as floors
import torch
from alternating import Failures, in_turns, repeats
from competitors.in_torch import Textbook, set_affine, train
from gpu_floors import BATCH, GROUP_SIZE, NUM_GROUPS, Work
from records import SUBJECT
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from textbook import Blocks
from torch import Tensor, nn

import polywhiten as pw
from polywhiten.torch import GroupWhitening, IterNorm

T, EPS = 5, 1e-5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
COMBINATIONS = [(dtype, layout) for dtype in DTYPES for layout in LAYOUTS]
MODES = ("eager", "graph")

# What polywhiten's time may be, as a share of a competitor's: geometric means over shapes.
BARS = {
    ("IterNorm", "BatchNorm2d"): 1.5,
    ("IterNorm", "textbook"): 1 / 5,
    ("GroupWhitening", "GroupNorm"): 1.5,
    ("GroupWhitening", "textbook"): 1 / 5,
    ("inverse_sqrt", "eigh"): 1 / 50,
    ("CuPy, forward", "PyTorch"): 1.5,
}
GOALS = {("IterNorm", "BatchNorm2d"): 1.2}
INVERSE_SQRT_MS = 0.06

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # relative, between competitors that compute the same

FIELDS = [
    *("device", "versions", "what", "mode", "competitor", "shape", "dtype", "layout"),
    *("median_ms", "lower_quartile_ms", "upper_quartile_ms", "batches"),
    *("floor_bytes", "floor_ms", "times_floor"),  # the least traffic, its time or that of the products, median over it
    *("ratio", "failure"),  # polywhiten's median over this one
]

Shape = tuple[int, ...]
Inputs = tuple[Any, ...]
Step = Callable[..., Any]  # of one input set
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Competitors on one shape: `build` gives their steps, by name, and the input sets."""

    what: str
    mode: str
    shape: Shape
    dtype: str
    layout: str
    work: Work
    build: Callable[[], tuple[dict[str, Step], list[Inputs]]]
    same: str | None = None  # the competitor that computes what polywhiten does
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __str__(self) -> str:
        return " ".join([self.what, self.mode, "x".join(map(str, self.shape)), self.dtype, self.layout]).strip()


def on_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def layers(what: str, channels: int, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The competitors, with the same weight and bias."""
    found: dict[str, Any]
    if what == "IterNorm":
        # parameters and running averages in float32 for bfloat16 too, as mixed-precision training has them
        given: dict[str, Any] = {"device": device, "dtype": torch.float32}
        found = {
            SUBJECT: IterNorm(channels, EPS, group_size=GROUP_SIZE, iterations=T, **given),
            "BatchNorm2d": nn.BatchNorm2d(channels, EPS, **given),
            "textbook": Textbook(channels, Blocks(per_sample=False, size=GROUP_SIZE), T, EPS, **given),
        }
    else:
        given = {"device": device, "dtype": dtype}  # PyTorch's group norm wants them of the input's dtype on CUDA
        found = {
            SUBJECT: GroupWhitening(NUM_GROUPS, channels, EPS, iterations=T, **given),
            "GroupNorm": nn.GroupNorm(NUM_GROUPS, channels, EPS, **given),
            "textbook": Textbook(channels, Blocks(per_sample=True, size=NUM_GROUPS), T, EPS, **given),
        }
    set_affine(found, torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device))
    return found


def input_sets(device: torch.device, shape: Shape, dtype: str, layout: str, arrays: int) -> list[Inputs]:
    """Sets of random arrays, with twice the bytes that the device's cache holds; at least two."""

    def draw() -> Tensor:
        return torch.randn(shape, device=device, dtype=DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])

    cache = torch.cuda.get_device_properties(device).L2_cache_size if on_cuda(device) else 0
    size = arrays * math.prod(shape) * floors.ITEMSIZE[dtype]
    return [tuple(draw() for _ in range(arrays)) for _ in range(max(2, math.ceil(2 * cache / size)))]


def layer_case(device: torch.device, what: str, mode: str, shape: Shape, dtype: str, layout: str) -> Case:
    def build() -> tuple[dict[str, Step], list[Inputs]]:
        steps = {name: partial(train, layer) for name, layer in layers(what, shape[1], device, DTYPES[dtype]).items()}
        return steps, [(x.requires_grad_(), dy) for x, dy in input_sets(device, shape, dtype, layout, arrays=2)]

    work = floors.training_work(math.prod(shape), dtype, GROUP_SIZE if what == "IterNorm" else NUM_GROUPS)
    return Case(what, mode, shape, dtype, layout, work, build, same="textbook")


def copy_case(device: torch.device) -> Case:
    """What share of its bandwidth the device really gives: the floors are to be read beside it."""
    shape = (2**28,) if on_cuda(device) else (2**16,)

    def build() -> tuple[dict[str, Step], list[Inputs]]:
        source, target = torch.randn(2, *shape, device=device)
        return {"PyTorch": target.copy_}, [(source,)]

    return Case("copy", "eager", shape, "float32", "", Work(2 * 4 * math.prod(shape)), build)


def eigh_inverse_sqrt(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.rsqrt().unsqueeze(-2) @ vectors.mT


def inverse_sqrt_forward(function: Callable[[Tensor], Tensor], cov: Tensor, _: Tensor) -> Tensor:
    with torch.no_grad():
        return function(cov)


def inverse_sqrt_training(function: Callable[[Tensor], Tensor], cov: Tensor, dw: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(function(cov), cov, dw)
    return gradient


# The step, and the arrays that it reads or writes: S and W forward; S, dW and dS backward.
INVERSE_SQRT = {"inverse_sqrt": (inverse_sqrt_forward, 2), "inverse_sqrt and gradient": (inverse_sqrt_training, 5)}


def inverse_sqrt_case(device: torch.device, what: str, mode: str) -> Case:
    shape = (32, 64, 64)
    step, arrays = INVERSE_SQRT[what]

    def build() -> tuple[dict[str, Step], list[Inputs]]:
        functions = {SUBJECT: partial(pw.inverse_sqrt, iterations=T), "eigh": eigh_inverse_sqrt}
        if mode == "graph":
            del functions["eigh"]  # it asks the device whether it converged, which can't be captured
        sets = []
        for _ in range(4):  # they stay in the cache, where a layer too finds the covariance that it has just computed
            rows = torch.randn(32, 64, 1024, device=device)
            sets.append(((rows @ rows.mT / 1024).requires_grad_(), torch.randn(shape, device=device)))
        return {name: partial(step, function) for name, function in functions.items()}, sets

    return Case(what, mode, shape, "float32", "", Work(arrays * 4 * math.prod(shape)), build)


def array_case(device: torch.device, library: ModuleType, shape: Shape) -> Case:
    """The forward pass of the same arrays in CuPy, or another library, and in PyTorch."""

    def normalize(x: Any, weight: Any, bias: Any) -> Any:
        return pw.iter_norm(x, weight=weight, bias=bias, group_size=GROUP_SIZE, iterations=T, eps=EPS)

    def build() -> tuple[dict[str, Step], list[Inputs]]:
        vectors = [torch.rand(shape[1], device=device) for _ in range(2)]
        tensors = [(x, *vectors) for (x,) in input_sets(device, shape, "float32", "NCHW", arrays=1)]
        sets = [(given, tuple(map(library.from_dlpack, given))) for given in tensors]
        return {
            SUBJECT: lambda _, arrays: normalize(*arrays),
            "PyTorch": lambda given, _: normalize(*given),
        }, sets

    def pytorchs_stream() -> AbstractContextManager[Any]:
        if not on_cuda(device):
            return nullcontext()
        stream: AbstractContextManager[Any] = library.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
        return stream

    work = floors.forward_work(math.prod(shape), "float32", GROUP_SIZE)
    return Case("CuPy, forward", "eager", shape, "float32", "NCHW", work, build, "PyTorch", pytorchs_stream)


def all_cases(device: torch.device, library: ModuleType | None) -> list[Case]:
    sizes = [(channels, size) for channels, size in floors.norm_layers()]
    shapes = [(BATCH, c, size, size) for c, size in sizes] if on_cuda(device) else [(4, 64, 6, 6), (4, 128, 3, 3)]
    cases = [
        copy_case(device),
        *(inverse_sqrt_case(device, what, mode) for what in INVERSE_SQRT for mode in MODES),
        *(array_case(device, library, shape) for shape in shapes if library is not None),
        *(
            layer_case(device, what, mode, shape, dtype, layout)
            for what in ("IterNorm", "GroupWhitening")
            for mode in MODES
            for dtype, layout in COMBINATIONS
            for shape in shapes
        ),
    ]
    return sorted(cases, key=lambda case: MODES.index(case.mode))  # graphs last: a capture that fails can harm others


def measure(case: Case, device: torch.device, seconds: float) -> tuple[dict[str, list[float]], Failures]:
    """Milliseconds a call of every competitor, and which of them failed."""
    times: dict[str, list[float]] = {}
    failures = Failures()
    with failures.kept(SUBJECT), case.context():
        steps, sets = case.build()
        times = {name: [] for name in steps}
        if case.same is not None:
            compare(steps, sets[0], case.same, case.dtype, failures)
        runs: dict[str, Callable[[], float]] = {}
        for name in [name for name in steps if name not in failures]:
            with failures.kept(name):
                runs[name] = timer(prepared(steps[name], sets, case.mode, device), len(sets), device)
        times |= in_turns(runs, seconds, failures)
    return times, failures


def compare(steps: dict[str, Step], inputs: Inputs, same: str, dtype: str, failures: Failures) -> None:
    """A fast wrong result is a failure of polywhiten's."""
    results: dict[str, Any] = {}
    for name in (SUBJECT, same):
        with failures.kept(name):
            results[name] = steps[name](*inputs)
    if len(results) == 2:
        with failures.kept(SUBJECT):
            found, expected = (r if isinstance(r, tuple) else (r,) for r in results.values())
            pairs = [(torch.as_tensor(a).float(), b.float()) for a, b in zip(found, expected, strict=True)]
            error = torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max().item()
            if not error <= TOLERANCE[dtype]:  # nor where it is NaN
                raise ArithmeticError(f"a relative difference of {error:.1e} from {same}")


def prepared(step: Step, sets: list[Inputs], mode: str, device: torch.device) -> Callable[[], None]:
    """A pass over all input sets, warm."""

    def run() -> None:
        for inputs in sets:
            step(*inputs)

    if mode == "eager" or not on_cuda(device):
        run()
        run()
        return run
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # around the capture too: one that fails doesn't go back to the former stream
        for _ in range(3):  # kernels are loaded, and workspaces allocated, before the capture
            run()
        with torch.cuda.graph(graph, stream=stream):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    replay: Callable[[], None] = graph.replay
    return replay


def timer(run: Callable[[], None], calls: int, device: torch.device) -> Callable[[], float]:
    """Milliseconds of one of a pass' calls, measured over a batch of passes."""
    passes = repeats(milliseconds(run, 1, device))
    return lambda: milliseconds(run, passes, device) / (passes * calls)


def milliseconds(run: Callable[[], None], passes: int, device: torch.device) -> float:
    """Of so many passes, on a device that was idle."""
    if not on_cuda(device):
        return 1000 * Timer(run).timeit(passes)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(passes):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def rows_of(case: Case, device_name: str, times: dict[str, list[float]], failures: Failures) -> list[Row]:
    rows: list[Row] = []
    least = floors.least_seconds(case.work, case.dtype, device_name)
    medians = {name: median(taken) for name, taken in times.items() if taken and name not in failures}
    for name in times.keys() | failures.keys():
        row: Row = {
            "what": case.what,
            "mode": case.mode,
            "competitor": name,
            "dtype": case.dtype,
            "layout": case.layout,
        }
        row |= {"shape": "x".join(map(str, case.shape)), "floor_bytes": case.work.bytes, "failure": failures.get(name)}
        if least is not None:
            row["floor_ms"] = round(1000 * least, 6)
        if name in medians:
            quartiles = quantiles(times[name], n=4, method="inclusive")
            row |= {"median_ms": round(medians[name], 6), "batches": len(times[name])}
            row |= {"lower_quartile_ms": round(quartiles[0], 6), "upper_quartile_ms": round(quartiles[2], 6)}
            if least is not None:
                row["times_floor"] = round(medians[name] / (1000 * least), 3)
            if SUBJECT in medians:
                row["ratio"] = round(medians[SUBJECT] / medians[name], 5)
        rows.append(row)
    return sorted(rows, key=lambda row: (row["competitor"] != SUBJECT, row["competitor"]))


def summary(rows: list[Row]) -> Table:
    """Geometric means against the bars."""
    names = [f"{dtype}\n{layout}" for dtype, layout in COMBINATIONS]
    table = Table("polywhiten's time", "mode", *names, "all", "bar", caption="! is above the bar")
    for (what, competitor), bar in BARS.items():
        for mode in MODES:
            kept = [r for r in rows if (r["what"], r["competitor"], r["mode"]) == (what, competitor, mode)]
            parts = [[r for r in kept if (r["dtype"], r["layout"]) == pair] for pair in COMBINATIONS]
            cells = [cell([r["ratio"] for r in part if "ratio" in r], bar) for part in (*parts, kept)]
            if kept:
                goal = GOALS.get((what, competitor))
                table.add_row(f"{what} / {competitor}", mode, *cells, f"{bar:.3g}" + (f", goal {goal}" if goal else ""))
    for row in rows:
        if row["what"] == "inverse_sqrt" and row["competitor"] == SUBJECT and "median_ms" in row:
            blank = [""] * len(COMBINATIONS)
            microseconds, bar = 1000 * row["median_ms"], 1000 * INVERSE_SQRT_MS
            table.add_row("inverse_sqrt, microseconds", row["mode"], *blank, cell([microseconds], bar), f"{bar:.3g}")
    return table


def cell(values: list[float], bar: float) -> str:
    if not values:
        return ""
    mean = geometric_mean(values)
    return f"{mean:.3g}" + (" !" if mean > bar else "")


def array_library(device: torch.device, console: Console) -> ModuleType | None:
    """CuPy, or None without it; NumPy on the CPU."""
    try:
        return import_module("cupy" if on_cuda(device) else "numpy")
    except ImportError as error:
        console.print(f"CuPy is left out: {error}", markup=False)
        return None


def versions(library: ModuleType | None) -> str:
    found = [pw, torch] if library is None else [pw, torch, library]
    with suppress(ImportError):
        found.append(import_module("triton"))
    return ", ".join(f"{module.__name__} {module.__version__}" for module in found)


@click.command()
@click.option(
    "--device",
    "kind",
    type=click.Choice(["cuda", "cpu"]),
    default="cuda",
    help="cpu tries the script.  [default: cuda]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(__file__).with_name("results"),
    help="Folder for gpu-DEVICE.csv.  [default: results, beside this script]",
)
@click.option("--seconds", default=0.6, show_default=True, help="To measure every case for, beside its preparation.")
@click.option("--minutes", default=8.0, show_default=True, help="Cases that haven't begun by then fail.")
@click.option("--floors", "floors_only", is_flag=True, help="Print an H200's floors, which needs no GPU, and no more.")
def main(kind: str, out: Path, seconds: float, minutes: float, floors_only: bool) -> None:
    """Measure polywhiten on a GPU against its bars."""
    if floors_only:
        for line in floors.table(floors.H200):
            click.echo(line)
        return
    device = torch.device(kind)
    if on_cuda(device) and not torch.cuda.is_available():
        raise click.UsageError("PyTorch finds no CUDA device: --device cpu tries the script, --floors needs none")
    torch.manual_seed(0)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    library = array_library(device, console)
    device_name = torch.cuda.get_device_name() if on_cuda(device) else "cpu"
    about = {"device": device_name, "versions": versions(library)}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"gpu-{re.sub('[^a-z0-9]+', '-', device_name.lower()).strip('-')}.csv"
    rows: list[Row] = []
    start = time.perf_counter()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with path.open("w", newline="", encoding="utf-8") as file, Progress(*columns, console=console) as progress:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        cases = all_cases(device, library)
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            if time.perf_counter() - start > 60 * minutes:
                times, failures = {}, Failures({SUBJECT: f"not measured: {minutes:g} minutes were over"})
            else:
                times, failures = measure(case, device, seconds)
            for competitor, reason in failures.items():
                console.print(f"failed: {case}, {competitor}: {reason}", markup=False, highlight=False)
            found = rows_of(case, device_name, times, failures)
            writer.writerows(about | row for row in found)
            file.flush()  # what is measured stays, whatever comes
            rows += found
            progress.advance(task)
    console.print(summary(rows))
    console.print(f"{device_name}; {about['versions']}; {time.perf_counter() - start:.0f} s; {path}", markup=False)
    failed = sum(row["failure"] is not None for row in rows)
    if failed:
        raise click.ClickException(f"{failed} of {len(rows)} measurements failed: the last column of {path} says why")


if __name__ == "__main__":
    main()
