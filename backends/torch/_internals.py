"""Everything that relies on private names of PyTorch: its state, and what it has no public name for.

Read in PyTorch 2.13. If another version breaks something, look here first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# The base class of PyTorch's batch normalizations, `SyncBatchNorm` and the lazy ones among them.
BatchNorm: type[nn.Module] = nn.modules.batchnorm._BatchNorm

# Included while `torch.autograd.grad(is_grads_batched=True)` runs backward, by an older vmap than that of `torch.func`.
_OLDER_VMAP: Any = torch._C._parse_dispatch_key("VmapMode")

Function = TypeVar("Function", bound=Callable[..., Any])


def assume_constant_result(function: Function) -> Function:
    """Have torch.compile take what the function returns as a constant, and not trace it; return the function.

    `torch.compiler.assume_constant_result` also imports the compiler, which doubles the time of an import.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def can_bypass_autograd(tensors: Sequence[Tensor]) -> bool:
    """Return whether PyTorch neither records nor transforms operations on these tensors.

    Kernels may then read and write their memory.
    """
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)) and is_readable_memory(
        tensors
    )


def is_readable_memory(tensors: Sequence[Tensor]) -> bool:
    """Return whether tensors are nothing but their memory, so kernels may read it; they may require a gradient.

    Tensors are more than that in the transforms of `torch.func`, while PyTorch traces, with tangents of forward-mode
    differentiation, as subclasses, and when they are negated lazily. Only the transforms matter while Dynamo compiles,
    because its graphs contain the launches of kernels.
    """
    return not is_transforming() and (torch.compiler.is_dynamo_compiling() or _are_plain(tensors))


def is_transforming() -> bool:
    """Return whether a transform of `torch.func`, such as `grad` or `vmap`, is active."""
    return torch._C._are_functorch_transforms_active()


def as_non_view(y: Tensor) -> Tensor:
    """Return y as a non-view tensor, so in-place operations on it are allowed.

    PyTorch forbids them on views that an autograd function returns beside other tensors, so ReLU in place would fail.
    """
    result: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return result


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether no subclass, lazy negation, tangent, tracer, dispatch mode or older vmap changes their meaning."""
    return (
        # as the imaginary part of a conjugate is negated: its memory has the other sign
        all(type(tensor) in (Tensor, nn.Parameter) and not tensor.is_neg() for tensor in tensors)
        and forward_ad._current_level < 0  # -1 outside of `forward_ad.dual_level()`
        and torch._C._get_tracing_state() is None  # `torch.jit.trace`, also for ONNX
        and not torch._C._len_torch_dispatch_stack()  # modes such as `FakeTensorMode`, which `torch.export` uses
        and not torch._C._dispatch_tls_is_dispatch_key_included(_OLDER_VMAP)
        and all(_has_memory(tensor) for tensor in tensors)  # last, because the others say whether there is a pointer
    )


def _has_memory(tensor: Tensor) -> bool:
    """Return whether a tensor has memory; the zeros that PyTorch makes as gradients have none.

    A tensor whose memory was freed is an error, because kernels would read from address 0.
    """
    if tensor.data_ptr() or not tensor.numel():
        return True
    if tensor.is_meta or tensor._is_zerotensor():
        return False
    raise RuntimeError(
        f"a tensor of shape {tuple(tensor.shape)} has no memory, because its storage was resized to 0: outside of its "
        "forward pass, a sharded module's parameters have to be gathered before they are used"
    )
