"""Cases that compare CuPy arrays with PyTorch tensors of the same memory, in forward and with the pullback."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType
from typing import Any

import gpu_floors as floors
import torch
from gpu_cases import Shape, sets_larger_than_the_cache
from gpu_clock import MODES, DeviceCase, Inputs, Step
from gpu_floors import GROUP_SIZE
from gpu_layers import EPS, T, shapes
from records import SUBJECT

import polywhiten as pw

FORWARD, TRAINING = "CuPy, forward", "CuPy, forward and pullback"


def array_library(device: torch.device) -> ModuleType | str:
    """Return CuPy, or NumPy for the CPU, or the reason why CuPy isn't available."""
    try:
        return import_module("cupy" if device.type == "cuda" else "numpy")
    except ImportError as error:
        return f"CuPy is skipped: {error}"


def array_cases(device: torch.device, library: ModuleType) -> Iterator[DeviceCase]:
    """Yield the cases of every third shape, to save time."""
    for mode in MODES:
        for what in (FORWARD, TRAINING):
            yield from (array_case(device, library, what, mode, shape) for shape in shapes(device)[::3])


def array_case(device: torch.device, library: ModuleType, what: str, mode: str, shape: Shape) -> DeviceCase:
    def build() -> tuple[dict[str, Step], list[Inputs]]:
        vectors = [torch.rand(shape[1], device=device) for _ in range(2)]
        number = sets_larger_than_the_cache(case, arrays=2 if what == TRAINING else 1)
        tensor_sets = [(case.draw(), case.draw() if what == TRAINING else None, *vectors) for _ in range(number)]
        sets = [
            (tensors, tuple(None if tensor is None else library.from_dlpack(tensor) for tensor in tensors))
            for tensors in tensor_sets
        ]
        return {
            SUBJECT: lambda _, arrays: whitened(*arrays),
            "PyTorch": lambda tensors, _: whitened(*tensors),
        }, sets

    def pytorchs_stream() -> AbstractContextManager[Any]:
        """Make CuPy use PyTorch's current stream, which PyTorch may be capturing."""
        if device.type != "cuda":
            return nullcontext()
        stream: AbstractContextManager[Any] = library.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
        return stream

    count = floors.training_work if what == TRAINING else floors.forward_work
    work = count(math.prod(shape), "float32", GROUP_SIZE)
    case = DeviceCase(
        device, what, mode, shape, "float32", "NCHW", work, build=build, same="PyTorch", context=pytorchs_stream
    )
    return case


def whitened(x: Any, dy: Any, weight: Any, bias: Any) -> Any:
    """Return y and, if there is a dy, the gradients of x, weight and bias."""
    options = {"weight": weight, "bias": bias, "group_size": GROUP_SIZE, "iterations": T, "eps": EPS}
    if dy is None:
        return pw.iter_norm(x, **options)
    y, pullback = pw.iter_norm_vjp(x, **options)
    return y, *pullback(dy)
