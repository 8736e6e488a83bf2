"""Find the backend of an array by the array's type, and import it when its arrays first arrive."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from typing import Any

import numpy.typing as npt

from polywhiten import checks
from polywhiten._types import Array, Namespace
from polywhiten.backend import Backend, namespace_of
from polywhiten.kernels import Kernels

# Top-level module of the array's class: the module whose BACKEND serves it. The array API alone serves all others.
BACKENDS = {
    "numpy": "polywhiten.cpu.backend",
    "torch": "polywhiten.torch",
    "cupy": "polywhiten.cupy",
    "tensorflow": "polywhiten.tensorflow",
    "dask": "polywhiten.dask",
    "jax": "polywhiten.jax",  # tracers
    "jaxlib": "polywhiten.jax",  # arrays
}


def backend_of(x: Array, name: str = "x") -> Backend:
    """Return the backend that serves x; raise TypeError, with the argument's name, if x is no array."""
    module = framework_module(type(x))
    if module is not None:
        backend: Backend = sys.modules[module].BACKEND
        return backend
    xp = namespace_of(x)
    if xp is None:
        raise checks.wrong_type(x, name, f"an array, for example numpy.asarray({name})")
    return _plain_backend(xp)


def checked_input(x: Array, axis: int, first_axis: int = 0) -> tuple[Backend, Array, int]:
    """Return the backend of x, x as a tensor, and its channel axis counted from the front."""
    backend = backend_of(x)
    x = backend.tensor(x)
    checks.check_array(backend.kernels.xp, x)
    return backend, x, checks.check_channel_axis(x, axis, first_axis)


class _PlainBackend(Backend):
    """The array API's kernels alone, for a library that has no backend."""

    def to_numpy(self, x: Array) -> npt.NDArray[Any]:
        """Return an array of NumPy; the library's default device is the one that NumPy can read, if any is."""
        return super().to_numpy(x.to_device(self.kernels.xp.__array_namespace_info__().default_device()))


@cache
def _plain_backend(xp: Namespace) -> Backend:
    return _PlainBackend(Kernels(xp))


def framework_module(cls: type) -> str | None:
    """Return the name of the imported module that serves arrays of `cls`; None if no library of `BACKENDS` does."""
    for base in cls.__mro__:
        module = BACKENDS.get(base.__module__.partition(".")[0])
        if module is not None:
            return importlib.import_module(module).__name__
    return None
