"""Measures `polywhiten.Whitening` beside scikit-learn on embeddings in a file: `python benchmarks/embeddings_speed.py`.

Rows of float32 with a decaying spectrum are written to a `.npy` file once, and mapped into memory. The competitors take
turns in one process. Peak memory is what one call allocates, without the pages of the file. Errors are those of the
covariance that the fitted matrix leaves, against the identity, with the covariance of the data in float64.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

os.environ.setdefault(
    "OPENBLAS_THREAD_TIMEOUT", "4"
)  # threads of NumPy's products would spin beside the next competitor

import click
import machine
import numpy as np
import sklearn
from competitors import peak_of_host
from csv_rows import Writer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.decomposition import PCA, IncrementalPCA

import polywhiten as pw

BLOCK = 50_000  # rows that are generated, and referred to in float64, at once
SUBJECT, SLOW = "polywhiten", "IncrementalPCA"
Call = Callable[[], object]


@dataclass
class Row:
    """One competitor in one measure.

    `ratio` is polywhiten's median time divided by this competitor's. `peak_mib` and `error` are empty where they mean
    nothing.
    """

    machine: str
    versions: str
    rows: int
    dimension: int
    measure: str
    competitor: str
    median_s: float
    rounds: int
    ratio: float
    peak_mib: float | None
    error: float | None


def generated(path: Path, rows: int, dimension: int) -> np.ndarray:
    """Write embeddings to a file, and return it mapped into memory."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(dimension, dimension)))
    mixing = (basis * np.geomspace(1, 0.05, dimension) @ basis.T).astype(np.float32)
    mean = rng.normal(size=dimension).astype(np.float32)
    x = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, dimension))
    for start in range(0, rows, BLOCK):
        part = x[start : start + BLOCK]
        part[:] = rng.standard_normal(part.shape, dtype=np.float32) @ mixing + mean
    x.flush()
    return np.load(path, mmap_mode="r")


def covariance(x: np.ndarray) -> np.ndarray:
    """Return the covariance of the rows, computed in float64."""
    starts = range(0, len(x), BLOCK)
    mean = sum(x[start : start + BLOCK].sum(0, dtype=np.float64) for start in starts) / len(x)
    centred = (x[start : start + BLOCK] - mean for start in starts)
    return sum(block.T @ block for block in centred) / len(x)


def whitening_error(matrix: np.ndarray, cov: np.ndarray) -> float:
    """Return the relative distance of the covariance of whitened data from the identity."""
    matrix = matrix.astype(np.float64)
    return float(np.linalg.norm(matrix @ cov @ matrix.T - np.eye(len(matrix))) / np.sqrt(len(matrix)))


def fits(x: np.ndarray, incremental: bool) -> dict[str, Call]:
    competitors: dict[str, Call] = {
        SUBJECT: lambda: pw.Whitening("pca", eps=0).fit(x),
        "PCA": lambda: PCA(whiten=True, svd_solver="covariance_eigh").fit(x),
    }
    if incremental:
        competitors[SLOW] = lambda: IncrementalPCA(whiten=True).fit(x)
    return competitors


def transforms(x: np.ndarray) -> dict[str, Call]:
    pca, whitening = PCA(whiten=True, svd_solver="covariance_eigh").fit(x), pw.Whitening("pca", eps=0).fit(x)
    matrix = np.ascontiguousarray(whitening.matrix_.T, dtype=np.float32)
    return {
        SUBJECT: lambda: whitening.transform(x),
        "PCA": lambda: pca.transform(x),
        "matrix product": lambda: x @ matrix,
    }


def floors(x: np.ndarray) -> dict[str, Call]:
    """Return what bounds a fit: one pass over the file, and half of the products of a covariance at the best rate."""
    dimension, size = x.shape[1], 2048
    square = np.ones((size, size), np.float32)
    repeats = max(1, round(len(x) * dimension * dimension / (2 * size**3)))

    def products() -> None:
        for _ in range(repeats):
            square @ square

    return {"read": lambda: [x[i : i + BLOCK].sum() for i in range(0, len(x), BLOCK)], "products": products}


def in_turns(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each call in each round but the first, which compiles kernels and reads the file.

    `SLOW` takes part in the first two rounds alone.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in track(range(rounds + 1), "rounds"):
        for name, call in calls.items():
            if name != SLOW or turn < 2:
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in times.items()}


def measured(x: np.ndarray, incremental: bool, rounds: int) -> list[Row]:
    """Measure everything, fits and their floors in the same turns."""
    about = (
        machine.description(),
        f"polywhiten {pw.__version__}, scikit-learn {sklearn.__version__}, NumPy {np.__version__}",
    )
    cov, found = covariance(x), []
    for measure, competitors in (("fit", fits(x, incremental)), ("transform", transforms(x)), ("floor", floors(x))):
        beside = {SUBJECT: fits(x, False)[SUBJECT]} | competitors if measure == "floor" else competitors
        times = in_turns(beside, rounds)
        middle = {name: median(values) for name, values in times.items()}
        for name, call in competitors.items():
            peak = peak_of_host(call) / 2**20 if measure != "floor" and name != SLOW else None
            error = None
            if measure == "fit" and name != SLOW:
                fitted = call()
                matrix = (
                    fitted.matrix_
                    if name == SUBJECT
                    else fitted.components_ / np.sqrt(fitted.explained_variance_)[:, None]
                )
                error = whitening_error(matrix, cov)
            ratio = middle[SUBJECT] / middle[name]
            found.append(Row(*about, *x.shape, measure, name, middle[name], len(times[name]), ratio, peak, error))
    return found


def table(rows: list[Row]) -> Table:
    shown = Table("measure", "competitor", "seconds", "polywhiten / it", "peak MiB", "error")
    for row in rows:
        peak, error = ("" if value is None else f"{value:.3g}" for value in (row.peak_mib, row.error))
        shown.add_row(row.measure, row.competitor, f"{row.median_s:.3f}", f"{row.ratio:.2f}", peak, error)
    return shown


@click.command()
@click.option("--rows", type=click.IntRange(min=1000), default=1_000_000, show_default=True)
@click.option("--dimension", type=click.IntRange(min=2), default=384, show_default=True)
@click.option(
    "--incremental/--no-incremental", default=True, show_default=True, help="Measure IncrementalPCA, which is slow."
)
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Turns, after one to warm up.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="CSV file for the rows.")
def main(rows: int, dimension: int, incremental: bool, rounds: int, out: Path | None) -> None:
    """Measure fit and transform of embeddings beside scikit-learn's PCA."""
    with tempfile.TemporaryDirectory() as folder:
        x = generated(Path(folder) / "embeddings.npy", rows, dimension)
        found = measured(x, incremental, rounds)
    Console().print(table(found))
    if out is not None:
        writer = Writer(out, Row)
        writer.add(found)
        writer.close()


if __name__ == "__main__":
    main()
