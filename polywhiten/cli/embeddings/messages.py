"""Messages of the estimator in the words of the command line."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from polywhiten.cli.streams import complain

# The options for the estimator's parameters, as its messages name those.
OPTION_NAMES = {
    "n_components": "--components",
    "group_size": "--group-size",
    "iterations": "--iterations",
    "method": "--method",
    "eps": "--eps",
    "shrinkage": "--shrinkage",
    "scale": "--scale",
}


def in_words_of_options(message: str) -> str:
    """Return a message with options in place of parameters, such as --eps 2 for eps=2."""
    for name, option in OPTION_NAMES.items():
        message = re.sub(rf"""\b{name}=['"]?([\w.+-]+)['"]?""", rf"{option} \1", message)
        if "_" in name:  # other names are words, too
            message = message.replace(name, option)
    return message


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Show each warning inside this `with` statement as one line, once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for message in dict.fromkeys(in_words_of_options(str(warning.message)) for warning in caught):
                complain(f"warning: {message}")
