"""The frameworks that the demo trains in: looked for, and imported with a backend that is installed."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import cast

from polywhiten.cli.demo.training import Framework
from polywhiten.cli.info import is_installed
from polywhiten.cli.streams import reason

FRAMEWORKS = ("torch", "keras")
KERAS_BACKENDS = ("tensorflow", "jax", "torch")  # that train, in the order of preference


class FrameworkError(RuntimeError):
    """What is missing, in one line that says how to get it."""


def load(name: str) -> Framework:
    """The module that trains in a framework of `FRAMEWORKS`; FrameworkError where it can't be imported."""
    extras = name
    quieted: AbstractContextManager[None] = nullcontext()
    if name == "keras":
        backend = os.environ["KERAS_BACKEND"] = _keras_backend()
        extras = f"keras,{backend}"
        if backend == "tensorflow" and "TF_CPP_MIN_LOG_LEVEL" not in os.environ:
            os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
            logging.getLogger("tensorflow").setLevel(logging.ERROR)  # a graph a network is no reason for a warning
            quieted = _no_standard_error()  # TensorFlow 2.21 logs at its import whatever the level
    try:
        with quieted:
            return cast(Framework, importlib.import_module(f"polywhiten.{name}.demo"))
    except ImportError as error:
        raise FrameworkError(f'the demo needs {name} ({error}): pip install "polywhiten[demo,{extras}]"') from error
    except (Exception, SystemExit) as error:  # an installation that is broken raises nearly anything
        again = f'install it again, with pip install "polywhiten[demo,{extras}]" for example'
        raise FrameworkError(f"{name} is installed but broken ({reason(error)}): {again}") from error


def _keras_backend() -> str:
    """The one that Keras is configured to use, if it is installed; otherwise the first that is."""
    named = os.environ.get("KERAS_BACKEND")
    installed = [name for name in KERAS_BACKENDS if is_installed(name)]
    if named and named not in KERAS_BACKENDS:
        raise FrameworkError(f"Keras doesn't train on {named!r}: set KERAS_BACKEND to {_either(KERAS_BACKENDS)}")
    if named and named not in installed:
        raise FrameworkError(
            f'Keras needs {named}, which KERAS_BACKEND names: pip install "polywhiten[demo,keras,{named}]"'
            + (f", or set it to {_either(installed)}" if installed else "")
        )
    if not installed:
        raise FrameworkError(
            f'Keras needs {_either(KERAS_BACKENDS)}: pip install "polywhiten[demo,keras,tensorflow]" for example'
        )
    wanted = named or _configured_keras_backend()
    return wanted if wanted in installed else installed[0]


def _configured_keras_backend() -> str:
    """What keras.json names. Keras writes one with its default when it is first imported, installed or not."""
    file = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser() / "keras.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["backend"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""


@contextmanager
def _no_standard_error() -> Iterator[None]:
    """Nothing gets to file descriptor 2, which libraries write to without Python's knowledge."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def _either(names: tuple[str, ...] | list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
