"""What the command line does before it imports Keras: choose a backend, and keep TensorFlow's start quiet.

Keras reads its backend when it is imported, so this module imports neither Keras nor another module of this package.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

BACKENDS = ("tensorflow", "jax", "torch")  # those that train, in order of preference


def choose_backend(installed: Sequence[str]) -> str:
    """Make Keras use the backend that it is configured for, or the first installed one; return its name.

    Parameters
    ----------
    installed : sequence of str
        Those of `BACKENDS` that are installed.

    Raises
    ------
    ValueError
        No backend is installed, or KERAS_BACKEND names one that isn't or can't train.
    """
    named = os.environ.get("KERAS_BACKEND")
    if named and named not in BACKENDS:
        raise ValueError(f"Keras doesn't train on {named!r}: set KERAS_BACKEND to {_either(BACKENDS)}")
    if named and named not in installed:
        message = f'Keras needs {named}, which KERAS_BACKEND names: pip install "polywhiten[demo,keras,{named}]"'
        raise ValueError(f"{message}, or set it to {_either(installed)}" if installed else message)
    if not installed:
        raise ValueError(
            f'Keras needs {_either(BACKENDS)}: pip install "polywhiten[demo,keras,tensorflow]" for example'
        )
    wanted = named or _configured_backend()
    backend = os.environ["KERAS_BACKEND"] = wanted if wanted in installed else installed[0]
    return backend


@contextmanager
def quiet_import(backend: str) -> Iterator[None]:
    """Import Keras inside this `with` statement without the messages that TensorFlow logs when it is imported."""
    if backend != "tensorflow" or "TF_CPP_MIN_LOG_LEVEL" in os.environ:  # the user has chosen what to see
        yield
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it warns of every new network's graph
    with _no_standard_error():  # TensorFlow 2.21 logs while it is imported, whatever the level
        yield


def _configured_backend() -> str:
    """Return the backend in keras.json, which Keras writes when first imported: its default may not be installed."""
    file = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser() / "keras.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["backend"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""


@contextmanager
def _no_standard_error() -> Iterator[None]:
    """Redirect file descriptor 2, which libraries in C++ write to directly, to the null device."""
    sys.stderr.flush()
    original = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(original, 2)
        os.close(original)


def _either(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
