"""Where Newton's iteration keeps its matrices in registers."""

from __future__ import annotations

from typing import Any

import torch

from polywhiten.gpu_launches import JOINED, gpu_launches
from polywhiten.torch.triton.newton_in_memory import newton_constants
from polywhiten.torch.triton.support import multiplies_from_shared_memory

_MAX_VARIABLES = 64
_NUM_WARPS = 4  # 8 spill more: 560 bytes of the adjoint's stack instead of 80 (compiled for 9.0, not measured)


def fits_registers(height: int, device: torch.device) -> bool:
    """Return whether programs can iterate in registers; where these also hold all operands, 64 variables take most."""
    return height <= 32 or (height == _MAX_VARIABLES and multiplies_from_shared_memory(device))


def iterates_in_registers(d: int, device: torch.device) -> bool:
    """Return whether kernels that only solve matrices of d variables iterate in registers."""
    return gpu_launches() == JOINED and fits_registers(newton_constants(d)["HEIGHT"], device)


def register_constants(d: int) -> dict[str, Any]:
    """Return the constants and the options of these kernels."""
    constants = newton_constants(d)
    return {**{name: constants[name] for name in ("SMALLEST", "HEIGHT", "num_stages")}, "num_warps": _NUM_WARPS}
