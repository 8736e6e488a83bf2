"""The error of files of embeddings, for readers and writers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FileError(ValueError):
    """A file can't be read or written. The message is one line that names the file and says what would help."""


@contextmanager
def named(path: Path, action: str) -> Iterator[None]:
    """Turn any OSError inside this `with` statement into a FileError, such as "x.npy can't be read (no such file)"."""
    try:
        yield
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error  # pyarrow adds to it
        raise FileError(f"{path} can't be {action} ({why})") from error
