"""PyTorch as an array API namespace, with the optional functions that the core uses if a namespace has them."""

import torch
from array_api_compat.torch import *  # noqa: F403  # the namespace is all of it
from torch import Tensor


def identity_like(matrices: Tensor) -> Tensor:
    """Return the identity for matrices (..., d, d), with as many dimensions."""
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return identity[(None,) * (matrices.ndim - 2)]


def matrix_transpose(x: Tensor) -> Tensor:
    """Return the transposes of matrices (..., m, n).

    The namespace's own function uses `swapaxes`, which fails for gradients in batches (`is_grads_batched`), and the
    older ONNX exporter doesn't know `mT`.
    """
    return x.transpose(-2, -1)


def widened(x: Tensor) -> Tensor:
    """Return x in float64; on Apple's GPUs, which have no float64, return x itself."""
    return x if x.device.type == "mps" else x.double()


def multiply_add(beta: float, c: Tensor, alpha: float, a: Tensor, b: Tensor) -> Tensor:
    """Return beta c + alpha a b of matrices (..., d, d), computed by one operation."""
    if a.ndim == 3:
        return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)
    flat = (m.reshape(-1, *m.shape[-2:]) for m in (c, a, b))
    return torch.baddbmm(*flat, beta=beta, alpha=alpha).reshape(c.shape)


globals().pop("classes", None)  # torch.classes seems to have every attribute, which confuses doctest's search
