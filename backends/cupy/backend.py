"""CuPy's backend: joined launches if these are wanted, then separate ones, then plain CuPy."""

from __future__ import annotations

import array_api_compat.cupy as xp
import cupy

from polywhiten.backend import Backend
from polywhiten.cupy.implementation import JoinedImplementation, SeparateImplementation
from polywhiten.cupy.kernels import CupyKernels
from polywhiten.cupy.launcher import CudaLauncher
from polywhiten.kernels import Kernels


def cupy_backend() -> Backend:
    """Return a backend with the kernels that the devices have; CuPy also supports AMD's, which don't know CUDA's."""
    if cupy.cuda.runtime.is_hip:
        return Backend(Kernels(xp))
    kernels = CupyKernels(xp, CudaLauncher())
    return Backend(Kernels(xp), JoinedImplementation(kernels), SeparateImplementation(kernels))


BACKEND = cupy_backend()
