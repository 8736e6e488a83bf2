"""One network a norm, one after the other: progress on the terminal, every finished epoch on disk."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from polywhiten.cli.demo.data import Data
from polywhiten.cli.demo.report import ResultsFile, WriteError, save_curves, writing
from polywhiten.cli.demo.training import NORMS, Epoch, Framework, Settings, steps_per_epoch


class Comparison(NamedTuple):
    """What there is of it.

    Attributes
    ----------
    epochs : list of Epoch
        All that were completed.
    error : BaseException or None
        What ended it early: KeyboardInterrupt by Ctrl-C, WriteError for a file, else what the framework raised.
    """

    epochs: list[Epoch]
    error: BaseException | None


def compare(framework: Framework, data: Data, norms: list[str], settings: Settings, out: Path) -> Comparison:
    """Train with each norm and write results.csv and curves.png.

    Parameters
    ----------
    framework : Framework
    data : Data
    norms : list of str
        Keys of `NORMS`.
    settings : Settings
    out : Path
        Folder for the files; made where there is none.

    Returns
    -------
    Comparison
        If it ended early, the files hold the completed epochs, as far as they could be written.
    """
    epochs: list[Epoch] = []
    failure: BaseException | None = None
    its_own = framework.SHOWS_PROGRESS and sys.stdout.isatty()
    picture = out / "curves.png"
    try:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        with ResultsFile(out / "results.csv") as results:
            with writing(picture):  # not only found out after the training
                picture.touch()
                picture.unlink()  # an earlier run's would pass for this one's
            with _progress(not framework.SHOWS_PROGRESS) as progress:
                for norm in norms:
                    if its_own:
                        print(f"\n{NORMS[norm]}")
                    total = settings.epochs * steps_per_epoch(data, settings)
                    task = progress.add_task(NORMS[norm], total=total, state="")
                    for epoch in framework.train(norm, data, settings, partial(progress.advance, task)):
                        epochs.append(epoch)
                        results.add(epoch)
                        state = f"epoch {epoch.epoch}/{settings.epochs}  {epoch.test_accuracy:.1%}"
                        progress.update(task, state="diverged" if epoch.diverged else state)
                    progress.stop_task(task)
    except (Exception, KeyboardInterrupt) as error:  # whatever it is, hours of training may have gone before
        failure = error
        if its_own:
            print()  # its bar is without the end of its line
    if epochs and not isinstance(failure, WriteError):
        title = f"{data.name}: {settings.epochs} epochs, seed {settings.seed}, {framework.TITLE}"
        try:
            save_curves(epochs, title, picture)
        except WriteError as error:
            failure = error
    return Comparison(epochs, failure)


def _progress(wanted: bool) -> Progress:
    """A bar a norm, on the terminal alone."""
    columns = TextColumn("{task.description:8}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeRemainingColumn()
    quiet = not (wanted and sys.stderr.isatty())
    return Progress(*columns, console=Console(stderr=True, quiet=quiet), transient=True, disable=quiet)
