"""The command `polywhiten compile`, and the progress of compiling where another command needs kernels."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from polywhiten.cli.about import is_installed
from polywhiten.cli.streams import WRONG_USE, complain, reason

DTYPES = ("float32", "float64")
_DTYPE_HELP = "Compile for arrays of this dtype only; repeat the option for several. Half precision uses float32."


@click.command("compile", short_help="Compile the kernels for CPUs ahead of time.")
@click.option(
    "--dtype",
    "dtypes",
    metavar="NAME",
    type=click.Choice(DTYPES, case_sensitive=False),
    multiple=True,
    default=DTYPES,
    show_default="both",
    help=_DTYPE_HELP,
)
def compile_command(dtypes: tuple[str, ...]) -> int:
    """Compile the kernels for this machine's processor ahead of time.

    Otherwise the first use compiles them. NumPy's arrays and PyTorch's tensors on the CPU get these kernels. Later
    processes load them from the folder that the environment variable NUMBA_CACHE_DIR names. Without it, the folder is
    that of the installed package, or the user's cache if that can't be written to.
    """
    try:
        ahead = _ahead()
    except Exception as error:  # a broken installation raises anything
        complain(f'there are no kernels to compile without Numba ({reason(error)}): pip install "polywhiten[numba]"')
        return WRONG_USE
    folder = ahead.folder(dtypes[0])
    if folder is None:
        complain("no folder can be written to, to keep the kernels: set NUMBA_CACHE_DIR to one")
        return WRONG_USE
    start, wanted = time.monotonic(), ahead.jobs(tuple(dict.fromkeys(dtypes)))
    todo = ahead.missing(wanted)
    try:
        _show_compiling(ahead, todo, says_so=True)
    except ahead.CompileError as error:
        complain(str(error))
        return WRONG_USE
    failed = ahead.missing(todo)
    if failed:
        count = f"{len(failed)} of {len(todo)} compiled kernels"
        complain(f"{count} can't be kept in {folder}: make room, or set NUMBA_CACHE_DIR to another folder")
        return WRONG_USE
    seconds = f", in {time.monotonic() - start:.1f} s" if todo else ""
    click.echo(f"Kernels that were compiled: {len(todo)}{seconds}")
    click.echo(f"Kernels that were there already: {len(wanted) - len(todo)}")
    click.echo(f"They are kept in {folder}")
    return 0


def compile_for_demo() -> None:
    """Compile what training in PyTorch on the CPU, in float32, needs and isn't kept yet, with progress on a terminal.

    Nothing happens without Numba, or without a folder that keeps the kernels: then training compiles them.
    """
    try:
        ahead = _ahead()
    except Exception:  # as above
        return
    if ahead.folder("float32") is not None:
        with suppress(ahead.CompileError):  # then training compiles them, in one process
            _show_compiling(ahead, ahead.missing(ahead.jobs(("float32",), beside_torch=True)), says_so=False)


def _ahead() -> Any:
    if not is_installed("numba"):
        raise ImportError("numba is not installed")
    return import_module("polywhiten.cpu.ahead")


def _show_compiling(ahead: Any, todo: Sequence[Any], says_so: bool) -> None:
    """Compile, with a bar on a terminal; `says_so` is whether there is a line in its place elsewhere."""
    if not todo:
        return
    shows_bar = sys.stderr.isatty()
    if says_so and not shows_bar:
        complain(f"compiling {len(todo)} kernels, which takes about a quarter of a minute")
    columns = TextColumn("compiling kernels, once"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True, quiet=not shows_bar)
    with Progress(*columns, console=console, transient=True, disable=not shows_bar) as progress:
        task = progress.add_task("", total=len(todo))
        for _ in ahead.compile_in_processes(todo):
            progress.advance(task)
