"""Read what backends say of themselves in their files about.py, without importing a framework."""

from __future__ import annotations

from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from typing import Any, Protocol, cast

from polywhiten.dispatch import BACKENDS

# The folders of backends; those that `dispatch` doesn't name have no arrays of their own.
FOLDERS = tuple(
    dict.fromkeys([*(module.split(".")[1] for module in BACKENDS.values()), "keras", "flax", "onnx", "faiss"])
)


class About(Protocol):
    """The file about.py of a backend.

    Attributes
    ----------
    MODULE : str
        The framework, as it is imported.
    TITLE : str
        The framework, as users write it.
    EXTRAS : tuple of str
        The extras of the package `polywhiten` that install the framework; one of them is enough.
    """

    MODULE: str
    TITLE: str
    EXTRAS: tuple[str, ...]

    def devices(self) -> list[str]:
        """Return the devices that the framework sees; only this function imports it."""


def about(folder: str) -> About:
    """Return what the backend in a folder says of itself."""
    return cast(About, import_without_package(f"polywhiten.{folder}", "about"))


def is_installed(module: str) -> bool:
    spec = find_spec(module)
    return spec is not None and spec.origin is not None  # a folder without a package has a spec too, but no origin


def import_without_package(package: str, name: str) -> Any:
    """Import a module of a package, but not the package, which would import a framework."""
    parent = find_spec(package)
    spec = parent and PathFinder.find_spec(f"{package}.{name}", parent.submodule_search_locations)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{package} has no file {name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
