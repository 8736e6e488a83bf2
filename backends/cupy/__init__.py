"""CuPy: the functions of `polywhiten`, with CUDA kernels, on the current device and stream.

Examples
--------
A tensor of another library on the same device comes and goes without a copy::

    x = torch.randn(32, 64, 14, 14, device="cuda")
    y = torch.from_dlpack(polywhiten.cupy.iter_norm(cupy.from_dlpack(x)))
"""

import polywhiten
from polywhiten import *  # noqa: F403
from polywhiten.cupy.backend import BACKEND

__all__ = ["BACKEND"]
__all__ += polywhiten.__all__
