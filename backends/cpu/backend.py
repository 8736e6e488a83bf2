"""The backend of NumPy's arrays: compiled kernels if Numba is there, plain ones otherwise."""

from __future__ import annotations

from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from polywhiten import checks
from polywhiten._types import Array
from polywhiten.backend import Backend
from polywhiten.cpu import is_available
from polywhiten.kernels import Kernels


class NumPyBackend(Backend):
    """NumPy's arrays."""

    def tensor(self, x: Array, name: str = "x") -> Array:
        """Return x; raise TypeError for subclasses whose operations are others than an array's."""
        if isinstance(x, np.ma.MaskedArray | np.matrix):
            raise checks.wrong_type(x, name, f"a plain array, as numpy.asarray({name}), which ignores a mask")
        return x

    def converted(self, values: Any, name: str, x: Array) -> Array:
        """Return what NumPy's functions convert to an array, unless their result would be of another class."""
        if isinstance(values, np.ndarray):
            return values
        wanted = "a NumPy array, as x is one, or both of one library"
        if hasattr(values, "__array_ufunc__") or hasattr(values, "__array_wrap__"):
            raise checks.wrong_type(values, name, wanted)
        try:
            return np.asarray(values)
        except (TypeError, ValueError) as error:  # JAX's tracers, say
            raise checks.wrong_type(values, name, wanted) from error


def numpy_backend() -> NumPyBackend:
    """Return a backend with the kernels that work here."""
    if not is_available():
        return NumPyBackend(Kernels(xp))
    from polywhiten.cpu.implementation import CpuImplementation
    from polywhiten.cpu.numpy_library import NumPyLibrary

    return NumPyBackend(Kernels(xp), CpuImplementation.over(NumPyLibrary(), Kernels(xp)))


BACKEND = numpy_backend()
