"""The command line's arguments; one that doesn't fit is a single line on standard error, and exit code 2."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

import polywhiten
from polywhiten.cli.compile import compile_command, compile_for_demo
from polywhiten.cli.completion import completion
from polywhiten.cli.demo.data import DataError, load_digits, load_npz
from polywhiten.cli.demo.frameworks import FRAMEWORKS, DependencyError, import_needed, load
from polywhiten.cli.demo.training import NORMS, OTHER_NORMS, Settings
from polywhiten.cli.embeddings.fit import fit
from polywhiten.cli.embeddings.inspect import inspect
from polywhiten.cli.embeddings.transform import transform
from polywhiten.cli.options import Integer, bad
from polywhiten.cli.streams import STOPPED, WRONG_USE, complain, reason
from polywhiten.cli.tables import full_width
from polywhiten.embeddings.files import FileError

MAX_SIZE = 10**8  # finding the divisors of this many channels takes seconds


def run(args: list[str] | None = None) -> int:
    """Run the command that `args`, by default the program's arguments, name; return the exit code."""
    try:
        code = commands.main(args, prog_name="polywhiten", standalone_mode=False)
    except click.ClickException as error:
        message, context = error.format_message(), getattr(error, "ctx", None)
        if context is not None and not isinstance(error, click.BadParameter):  # which says itself what is accepted
            message = f"{message.rstrip('.')}: see {context.command_path} --help"
        complain(message)
        return WRONG_USE
    except FileError as error:
        complain(str(error))
        return WRONG_USE
    except click.Abort:  # Ctrl-C before a command has started
        complain("stopped")
        return STOPPED
    except OSError as error:  # of standard output: commands handle the errors of other files themselves
        complain(f"standard output can't be written to ({error.strerror or error})")
        return WRONG_USE
    return code or 0


class _Commands(click.Group):
    """A group of commands that reports Ctrl-C in one line; click would print an empty one."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            complain("stopped")
            return STOPPED


def _rate(value: Any) -> float:
    """Convert a learning rate to a finite number above 0; click.FloatRange would accept NaN."""
    with suppress(ValueError):
        number = float(value)
        if 0 < number < math.inf:
            return number
    raise click.BadParameter(f"{value} is not a number above 0, such as 0.05")


@click.group(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(polywhiten.__version__, "-V", "--version", message="%(prog)s %(version)s")
@click.pass_context
def commands(ctx: click.Context) -> None:
    """Whitening of activations and embeddings in every Python array library.

    `polywhiten COMMAND --help` describes a command. Exit codes: 0 for success, 2 for wrong arguments and for files that
    can't be read or written, 130 after Ctrl-C.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for command in (fit, transform, inspect, compile_command, completion):
    commands.add_command(command)


@commands.command(short_help="Show the installed frameworks and their kernels.")
def info() -> None:
    """Show the installed frameworks, their devices, and the kernels that their arrays get."""
    from polywhiten.cli.info import report

    for line in report():
        click.echo(line)


@commands.command(short_help="Recommend group sizes for the shape of an input.")
@click.argument("shape", type=Integer(1, MAX_SIZE), nargs=-1, required=True, metavar="SIZE...")
@click.option("--axis", type=int, default=1, show_default=True, help="The channel axis.")
def recommend(shape: tuple[int, ...], axis: int) -> None:
    """Recommend group sizes for layers from the shape of their input.

    SIZE... is the shape in training, batch size first: 32 256 14 14 for 32 samples of 256 channels of 14 x 14.
    """
    from polywhiten import analysis

    for layer, kind in (("IterNorm", "batch_whitening"), ("GroupWhitening", "group_whitening")):
        try:
            click.echo(f"{layer}: {analysis.recommend(shape, kind, axis=axis)}")
        except ValueError as error:
            raise click.UsageError(str(error)) from error


_NORM_HELP = f"One of {', '.join(NORMS)}; repeat the option to train with several."
_FRAMEWORK_HELP = "The framework to train in. Keras uses the backend that KERAS_BACKEND names, or an installed one."
_DATA_HELP = "Grey or colour pictures, stored like Keras' data sets: x_train, y_train, x_test, y_test."
_DEVICE_HELP = "The device to train on, as the framework names it: cpu, cuda or mps in PyTorch, cpu or gpu:0 in Keras."
_OUT_HELP = "Folder for curves.png and results.csv; existing files of these names are overwritten."


@commands.command(context_settings={"show_default": True})
@click.option(
    "--norm",
    "norms",
    metavar="NAME",
    type=click.Choice(list(NORMS), case_sensitive=False),
    multiple=True,
    default=list(NORMS),
    show_default="all",
    help=_NORM_HELP,
)
@click.option("--framework", type=click.Choice(FRAMEWORKS, case_sensitive=False), default="torch", help=_FRAMEWORK_HELP)
@click.option("--data", "file", metavar="FILE.npz", type=Path, show_default="scikit-learn's digits", help=_DATA_HELP)
@click.option("--epochs", type=Integer(1), default=20, help="How often each training picture is seen.")
@click.option("--batch-size", type=Integer(2), default=64, help="Number of pictures in a training step.")
@click.option(
    "--lr", type=_rate, metavar="NUMBER", default=0.05, help="Initial learning rate, decayed to 0 by a cosine."
)
@click.option("--seed", type=Integer(0, 2**32 - 1), default=0, help="Seed of the initial weights and of the batches.")
@click.option("--device", metavar="NAME", default="cpu", help=_DEVICE_HELP)
@click.option("--out", metavar="DIR", type=Path, default=Path("polywhiten-demo"), help=_OUT_HELP)
def demo(norms: tuple[str, ...], framework: str, file: Path | None, out: Path, **options: Any) -> int:
    """Train a small network with each norm and compare them.

    The same convolutional network is trained from the same weights on the same batches with batch normalization (bn),
    group normalization (gn), iterative normalization (iternorm), group whitening (gw) and decorrelated batch
    normalization (dbn). Nothing is downloaded.
    """
    settings = Settings(**options)
    with suppress(OSError):  # a name that is too long, for example, which is reported when the folder is made
        if out.exists() and not out.is_dir():
            raise bad("--out", f"{out} is a file: name a folder, which is created if it doesn't exist")
    try:
        trainer = load(framework)
        import_needed("matplotlib", "polywhiten.cli.demo.report")
        if file is None:
            import_needed("scikit-learn", "sklearn.datasets")
    except DependencyError as error:
        raise click.UsageError(str(error)) from error
    try:
        trainer.check_device(settings.device)
    except ValueError as error:
        raise bad("--device", str(error)) from error
    try:
        data = load_digits() if file is None else load_npz(file)
    except DataError as error:
        raise bad("--data", str(error)) from error
    size, pictures = settings.batch_size, len(data.x_train)
    if size > pictures:
        raise bad("--batch-size", f"{size} is more than the {pictures} training pictures: use 2 to {pictures}")

    from polywhiten.cli.demo.compare import compare
    from polywhiten.cli.demo.report import WriteError, table

    chosen = list(dict.fromkeys(norms))
    if "torch" in sys.modules and settings.device == "cpu" and set(chosen) - OTHER_NORMS:
        compile_for_demo()
    epochs, failure = compare(trainer, data, chosen, settings, out)
    if isinstance(failure, WriteError) and not epochs:
        raise bad("--out", f"{failure}: name another folder")
    if epochs and not isinstance(failure, KeyboardInterrupt):
        sizes = f"{pictures} training and {len(data.x_test)} test pictures, {settings.epochs} epochs"
        click.echo(f"{data.name}: {sizes}; {trainer.TITLE}")
        click.echo(full_width(table(epochs)), nl=False)
    if failure is None:
        click.echo(f"The curves are in {out / 'curves.png'}, the numbers in {out / 'results.csv'}.")
        return 0
    done = f"{len(epochs)} of {len(chosen) * settings.epochs} epochs"
    saved = f"{out / 'results.csv'} and {out / 'curves.png'} have them" if epochs else "there is nothing to keep"
    if isinstance(failure, KeyboardInterrupt):
        complain(f"stopped after {done}: {saved}")
        return STOPPED
    if isinstance(failure, WriteError):
        complain(f"--out: {failure}: name another folder; {done} are in the table")
    else:
        complain(f"training failed after {done} ({reason(failure)}): {saved}")
    return WRONG_USE
