"""CuPy: the functions of `polywhiten`, with CUDA kernels, on the current device and stream.

Examples
--------
A tensor of another library on the same device comes and goes without a copy::

    x = torch.randn(32, 64, 14, 14, device="cuda")
    y = torch.from_dlpack(polywhiten.cupy.iter_norm(cupy.from_dlpack(x)))
"""

import array_api_compat.cupy as xp
import cupy

from polywhiten import (
    WhiteningStats,
    apply_whitening,
    group_whiten,
    group_whiten_vjp,
    inverse_sqrt,
    iter_norm,
    iter_norm_vjp,
    whitening_stats,
)
from polywhiten.backend import Backend
from polywhiten.cupy.implementation import CupyImplementation
from polywhiten.cupy.kernels import CupyKernels
from polywhiten.cupy.launcher import CudaLauncher
from polywhiten.kernels import Kernels

# the sources have instructions that AMD's devices, which CuPy has too, don't know
_faster = () if cupy.cuda.runtime.is_hip else (CupyImplementation(CupyKernels(xp, CudaLauncher())),)
BACKEND = Backend(Kernels(xp), *_faster)

__all__ = [
    "BACKEND",
    "WhiteningStats",
    "apply_whitening",
    "group_whiten",
    "group_whiten_vjp",
    "inverse_sqrt",
    "iter_norm",
    "iter_norm_vjp",
    "whitening_stats",
]
