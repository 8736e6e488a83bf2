"""CuPy's backend: joined launches if these are wanted, then separate ones, then plain CuPy."""

from __future__ import annotations

from typing import Any

import array_api_compat.cupy as xp
import cupy
import numpy.typing as npt

from polywhiten._types import Array
from polywhiten.backend import Backend
from polywhiten.cupy.implementation import JoinedImplementation, SeparateImplementation
from polywhiten.cupy.kernels import CupyKernels
from polywhiten.cupy.launcher import CudaLauncher
from polywhiten.kernels import Kernels


class CupyBackend(Backend):
    """CuPy's implementations, and copies to the memory of the CPU."""

    def to_numpy(self, x: Array) -> npt.NDArray[Any]:
        """Return an array of NumPy."""
        values: npt.NDArray[Any] = cupy.asnumpy(x)
        return values


def cupy_backend() -> Backend:
    """Return a backend with the kernels that the devices have; CuPy also supports AMD's, which don't know CUDA's."""
    if cupy.cuda.runtime.is_hip:
        return CupyBackend(Kernels(xp))
    kernels = CupyKernels(xp, CudaLauncher())
    return CupyBackend(Kernels(xp), JoinedImplementation(kernels), SeparateImplementation(kernels))


BACKEND = cupy_backend()
