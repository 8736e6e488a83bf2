"""PyTorch as a namespace of the array API, with what the core can use beyond that."""

import torch
from array_api_compat.torch import *  # noqa: F403  # the namespace is all of it
from torch import Tensor


def identity_like(matrices: Tensor) -> Tensor:
    """The identity for matrices (..., d, d), in one call."""
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return identity[(None,) * (matrices.ndim - 2)]


def matrix_transpose(x: Tensor) -> Tensor:
    """X' of matrices (..., m, n).

    `swapaxes`, as the namespace has it, has no rule for gradients in batches, and `mT` none in the older ONNX
    exporter.
    """
    return x.transpose(-2, -1)


def widened(x: Tensor) -> Tensor:
    """X in float64; as it is on Apple's GPUs, which have no float64."""
    return x if x.device.type == "mps" else x.double()


def multiply_add(beta: float, c: Tensor, alpha: float, a: Tensor, b: Tensor) -> Tensor:
    """Beta c + alpha a b of matrices (..., d, d), in one call."""
    if a.ndim == 3:
        return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)
    flat = (m.reshape(-1, *m.shape[-2:]) for m in (c, a, b))
    return torch.baddbmm(*flat, beta=beta, alpha=alpha).reshape(c.shape)


globals().pop("classes", None)  # it claims to have every attribute; tools that look for doctests ask for some
