"""Types of arguments that several commands take, and the error of one that doesn't fit."""

from __future__ import annotations

import click


class Integer(click.IntRange):
    """An integer in a range, which messages and help call an integer, not an "integer range"."""

    name = "integer"


def bad(option: str, message: str) -> click.BadParameter:
    """Return the error of an option's value."""
    return click.BadParameter(message, param_hint=f"'{option}'")
