"""One network a norm, one after the other: progress on the terminal, every finished epoch on disk."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from polywhiten.demo.data import Data
from polywhiten.demo.report import ResultsFile, curves
from polywhiten.demo.training import NORMS, Epoch, Settings, Trainer, steps_per_epoch


def compare(train: Trainer, data: Data, norms: list[str], settings: Settings, out: Path) -> tuple[list[Epoch], bool]:
    """Train with each norm and write results.csv and curves.png.

    Parameters
    ----------
    train : Trainer
        The framework's training.
    data : Data
    norms : list of str
        Keys of `NORMS`.
    settings : Settings
    out : Path
        Folder for the files; made where there is none.

    Returns
    -------
    epochs : list of Epoch
        All that were completed.
    stopped : bool
        Whether Ctrl-C ended it early; the files hold the completed epochs then.

    Raises
    ------
    OSError
        The files can't be written.
    """
    epochs: list[Epoch] = []
    stopped = False
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "curves.png"
    with ResultsFile(out / "results.csv") as results:
        picture.unlink(missing_ok=True)  # an earlier run's would pass for this one's
        try:
            with _progress() as progress:
                for norm in norms:
                    total = settings.epochs * steps_per_epoch(data, settings)
                    task = progress.add_task(NORMS[norm], total=total, state="")
                    for epoch in train(norm, data, settings, partial(progress.advance, task)):
                        results.add(epoch)
                        epochs.append(epoch)
                        state = f"epoch {epoch.epoch}/{settings.epochs}  {epoch.test_accuracy:.1%}"
                        progress.update(task, state="diverged" if epoch.diverged else state)
                    progress.stop_task(task)
        except KeyboardInterrupt:
            stopped = True
    if epochs:
        curves(epochs, f"{data.name}: {settings.epochs} epochs, seed {settings.seed}").savefig(picture, dpi=150)
    return epochs, stopped


def _progress() -> Progress:
    """A bar a norm, on the terminal alone."""
    columns = TextColumn("{task.description:8}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeRemainingColumn()
    quiet = not sys.stderr.isatty()
    return Progress(*columns, console=Console(stderr=True, quiet=quiet), transient=True, disable=quiet)
