"""Write a file beside its final name, which it gets at once when it is complete."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file, which replaces `path` at the end of this `with` statement.

    If the statement ends with an error, the new file is removed, and what `path` had before stays.
    """
    partial = _partial(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def check_replaceable(path: Path) -> None:
    """Raise OSError if `replacing` can't write, for those who would learn it after hours of work."""
    partial = _partial(path)
    partial.touch(exist_ok=False)
    partial.unlink()


def _partial(path: Path) -> Path:
    """Return the path of a new file; raise FileNotFoundError if its folder doesn't exist."""
    if not path.parent.is_dir():  # otherwise the error would name the new file
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial{path.suffix}")
