"""The cases measured by the device's clock: layers on ResNet-50's shapes, inverse square roots, and a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gpu_floors as floors
import torch
from competitors.in_torch import Textbook, set_affine, train
from gpu_cases import COMBINATIONS, DTYPES, SUBJECTS, Shape, sets_larger_than_the_cache
from gpu_clock import MODES, DeviceCase, Inputs, Step
from gpu_floors import BATCH, GROUP_SIZE, NUM_GROUPS, Work
from records import SUBJECT
from textbook import Blocks
from torch import Tensor, nn

import polywhiten as pw
from polywhiten.torch import GroupWhitening, IterNorm

T, EPS = 5, 1e-5
LAYERS = ("IterNorm", "GroupWhitening")
# Eagerly, a layer takes the host's time, which hardly depends on dtype and layout, so one combination is enough.
EAGER = COMBINATIONS[:1]


def shapes(device: torch.device) -> list[Shape]:
    """Return the shapes of ResNet-50's normalization layers, or a small one for a trial on the CPU."""
    if device.type != "cuda":
        return [(4, 64, 6, 6)]
    return [(BATCH, channels, size, size) for channels, size in floors.norm_layers()]


def layer_cases(device: torch.device) -> Iterator[DeviceCase]:
    """Yield cases of forward and backward: eagerly in one combination of dtype and layout, as CUDA graphs in all."""
    for mode in MODES:
        for what in LAYERS:
            for dtype, layout in EAGER if mode == "eager" else COMBINATIONS:
                yield from (layer_case(device, what, mode, shape, dtype, layout) for shape in shapes(device))


def layer_case(device: torch.device, what: str, mode: str, shape: Shape, dtype: str, layout: str) -> DeviceCase:
    def build() -> tuple[dict[str, Step], list[Inputs]]:
        steps = {name: partial(train, layer) for name, layer in layers(what, shape[1], device, DTYPES[dtype]).items()}
        number = sets_larger_than_the_cache(case, arrays=2)
        return steps, [(case.draw().requires_grad_(), case.draw()) for _ in range(number)]

    work = floors.training_work(math.prod(shape), dtype, GROUP_SIZE if what == "IterNorm" else NUM_GROUPS)
    case = DeviceCase(device, what, mode, shape, dtype, layout, work, build=build, same="textbook")
    return case


def layers(what: str, channels: int, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return the competitors by name, all with the same weight and bias."""
    found: dict[str, Any]
    if what == "IterNorm":
        # As in mixed-precision training, parameters and running averages are in float32 for bfloat16 inputs too.
        factory: dict[str, Any] = {"device": device, "dtype": torch.float32}
        found = {
            name: IterNorm(channels, EPS, group_size=GROUP_SIZE, iterations=T, **factory) for name in SUBJECTS.values()
        }
        found["BatchNorm2d"] = nn.BatchNorm2d(channels, EPS, **factory)
        found["textbook"] = Textbook(channels, Blocks(per_sample=False, size=GROUP_SIZE), T, EPS, **factory)
    else:
        # On CUDA, PyTorch's group norm needs parameters of the input's dtype.
        factory = {"device": device, "dtype": dtype}
        found = {name: GroupWhitening(NUM_GROUPS, channels, EPS, iterations=T, **factory) for name in SUBJECTS.values()}
        found["GroupNorm"] = nn.GroupNorm(NUM_GROUPS, channels, EPS, **factory)
        found["textbook"] = Textbook(channels, Blocks(per_sample=True, size=NUM_GROUPS), T, EPS, **factory)
    set_affine(found, torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device))
    return found


def copy_case(device: torch.device) -> DeviceCase:
    """Return a case that shows how much of its bandwidth the device really reaches, for comparison with the floors."""
    shape = (2**28,) if device.type == "cuda" else (2**16,)

    def build() -> tuple[dict[str, Step], list[Inputs]]:
        source, target = torch.randn(2, *shape, device=device)
        return {"PyTorch": target.copy_}, [(source,)]

    return DeviceCase(device, "copy", "eager", shape, work=Work(2 * 4 * math.prod(shape)), build=build)


def eigh_inverse_sqrt(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.rsqrt().unsqueeze(-2) @ vectors.mT


def inverse_sqrt_forward(function: Callable[[Tensor], Tensor], cov: Tensor, _: Tensor) -> Tensor:
    with torch.no_grad():
        return function(cov)


def inverse_sqrt_training(function: Callable[[Tensor], Tensor], cov: Tensor, dw: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(function(cov), cov, dw)
    return gradient


# The step, and how many arrays it reads or writes: S and W in forward, and also S, dW and dS in backward.
INVERSE_SQRT = {"inverse_sqrt": (inverse_sqrt_forward, 2), "inverse_sqrt and gradient": (inverse_sqrt_training, 5)}


def inverse_sqrt_cases(device: torch.device) -> Iterator[DeviceCase]:
    yield from (inverse_sqrt_case(device, what, mode) for what in INVERSE_SQRT for mode in MODES)


def inverse_sqrt_case(device: torch.device, what: str, mode: str) -> DeviceCase:
    shape = (32, 64, 64)
    step, arrays = INVERSE_SQRT[what]

    def build() -> tuple[dict[str, Step], list[Inputs]]:
        functions = {SUBJECT: partial(pw.inverse_sqrt, iterations=T), "eigh": eigh_inverse_sqrt}
        if mode == "graph":
            del functions["eigh"]  # waits for the device to learn whether it converged, which can't be captured
        sets = []
        for _ in range(4):  # so few that they stay in the cache, like the covariance that a layer has just computed
            rows = torch.randn(32, 64, 1024, device=device)
            sets.append(((rows @ rows.mT / 1024).requires_grad_(), torch.randn(shape, device=device)))
        return {name: partial(step, function) for name, function in functions.items()}, sets

    return DeviceCase(device, what, mode, shape, work=Work(arrays * 4 * math.prod(shape)), build=build)
