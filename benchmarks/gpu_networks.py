"""Measures time and memory of training steps of torchvision's ResNet-50 with each normalization layer on a GPU.

The batch has 64 images of 224 x 224, the optimizer is SGD with momentum, and the loss is cross entropy. As in training
scripts, cuDNN chooses its convolutions by trying some. The network runs eagerly in float32 with both memory layouts,
and in bfloat16 by autocast with channels last, the usual layout for it. torch.compile takes long for so deep a network,
so only bfloat16 is compiled, with IterNorm and batch normalization, after everything else. On the CPU, a network of
three layers replaces it for a trial of the script.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from alternating import Failures, in_turns
from gpu_cases import COMBINATIONS, DTYPES, LAYOUTS, SUBJECTS, Case, Measured, launches_of, launching, structure_of
from gpu_clock import milliseconds
from gpu_floors import BATCH, NUM_GROUPS
from torch import Tensor, nn

from polywhiten.torch import GroupWhitening, IterNorm

COMPILED = "compiled"
EAGER = [pair for pair in COMBINATIONS if pair != ("bfloat16", "NCHW")]
TO_COMPILE = ("bfloat16", "channels_last")
SHAPE, CLASSES = (BATCH, 3, 224, 224), 1000
SMALL_SHAPE = (4, 3, 8, 8)  # on the CPU
WARM, STEPS = 3, 2  # steps before a measurement, and in it
TRIED_CONVOLUTIONS = 3  # algorithms that cuDNN tries for each; its default of 10 takes 20 seconds per dtype and layout

NormLayer = Callable[[int], nn.Module]
Step = Callable[[], Tensor]

# The competitors in each network: polywhiten's layer, and the name and class of the layer that it replaces.
NETWORKS: dict[str, tuple[NormLayer, tuple[str, NormLayer]]] = {
    "ResNet-50 with IterNorm": (IterNorm, ("BatchNorm2d", nn.BatchNorm2d)),
    "ResNet-50 with GroupWhitening": (
        partial(GroupWhitening, NUM_GROUPS),
        ("GroupNorm", partial(nn.GroupNorm, NUM_GROUPS)),
    ),
}


@dataclass(frozen=True, kw_only=True)
class NetworkCase(Case):
    """A network with each of the competitors' layers."""

    make: Callable[[NormLayer], nn.Module]

    def measure(self, seconds: float, check_time: Callable[[], None]) -> Measured:
        """Measure the milliseconds and the peak memory of a training step."""
        if self.mode == COMPILED:
            torch.compiler.reset()  # otherwise torch.compile gives up after compiling a class about eight times
        failures = Failures()
        steps: dict[str, Step] = {}
        peaks: dict[str, int] = {}
        with self._convolutions_tried():
            for name, layer in self._layers().items():
                with failures.recorded(name), launches_of(name):
                    check_time()
                    before = self._allocated()
                    steps[name] = launching(name, self._step(layer))
                    peaks[name] = self._warm_peak(steps[name]) - before
            timers = {name: partial(self._milliseconds, step) for name, step in steps.items() if name not in failures}
            return Measured(in_turns(timers, seconds, failures), failures, peaks if self.on_cuda else {})

    def compile(self, structure: str) -> None:
        for name, layer in self._layers().items():
            if structure_of(name) == structure:
                launching(name, self._step(layer))()

    def _layers(self) -> dict[str, NormLayer]:
        ours, (name, theirs) = NETWORKS[self.what]
        return {name: theirs} | dict.fromkeys(SUBJECTS.values(), ours)

    def _step(self, layer: NormLayer) -> Step:
        torch.manual_seed(0)
        network = self.make(layer).to(self.device, memory_format=LAYOUTS[self.layout])
        optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
        call: Callable[[Tensor], Tensor] = network
        if self.mode == COMPILED:
            options: dict[str, Any] = {} if self.on_cuda else {"backend": "aot_eager"}
            call = torch.compile(network, fullgraph=True, **options)
        x = torch.randn(self.shape, device=self.device).contiguous(memory_format=LAYOUTS[self.layout])
        target = torch.randint(CLASSES, self.shape[:1], device=self.device)

        def step() -> Tensor:
            with torch.autocast(self.device.type, DTYPES["bfloat16"], enabled=self.dtype == "bfloat16"):
                loss = nn.functional.cross_entropy(call(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        return step

    def _milliseconds(self, step: Step) -> float:
        step()  # so that the measured steps find the memory that this one freed, and not what another network left
        return milliseconds(step, STEPS, self.device) / STEPS

    def _warm_peak(self, step: Step) -> int:
        """Return the peak of allocated bytes in a warm step, or 0 on the CPU."""
        for _ in range(WARM):
            step()
        if not self.on_cuda:
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        loss = step()
        if not loss.isfinite():
            raise ArithmeticError(f"the loss is {loss.item()} after {WARM + 1} steps")
        return torch.cuda.max_memory_allocated()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.on_cuda else 0

    def _convolutions_tried(self) -> AbstractContextManager[None]:
        if not self.on_cuda:
            return nullcontext()
        tried: AbstractContextManager[None] = torch.backends.cudnn.flags(
            enabled=True, benchmark=True, benchmark_limit=TRIED_CONVOLUTIONS
        )
        return tried


def network_cases(device: torch.device, make: Callable[[NormLayer], nn.Module]) -> Iterator[NetworkCase]:
    shape = SHAPE if device.type == "cuda" else SMALL_SHAPE
    for dtype, layout in EAGER:
        for what in NETWORKS:
            yield NetworkCase(device, what, "eager", shape, dtype, layout, make=make)
    yield NetworkCase(device, next(iter(NETWORKS)), COMPILED, shape, *TO_COMPILE, make=make)


def maker(device: torch.device) -> Callable[[NormLayer], nn.Module] | str:
    """Return the function that makes a network with a normalization layer, or the reason why there is none."""
    if device.type != "cuda":
        return small_network
    try:
        resnet = import_module("torchvision.models").resnet50
    except (ImportError, RuntimeError) as error:  # RuntimeError if torchvision was built for another PyTorch
        return f"ResNet-50 is skipped because torchvision can't be imported: {error}"
    return lambda layer: resnet(norm_layer=layer)


def small_network(layer: NormLayer) -> nn.Module:
    convolution = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return nn.Sequential(
        convolution, layer(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)
    )
