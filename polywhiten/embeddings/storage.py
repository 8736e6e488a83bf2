"""The state of an estimator in a file: arrays, and one JSON text for the rest. Nothing in it is executed on loading."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polywhiten.embeddings.replacement import replacing

SUFFIXES = (".npz", ".safetensors")
_FORMAT = "polywhiten.Whitening"
_VERSION = 1

Arrays = dict[str, npt.NDArray[Any]]


def write_state(path: str | os.PathLike[str], arrays: Arrays, fields: Mapping[str, Any]) -> None:
    """Write arrays, and fields that JSON can hold; an existing file is replaced at once when all is written."""
    path = _checked_suffix(path)
    text = json.dumps({"format": _FORMAT, "version": _VERSION, **fields})
    safetensors = _safetensors() if path.suffix == ".safetensors" else None
    with replacing(path) as partial:
        if safetensors is None:
            np.savez(partial, allow_pickle=False, json=np.array(text), **arrays)
        else:
            contiguous = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
            partial.write_bytes(safetensors.save(contiguous, {"json": text}))


def read_state(path: str | os.PathLike[str]) -> tuple[Arrays, dict[str, Any]]:
    """Return the arrays and the fields of a file; raise ValueError, with its name, if `write_state` didn't write it."""
    path = _checked_suffix(path)
    try:
        arrays, text = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
        fields = json.loads(text)
        is_known = fields["format"] == _FORMAT and fields["version"] <= _VERSION
    except OSError:
        raise
    except Exception as error:  # each of the two formats has many, safetensors its own class
        raise ValueError(f"{path} has no whitening that `Whitening.save` wrote, or is damaged: {error}") from error
    if not is_known:
        raise ValueError(
            f"{path} has {fields['format']!r} of version {fields['version']}, which this version can't read"
        )
    return arrays, fields


def _read_npz(path: Path) -> tuple[Arrays, str]:
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        arrays = dict(file)
    return arrays, str(arrays.pop("json"))


def _read_safetensors(path: Path) -> tuple[Arrays, str]:
    path.open("rb").close()  # which raises the usual errors of files
    with _safetensors().safe_open(path, "numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()["json"]  # noqa: SIM118  # no dict


def _checked_suffix(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path={str(path)!r} must end with {' or '.join(SUFFIXES)}")
    return path


def _safetensors() -> Any:
    try:
        return import_module("safetensors.numpy")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("files .safetensors need the package safetensors; .npz needs none") from error
