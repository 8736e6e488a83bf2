"""The backends of a checkout, where they lie beside the package instead of in it."""

from __future__ import annotations

from pathlib import Path


def backends_beside(package: Path) -> list[str]:
    """The folder `backends` of the checkout that the package's folder is in; none where it is installed.

    Python that is started at a checkout's root finds the folder `polywhiten` there before any installed package, and
    that folder has no backends, which packaging puts into it.
    """
    root = package.resolve().parent
    backends, project = root / "backends", root / "pyproject.toml"
    if not (backends.is_dir() and project.is_file()):
        return []
    # another project may have copied the package, and have backends of its own
    is_ours = 'name = "polywhiten"' in project.read_text(encoding="utf-8", errors="replace").splitlines()
    return [str(backends)] if is_ours else []
