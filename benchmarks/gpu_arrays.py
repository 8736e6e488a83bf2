"""CuPy's arrays and PyTorch's tensors of the same memory, whitened by the same function: forward, and its pullback."""

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
    """CuPy, or NumPy on the CPU; or why there is none."""
    try:
        return import_module("cupy" if device.type == "cuda" else "numpy")
    except ImportError as error:
        return f"CuPy is left out: {error}"


def array_cases(device: torch.device, library: ModuleType) -> Iterator[DeviceCase]:
    """On every third shape, to save time."""
    for mode in MODES:
        for what in (FORWARD, TRAINING):
            yield from (array_case(device, library, what, mode, shape) for shape in shapes(device)[::3])


def array_case(device: torch.device, library: ModuleType, what: str, mode: str, shape: Shape) -> DeviceCase:
    def build() -> tuple[dict[str, Step], list[Inputs]]:
        vectors = [torch.rand(shape[1], device=device) for _ in range(2)]
        number = sets_larger_than_the_cache(case, arrays=2 if what == TRAINING else 1)
        tensors = [(case.draw(), case.draw() if what == TRAINING else None, *vectors) for _ in range(number)]
        sets = [
            (given, tuple(each if each is None else library.from_dlpack(each) for each in given)) for given in tensors
        ]
        return {
            SUBJECT: lambda _, arrays: whitened(*arrays),
            "PyTorch": lambda given, _: whitened(*given),
        }, sets

    def pytorchs_stream() -> AbstractContextManager[Any]:
        """PyTorch's stream of the moment is CuPy's too, also while PyTorch captures what is launched on it."""
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
    """Y; where there is dy, the gradients of x, weight and bias too."""
    given = {"weight": weight, "bias": bias, "group_size": GROUP_SIZE, "iterations": T, "eps": EPS}
    if dy is None:
        return pw.iter_norm(x, **given)
    y, pullback = pw.iter_norm_vjp(x, **given)
    return y, *pullback(dy)
