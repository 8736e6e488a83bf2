"""Tables of rich, as text."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def full_width(table: Table) -> str:
    """Return the table at its full width, so that a narrow terminal wraps its lines instead of cutting them off."""
    console = Console(width=1000)  # which tables don't fill
    with console.capture() as capture:
        console.print(table)
    return capture.get()
