"""Measures `fit` of files by two Dask workers against one: `python benchmarks/embeddings_workers.py --folder DIR`.

A worker is a process with one thread, also for products, so two of them need two idle cores. The files are written into
the folder first, and are in the system's memory then, unless the machine has too little. Clusters of one and of two
workers take turns, each runs the whole fit once before that, and the medians are compared.
"""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import click
import dask
import machine
import numpy as np
from alternating import Failures, in_turns
from distributed import Client, LocalCluster

import polywhiten as pw
from polywhiten.dask import fit_files
from polywhiten.embeddings.files import Piece, open_source, pieces

# what the workers' NumPy and Numba read when they are imported
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
BAR = 1.7
WORKERS = (1, 2)
FILES = 8


def speedup(folder: Path, rows: int, dimension: int, seconds: float) -> tuple[float, dict[str, list[float]]]:
    """Return how many times as fast two workers fit the rows as one does, and all times in seconds."""
    with ExitStack() as stack:
        source = stack.enter_context(written_files(folder, rows, dimension))
        clients = {f"{count} workers": stack.enter_context(cluster(count)) for count in WORKERS}
        measurements = {name: partial(seconds_of_fit, client, source) for name, client in clients.items()}
        for measured in measurements.values():
            measured()
        failures = Failures()
        times = in_turns(measurements, seconds, failures)
    if failures:
        raise RuntimeError(f"fit has failed: {failures}")
    one, two = (median(times[name]) for name in measurements)
    return one / two, times


def seconds_of_fit(client: Client, parts: Sequence[Piece]) -> float:
    """Return the time that the workers of a client take."""
    whitening = pw.Whitening()
    with dask.config.set(scheduler=client):
        start = time.perf_counter()
        fit_files(whitening, parts)
        return time.perf_counter() - start


@contextmanager
def written_files(folder: Path, rows: int, dimension: int) -> Iterator[list[Piece]]:
    """Write random rows into temporary files, and yield pieces of them."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        block = random.standard_normal((rows // FILES, dimension), np.float32)
        for index in range(FILES):
            np.save(Path(name) / f"{index}.npy", block)
        yield pieces(open_source([name]), len(block) // 4)


@contextmanager
def cluster(workers: int) -> Iterator[Client]:
    """Yield a client of new workers of one thread each."""
    options = {"threads_per_worker": 1, "processes": True, "dashboard_address": ":0", "host": "127.0.0.1"}
    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ": THREADS}),
        LocalCluster(n_workers=workers, memory_limit=None, **options) as local,
        Client(local, set_as_default=False) as client,
    ):
        yield client


@click.command()
@click.option("--folder", type=click.Path(path_type=Path, exists=True), default=Path(), help="Where files are written.")
@click.option("--rows", default=1_000_000, show_default=True)
@click.option("--dimension", default=384, show_default=True)
@click.option("--seconds", default=30.0, show_default=True, help="How long the clusters take turns.")
def main(folder: Path, rows: int, dimension: int, seconds: float) -> None:
    """Measure, and print the ratio beside its bar."""
    print(f"{machine.description()}, load {os.getloadavg()[0]:.2f}; ({rows}, {dimension}) float32 in {FILES} files")
    ratio, times = speedup(folder, rows, dimension, seconds)
    for name, each in times.items():
        print(f"{name}: median {median(each):.3f} s, {min(each):.3f} to {max(each):.3f} s of {len(each)}")
    print(f"two workers are {ratio:.2f} times as fast as one; the bar is {BAR}{'' if ratio >= BAR else ', missed'}")


if __name__ == "__main__":
    main()
