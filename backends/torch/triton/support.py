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
