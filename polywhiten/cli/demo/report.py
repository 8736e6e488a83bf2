"""Report the epochs of the demo: a CSV file that grows with every epoch, a table and a picture."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from rich import box
from rich.table import Table

from polywhiten.cli.demo.training import NORMS, Epoch

# Okabe and Ito's colours, which colour-blind readers can tell apart, and markers for prints in grey.
STYLES = {
    "bn": ("#0072B2", "o"),
    "gn": ("#E69F00", "s"),
    "iternorm": ("#D55E00", "^"),
    "gw": ("#009E73", "D"),
    "dbn": ("#CC79A7", "v"),
}


class WriteError(RuntimeError):
    """A file can't be written; the message names it and the reason."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise WriteError for any OSError inside this `with` statement."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} can't be written ({error.strerror or error})") from error


def start_results(path: Path) -> None:
    """Make a CSV file for epochs, instead of an earlier one of this name."""
    with writing(path), path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(Epoch._fields)


def add_result(path: Path, epoch: Epoch) -> None:
    """Add an epoch to the CSV file, which is complete after every call, so that a stopped run leaves all epochs."""
    norm, number, *measures = epoch
    with writing(path), path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow([norm, number, *(f"{measure:.6g}" for measure in measures)])


def table(epochs: Sequence[Epoch]) -> Table:
    """Return a row for each norm: the last and the best test accuracy, and the median time of a training step."""
    result = Table(box=box.SIMPLE_HEAD)
    result.add_column("Norm")
    for title in ("Test accuracy", "Best accuracy", "Best epoch", "ms per step"):
        result.add_column(title, justify="right")
    for norm, run in _by_norm(epochs):
        last = run[-1]
        best = max((epoch for epoch in run if not epoch.diverged), key=lambda epoch: epoch.test_accuracy, default=None)
        result.add_row(
            NORMS[norm],
            f"diverged in epoch {last.epoch}" if last.diverged else f"{last.test_accuracy:.2%}",
            "-" if best is None else f"{best.test_accuracy:.2%}",
            "-" if best is None else str(best.epoch),
            f"{median(epoch.ms_per_step for epoch in run):.1f}",
        )
    return result


def curves(epochs: Sequence[Epoch], title: str) -> Figure:
    """Plot training loss and test accuracy after every epoch, until a run diverges."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for norm, run in _by_norm(epochs):
        colour, marker = STYLES[norm]
        run_on = [epoch for epoch in run if not epoch.diverged]
        label = NORMS[norm] if len(run_on) == len(run) else f"{NORMS[norm]} (diverged)"
        every = max(1, len(run_on) // 20)
        style = {"color": colour, "marker": marker, "markersize": 4, "markevery": every, "linewidth": 1.5}
        numbers = [epoch.epoch for epoch in run_on]
        loss.plot(numbers, [epoch.train_loss for epoch in run_on], label=label, **style)
        accuracy.plot(numbers, [epoch.test_accuracy for epoch in run_on], **style)
    loss.set(title="Training loss", xlabel="epoch", yscale="log")
    bottom, top = loss.get_ylim()
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top > 10 * bottom else range(1, 10)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(NullFormatter())
    accuracy.set(title="Test accuracy", xlabel="epoch")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    for panel in (loss, accuracy):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, parse_math=False)  # a file's name may have dollars in it
    figure.legend(loc="outside lower center", ncols=len(NORMS), frameon=False)
    return figure


def save_curves(epochs: Sequence[Epoch], title: str, path: Path) -> None:
    """Write the plot of `curves` to a file; raise WriteError if that is not possible."""
    with writing(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the title may hold a file's name in any script
        curves(epochs, title).savefig(path, dpi=150)


def _by_norm(epochs: Sequence[Epoch]) -> list[tuple[str, list[Epoch]]]:
    norms = dict.fromkeys(epoch.norm for epoch in epochs)
    return [(norm, [epoch for epoch in epochs if epoch.norm == norm]) for norm in norms]
