"""Train one network after the other, with progress on the terminal and every finished epoch on disk."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from polywhiten.cli.demo.data import Data
from polywhiten.cli.demo.report import WriteError, add_result, save_curves, start_results, writing
from polywhiten.cli.demo.training import NORMS, Epoch, Framework, Settings, steps_per_epoch


def compare(
    framework: Framework, data: Data, norms: list[str], settings: Settings, out: Path
) -> tuple[list[Epoch], BaseException | None]:
    """Train with each norm, and write results.csv and curves.png to a folder, which is created if necessary.

    Return all completed epochs, and what ended the comparison early: KeyboardInterrupt for Ctrl-C, WriteError for a
    file, another exception for the framework, None if nothing did. The files hold the completed epochs in any case, as
    far as they could be written.
    """
    epochs: list[Epoch] = []
    failure: BaseException | None = None
    has_own_bar = framework.SHOWS_PROGRESS and sys.stdout.isatty()
    results, picture = out / "results.csv", out / "curves.png"
    try:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        start_results(results)
        with writing(picture):  # an error is found before the training
            picture.touch()
            picture.unlink()  # an earlier run's picture would be taken for this run's
        with _progress(not framework.SHOWS_PROGRESS) as progress:
            for norm in norms:
                if has_own_bar:
                    print(f"\n{NORMS[norm]}")
                total = settings.epochs * steps_per_epoch(data, settings)
                task = progress.add_task(NORMS[norm], total=total, state="")
                for epoch in framework.train(norm, data, settings, partial(progress.advance, task)):
                    epochs.append(epoch)
                    add_result(results, epoch)
                    state = f"epoch {epoch.epoch}/{settings.epochs}  {epoch.test_accuracy:.1%}"
                    progress.update(task, state="diverged" if epoch.diverged else state)
                progress.stop_task(task)
    except (Exception, KeyboardInterrupt) as error:  # hours of training may come before any error
        failure = error
        if has_own_bar:
            print()  # the bar has no end of line yet
    if epochs and not isinstance(failure, WriteError):
        title = f"{data.name}: {settings.epochs} epochs, seed {settings.seed}, {framework.TITLE}"
        try:
            save_curves(epochs, title, picture)
        except WriteError as error:
            failure = error
    return epochs, failure


def _progress(wanted: bool) -> Progress:
    """Return progress bars, one for each norm; they are shown only on a terminal."""
    columns = TextColumn("{task.description:8}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeRemainingColumn()
    quiet = not (wanted and sys.stderr.isatty())
    return Progress(*columns, console=Console(stderr=True, quiet=quiet), transient=True, disable=quiet)
