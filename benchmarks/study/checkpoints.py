"""Keeps the state of a run in a file that is complete at any time."""

import os
from pathlib import Path
from typing import Any

import torch


def save(path: Path | None, state: dict[str, Any]) -> None:
    """Replace the file as a whole, so that a process that is killed meanwhile leaves the old state."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        torch.save(state, new)
        os.replace(new, path)


def load(path: Path | None, device: str) -> dict[str, Any] | None:
    """Return the state, or None if none was saved."""
    if path is None or not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state


def remove(path: Path | None) -> None:
    if path is not None:
        path.unlink(missing_ok=True)
