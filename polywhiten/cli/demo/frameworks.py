"""Import what the demo needs: the framework's training module, matplotlib and scikit-learn."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from polywhiten.cli.about import import_without_package, is_installed
from polywhiten.cli.demo.training import Framework
from polywhiten.cli.streams import reason

FRAMEWORKS = ("torch", "keras")


class DependencyError(RuntimeError):
    """Something isn't installed or doesn't work; the message is one line that says how to install it."""


def load(name: str) -> Framework:
    """Return the module that trains in one of `FRAMEWORKS`; raise DependencyError if it can't be imported."""
    extras, quiet_import = f"demo,{name}", cast(AbstractContextManager[None], nullcontext())
    if name == "keras":
        startup = import_without_package("polywhiten.keras", "startup")
        try:
            backend = startup.choose_backend([backend for backend in startup.BACKENDS if is_installed(backend)])
        except ValueError as error:
            raise DependencyError(str(error)) from error
        extras, quiet_import = f"{extras},{backend}", startup.quiet_import(backend)
    with quiet_import:
        return cast(Framework, import_needed(name, f"polywhiten.{name}.demo", extras))


def import_needed(package: str, module: str, extras: str = "demo") -> Any:
    """Import a module that needs an optional package; raise DependencyError if that fails."""
    command = f'pip install "polywhiten[{extras}]"'
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(f"the demo needs {package} ({error}): {command}") from error
    except (Exception, SystemExit) as error:  # a broken installation may raise nearly anything
        again = f"install it again, with {command} for example"
        raise DependencyError(f"{package} is installed but broken ({reason(error)}): {again}") from error
