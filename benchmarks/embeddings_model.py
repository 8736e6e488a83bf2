"""Predicts how long `Whitening.fit` takes on many machines, from what one machine is measured to do.

`python benchmarks/embeddings_model.py --folder DIR` measures, in about a minute, the machine that it runs on, with a
file of 2 GiB in the folder. Then it prints the table of docs/embeddings-many-machines.md for 1, 10 and 100 such
machines. It measures how fast `Whitening.partial_fit` takes rows of float32 and float16, how fast a file is read that
is in memory and one that isn't, and how fast moments are added. Two numbers aren't measured: `--network` says how many
bytes a second go from one machine to another, and `--task-seconds` how long Dask's scheduler takes for a task.

The model: a machine computes the moments of its share of the rows in pieces, and adds those of each piece to its own.
If it reads and computes at the same time, the longer of the two counts, and otherwise both. The scheduler handles one
task a piece, for all machines, while they work. A tree adds the sums of the machines; in each of its ceil(log_8
machines) levels, a machine receives up to 7 times 8 (d^2 + d) bytes, and adds them.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click
import machine
import numpy as np
from rich.console import Console
from rich.table import Table

import polywhiten as pw

DIMENSION = 1024
ROWS = 10**9
MACHINES = (1, 10, 100)
FAN_IN = 8  # how many moments a task of the tree adds
DTYPES = ("float32", "float16")
FILE_BYTES = 2 << 30
BLOCK_ROWS = 1 << 15
REPEATS = 5


@dataclass(frozen=True)
class Rates:
    """What one machine does in a second.

    Attributes
    ----------
    rows : dict of float
        Rows whose moments it takes, by dtype.
    read : float
        Bytes that it reads of a file that isn't in memory.
    read_again : float
        Bytes that it reads of a file that is in memory.
    additions : float
        Moments that it adds to others.
    network : float
        Bytes that it receives from another machine.
    tasks : float
        Tasks that the scheduler of all machines handles.
    """

    rows: dict[str, float]
    read: float
    read_again: float
    additions: float
    network: float
    tasks: float


@dataclass(frozen=True)
class Prediction:
    """Seconds on a number of machines: of reading, of computing, of the scheduler, and of the tree."""

    read: float
    compute: float
    schedule: float
    tree: float

    @property
    def least(self) -> float:
        """The time if workers read and compute at the same time."""
        return max(self.read, self.compute, self.schedule) + self.tree

    @property
    def most(self) -> float:
        """The time if workers read, and then compute."""
        return max(self.read + self.compute, self.schedule) + self.tree


def prediction(rates: Rates, dtype: str, machines: int, piece_rows: int) -> Prediction:
    """Return the times for `ROWS` rows that are spread over the machines."""
    share, addition = ROWS / machines, 1 / rates.additions
    read, compute = share * row_bytes(dtype) / rates.read, share / rates.rows[dtype] + share / piece_rows * addition
    levels = math.ceil(math.log(machines, FAN_IN) - 1e-9)
    tree = levels * (FAN_IN - 1) * (8 * (DIMENSION**2 + DIMENSION) / rates.network + addition)
    return Prediction(read, compute, ROWS / piece_rows / rates.tasks, tree)


def row_bytes(dtype: str) -> int:
    return DIMENSION * np.dtype(dtype).itemsize


def most_machines(rates: Rates, dtype: str, piece_rows: int) -> tuple[int, str]:
    """Return the first power of 2 of machines of which more than half of the time is spent waiting, and for what."""
    machines = 1
    while True:
        times = prediction(rates, dtype, machines, piece_rows)
        if max(times.read, times.compute) < times.least / 2:
            return machines, "scheduler" if times.schedule > times.tree else "tree"
        machines *= 2


def seconds(call: Callable[[], object]) -> float:
    """Return the median time of some calls, after one that isn't counted."""
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def measured_rates(folder: Path, network: float, tasks: float) -> Rates:
    """Measure this machine, with a temporary file in the folder."""
    random = np.random.default_rng(0)
    block = random.standard_normal((BLOCK_ROWS, DIMENSION), np.float32)
    rows = {}
    for dtype in DTYPES:
        whitening, batch = pw.Whitening(), block.astype(dtype)
        rows[dtype] = BLOCK_ROWS / seconds(lambda whitening=whitening, batch=batch: whitening.partial_fit(batch))
    moments = pw.Whitening().partial_fit(block).moments_
    additions = 1 / seconds(lambda: moments + moments)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for _ in range(FILE_BYTES // block.nbytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        buffer = bytearray(1 << 22)
        read = FILE_BYTES / seconds(lambda: _read(file.name, buffer, cold=True))
        read_again = FILE_BYTES / seconds(lambda: _read(file.name, buffer, cold=False))
    return Rates(rows, read, read_again, additions, network, tasks)


def _read(name: str, buffer: bytearray, *, cold: bool) -> None:
    """Read a file from begin to end; for a cold one, the system forgets it before, which costs hardly any time."""
    with open(name, "rb", buffering=0) as file:
        if cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.readinto(buffer):
            pass


def table(rates: Rates, piece_rows: int) -> Table:
    """Return the predictions as a table."""
    result = Table(title=f"Minutes for {ROWS:.0e} rows of {DIMENSION}, in pieces of {piece_rows} rows")
    for name in (
        "dtype",
        "machines",
        "reading",
        "computing",
        "scheduler",
        "tree",
        "in all, at once",
        "in all, in turn",
    ):
        result.add_column(name, justify="right")
    for dtype in DTYPES:
        for machines in MACHINES:
            times = prediction(rates, dtype, machines, piece_rows)
            values = times.read, times.compute, times.schedule, times.tree, times.least, times.most
            result.add_row(dtype, str(machines), *(f"{value / 60:.3g}" for value in values))
    return result


def limits(rates: Rates, dtype: str, piece_rows: int) -> str:
    """Return a sentence about what is the limit, and where."""
    needed, (machines, what) = rates.rows[dtype] * row_bytes(dtype), most_machines(rates, dtype, piece_rows)
    return (
        f"{dtype}: a disk is the limit if it reads less than {needed / 1e6:.0f} MB/s for each machine; with {machines} "
        f"machines, the {what} takes more than half of the time"
    )


@click.command()
@click.option(
    "--folder", type=click.Path(path_type=Path, exists=True), default=Path(), help="A folder on the disk to measure."
)
@click.option("--network", default=1.25e9, show_default=True, help="Bytes a second between machines.")
@click.option("--task-seconds", default=0.002, show_default=True, help="Seconds of the scheduler for a task.")
@click.option("--piece-rows", default=2**18, show_default=True, help="Rows of a task.")
def main(folder: Path, network: float, task_seconds: float, piece_rows: int) -> None:
    """Measure this machine, and print what the model predicts."""
    rates = measured_rates(folder, network, 1 / task_seconds)
    console = Console()
    console.print(f"{machine.description()}, load {os.getloadavg()[0]:.2f}")
    for dtype, rate in rates.rows.items():
        operations = rate * DIMENSION * (DIMENSION + 1)  # a symmetric product: half of 2 d^2
        console.print(f"moments of {dtype}: {rate:.3g} rows/s, {operations / 1e9:.3g} GFLOP/s")
    console.print(f"reading: {rates.read / 1e9:.3g} GB/s, again {rates.read_again / 1e9:.3g} GB/s")
    console.print(f"adding moments: {1000 / rates.additions:.3g} ms; network, not measured: {network / 1e9:.3g} GB/s")
    console.print(table(rates, piece_rows))
    for dtype in DTYPES:
        console.print(limits(rates, dtype, piece_rows))


if __name__ == "__main__":
    main()
