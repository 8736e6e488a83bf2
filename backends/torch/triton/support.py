"""The devices and the dtypes that the kernels are for."""

from __future__ import annotations

import torch
from torch import Tensor

from polywhiten.torch._internals import assume_constant_result

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_on_supported_device(x: Tensor) -> bool:
    """Return whether x is on a CUDA device with tensor cores for TF32; Triton has no other fast products of float32."""
    return x.is_cuda and _has_tensor_cores(x.device.index)


@assume_constant_result
def _has_tensor_cores(index: int) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(index) >= (8, 0)


def multiplies_from_shared_memory(device: torch.device) -> bool:
    """Return whether tensor cores read tiles of 64 rows from shared memory, as on the large devices from Hopper on.

    These also have more than 200 KB of it for a program, and others, such as devices of 12.0, 99.
    """
    return capability(device)[0] in (9, 10)


@assume_constant_result
def capability(device: torch.device) -> tuple[int, int]:
    """Return 9.0 for Triton's interpreter, which has no device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
