"""One network a norm, one after the other: progress on the terminal, every finished epoch on disk."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from polywhiten.demo.data import Data
from polywhiten.demo.report import ResultsFile, curves
from polywhiten.demo.training import NORMS, Epoch, Framework, Settings, steps_per_epoch


def compare(
    framework: Framework, data: Data, norms: list[str], settings: Settings, out: Path
) -> tuple[list[Epoch], bool]:
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
    its_own = framework.SHOWS_PROGRESS and sys.stdout.isatty()
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "curves.png"
    with ResultsFile(out / "results.csv") as results:
        picture.unlink(missing_ok=True)  # an earlier run's would pass for this one's
        try:
            with _progress(not framework.SHOWS_PROGRESS) as progress:
                for norm in norms:
                    if its_own:
                        print(f"\n{NORMS[norm]}")
                    total = settings.epochs * steps_per_epoch(data, settings)
                    task = progress.add_task(NORMS[norm], total=total, state="")
                    for epoch in framework.train(norm, data, settings, partial(progress.advance, task)):
                        results.add(epoch)
                        epochs.append(epoch)
                        state = f"epoch {epoch.epoch}/{settings.epochs}  {epoch.test_accuracy:.1%}"
                        progress.update(task, state="diverged" if epoch.diverged else state)
                    progress.stop_task(task)
        except KeyboardInterrupt:
            stopped = True
            if its_own:
                print()  # its bar is without the end of its line
    if epochs:
        title = f"{data.name}: {settings.epochs} epochs, seed {settings.seed}, {framework.TITLE}"
        curves(epochs, title).savefig(picture, dpi=150)
    return epochs, stopped


def _progress(wanted: bool) -> Progress:
    """A bar a norm, on the terminal alone."""
    columns = TextColumn("{task.description:8}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeRemainingColumn()
    quiet = not (wanted and sys.stderr.isatty())
    return Progress(*columns, console=Console(stderr=True, quiet=quiet), transient=True, disable=quiet)
