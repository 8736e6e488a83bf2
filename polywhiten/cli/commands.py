"""The command line: arguments in, one line and exit code 2 where they don't fit."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import polywhiten
from polywhiten.cli.demo.data import Data, DataError, load_digits, load_npz
from polywhiten.cli.demo.frameworks import FRAMEWORKS, FrameworkError, load
from polywhiten.cli.demo.training import NORMS, Settings
from polywhiten.cli.streams import complain, reason

WRONG_USE = 2
STOPPED = 130  # as a shell has it for SIGINT
LARGEST_SIZE = 10**8  # to find the divisors of as many channels takes seconds


def run(args: list[str] | None = None) -> int:
    """Run the command that `args`, by default the program's, name; gives the exit code."""
    try:
        code = commands.main(args, prog_name="polywhiten", standalone_mode=False)
    except click.ClickException as error:
        message, context = error.format_message(), getattr(error, "ctx", None)
        if context is not None and not isinstance(error, click.BadParameter):  # that one says itself what would do
            message = f"{message.rstrip('.')}: see {context.command_path} --help"
        complain(message)
        return WRONG_USE
    except click.Abort:  # Ctrl-C before there is a command
        complain("stopped")
        return STOPPED
    except OSError as error:  # the commands explain those of other files where they occur
        complain(f"standard output can't be written to ({error.strerror or error})")
        return WRONG_USE
    return code or 0


class _Commands(click.Group):
    """Click would print an empty line for Ctrl-C."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            complain("stopped")
            return STOPPED


def _whole(least: int, most: float = math.inf) -> Callable[[Any], int]:
    """Option type: an integer from `least` to `most`."""

    def convert(value: Any) -> int:
        try:
            number = int(value)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            wanted = f"of {least} or more" if most == math.inf else f"from {least} to {most}"
            raise click.BadParameter(f"{value} is not an integer {wanted}")
        return number

    return convert


def _rate(value: Any) -> float:
    """Option type: a finite number above 0."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise click.BadParameter(f"{value} is not a number above 0, such as 0.05")
    return number


@click.group(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(polywhiten.__version__, message="%(prog)s %(version)s")
@click.pass_context
def commands(ctx: click.Context) -> None:
    """Whitening of activations in every Python array library."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@commands.command()
def info() -> None:
    """Show the frameworks that are installed and their kernels."""
    from polywhiten.cli.info import report

    for line in report():
        click.echo(line)


@commands.command()
@click.argument("shape", type=_whole(1, LARGEST_SIZE), nargs=-1, required=True, metavar="SIZE...")
@click.option("--axis", type=int, metavar="INTEGER", default=1, show_default=True, help="The channel axis.")
def recommend(shape: tuple[int, ...], axis: int) -> None:
    """Recommend group sizes for layers by their input's shape.

    SIZE... is the shape in training, batch size first: 32 256 14 14 for 32 samples of 256 channels of 14 x 14.
    """
    from polywhiten import analysis

    for layer, kind in (("IterNorm", "batch_whitening"), ("GroupWhitening", "group_whitening")):
        try:
            click.echo(f"{layer}: {analysis.recommend(shape, kind, axis=axis)}")
        except ValueError as error:
            raise click.UsageError(str(error)) from error


@commands.command()
@click.option(
    "--norm",
    "norms",
    multiple=True,
    type=click.Choice(list(NORMS), case_sensitive=False),
    metavar="NAME",
    default=list(NORMS),
    help=f"One of {', '.join(NORMS)}; give it several times for several.  [default: all]",
)
@click.option(
    "--framework",
    type=click.Choice(FRAMEWORKS, case_sensitive=False),
    default="torch",
    show_default=True,
    help="What to train with; Keras takes the backend that KERAS_BACKEND names, or one that is installed.",
)
@click.option(
    "--data",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="Pictures to train on, grey or colour, as Keras' data sets have them: x_train, y_train, x_test, y_test.  "
    "[default: scikit-learn's digits]",
)
@click.option(
    "--epochs",
    type=_whole(1),
    metavar="INTEGER",
    default=20,
    show_default=True,
    help="Times to go through the training pictures.",
)
@click.option(
    "--batch-size",
    type=_whole(2),
    metavar="INTEGER",
    default=64,
    show_default=True,
    help="Pictures in a training step; 2 or more.",
)
@click.option(
    "--lr",
    type=_rate,
    metavar="NUMBER",
    default=0.05,
    show_default=True,
    help="Learning rate of the first step; it falls to 0 along a cosine.",
)
@click.option(
    "--seed",
    type=_whole(0, 2**32 - 1),
    metavar="INTEGER",
    default=0,
    show_default=True,
    help="Of the first weights and of the batches.",
)
@click.option(
    "--device",
    metavar="NAME",
    default="cpu",
    show_default=True,
    help="Where to train, as the framework names it: cpu, cuda or mps in PyTorch, cpu or gpu:0 in Keras.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    default=Path("polywhiten-demo"),
    show_default=True,
    help="Folder for curves.png and results.csv; files of these names are overwritten.",
)
def demo(norms: tuple[str, ...], framework: str, file: Path | None, out: Path, **options: Any) -> int:
    """Train a small network with each norm and compare them.

    The same convolutional network is trained from the same weights on the same batches with batch normalization (bn),
    group normalization (gn), iterative normalization (iternorm), group whitening (gw) and decorrelated batch
    normalization (dbn). Nothing is downloaded.
    """
    settings = Settings(**options)
    if os.path.exists(out) and not os.path.isdir(out):  # a Path raises if the name is too long, for example
        raise _bad("--out", f"{out} is a file: name a folder, which is made where there is none")
    try:
        trainer = load(framework)
    except FrameworkError as error:
        raise click.UsageError(str(error)) from error
    report = _needed("matplotlib", "polywhiten.cli.demo.report")
    try:
        trainer.check_device(settings.device)
    except ValueError as error:
        raise _bad("--device", str(error)) from error
    data = _load(file)
    size, pictures = settings.batch_size, len(data.x_train)
    if size > pictures:
        raise _bad("--batch-size", f"{size} is more than the {pictures} training pictures: use 2 to {pictures}")

    from polywhiten.cli.demo.compare import compare
    from polywhiten.cli.demo.report import WriteError

    chosen = list(dict.fromkeys(norms))
    epochs, ended_by = compare(trainer, data, chosen, settings, out)
    unwritten = isinstance(ended_by, WriteError)
    if unwritten and not epochs:
        raise _bad("--out", f"{ended_by}: name another folder")
    if epochs and not isinstance(ended_by, KeyboardInterrupt):
        sizes = f"{pictures} training and {len(data.x_test)} test pictures, {settings.epochs} epochs"
        click.echo(f"{data.name}: {sizes}; {trainer.TITLE}")
        click.echo(_text(report.table(epochs)), nl=False)
    files = f"{out / 'results.csv'} and {out / 'curves.png'}"
    if ended_by is None:
        click.echo(f"The curves are in {out / 'curves.png'}, the numbers in {out / 'results.csv'}.")
        return 0
    done = f"{len(epochs)} of {len(chosen) * settings.epochs} epochs"
    kept = f"{files} have them" if epochs else "there is nothing to keep"
    if isinstance(ended_by, KeyboardInterrupt):
        complain(f"stopped after {done}: {kept}")
        return STOPPED
    if unwritten:
        complain(f"--out: {ended_by}: name another folder; {done} are in the table")
    else:
        complain(f"training failed after {done} ({reason(ended_by)}): {kept}")
    return WRONG_USE


def _text(table: Table) -> str:
    """The table as the terminal shows it; on a narrow one its lines wrap, and no number is cut off."""
    console = Console()
    needed = console.measure(table, options=console.options.update(max_width=sys.maxsize)).maximum
    console.width = max(console.width, needed)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _load(file: Path | None) -> Data:
    if file is None:
        _needed("scikit-learn", "sklearn.datasets")
        return load_digits()
    try:
        return load_npz(file)
    except DataError as error:
        raise _bad("--data", str(error)) from error


def _needed(package: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise click.UsageError(f'the demo needs {package} ({error}): pip install "polywhiten[demo]"') from error
    except (Exception, SystemExit) as error:  # an installation that is broken raises nearly anything
        raise click.UsageError(f"{package} is installed but broken ({reason(error)}): install it again") from error


def _bad(option: str, message: str) -> click.BadParameter:
    return click.BadParameter(message, param_hint=f"'{option}'")
