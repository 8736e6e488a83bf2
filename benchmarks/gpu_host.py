"""Measures the time that the host spends on a layer that runs on a GPU: on Python, allocations and launches.

For small layers, the host needs more time to launch them than the device to run them, so the host's time is what
matters. A measurement is a loop of few calls: the device falls behind, but the host doesn't wait for it as long as its
queue of launches isn't full. There are three modes: "eager"; "compiled", by torch.compile; and "reduce-overhead", in
which torch.compile replays CUDA graphs. Each structure of polywhiten's kernels has a separate layer and a separate
compiled function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from timeit import Timer
from typing import Any

import torch
from alternating import Failures, in_turns
from gpu_cases import SUBJECTS, Case, Measured, launches_of, launching, structure_of
from gpu_floors import NUM_GROUPS
from torch import Tensor, nn

from polywhiten.torch import GroupWhitening, IterNorm

CHANNELS, SHAPE = 256, (8, 256, 7, 7)
CALLS = 25  # each has 20 launches or more, and a device's queue holds about a thousand
WARM = 4  # calls that "reduce-overhead" needs to compile, to run once, to record and to replay

COMPILED, REDUCED = "compiled", "reduce-overhead"
MODES = ("eager", COMPILED, REDUCED)
FORWARD, STEP, EVALUATION = "host forward", "host step", "host evaluation"
MEASURES = (FORWARD, STEP, EVALUATION)

Layers = dict[str, nn.Module]


def iter_norm_layers(device: torch.device) -> Layers:
    found: Layers = {name: IterNorm(CHANNELS, device=device) for name in SUBJECTS.values()}
    return found | {"BatchNorm2d": nn.BatchNorm2d(CHANNELS, device=device)}


def bare_iter_norm_layers(device: torch.device) -> Layers:
    """Return layers without weight, bias and running averages, which show the cost of whitening alone."""
    options: dict[str, Any] = {"affine": False, "track_running_stats": False, "device": device}
    found: Layers = {name: IterNorm(CHANNELS, **options) for name in SUBJECTS.values()}
    return found | {"BatchNorm2d": nn.BatchNorm2d(CHANNELS, **options)}


def group_whitening_layers(device: torch.device) -> Layers:
    found: Layers = {name: GroupWhitening(NUM_GROUPS, CHANNELS, device=device) for name in SUBJECTS.values()}
    return found | {"GroupNorm": nn.GroupNorm(NUM_GROUPS, CHANNELS, device=device)}


LAYERS = {
    "IterNorm": iter_norm_layers,
    "IterNorm without affine and averages": bare_iter_norm_layers,
    "GroupWhitening": group_whitening_layers,
}
NOT_COMPILED = "IterNorm without affine and averages"  # compiling takes long, and the other layers are enough


@dataclass(frozen=True, kw_only=True)
class HostCase(Case):
    """A case measured by the host's clock: one of MEASURES, for the entry `layers` of LAYERS."""

    layers: str
    measured: str

    def measure(self, seconds: float, check_time: Callable[[], None]) -> Measured:
        """Measure the host's microseconds for a call."""
        failures = Failures()
        timers: dict[str, Callable[[], float]] = {}
        for name, call in self._calls().items():
            with failures.recorded(name), launches_of(name):
                check_time()
                for _ in range(WARM):
                    call()
                timers[name] = launching(name, partial(host_microseconds, call, self.device))
        # the host's clock varies more than the device's
        return Measured(in_turns(timers, 4 * seconds, failures), failures, is_host=True)

    def compile(self, structure: str) -> None:
        for name, call in self._calls().items():
            if structure_of(name) == structure:
                launching(name, call)()

    def _calls(self) -> dict[str, Callable[[], object]]:
        x, dy = self.draw().requires_grad_(), self.draw()
        calls: dict[str, Callable[[], object]] = {}
        for name, (layer, call) in built_layers(self.layers, self.mode, self.device).items():
            layer.train(self.measured != EVALUATION)
            wanted = [x, *layer.parameters()]
            step = partial(STEPS[self.measured], call, x, wanted, dy)
            calls[name] = marking_step_begin(step) if self.mode == REDUCED else step
        return calls


def host_cases(device: torch.device) -> Iterator[HostCase]:
    for mode in MODES:
        for layers in LAYERS:
            if mode == "eager" or layers != NOT_COMPILED:
                for measured in MEASURES if mode != REDUCED else (FORWARD, STEP):
                    what = f"{layers}, {measured}"
                    yield HostCase(device, what, mode, SHAPE, layout="NCHW", layers=layers, measured=measured)


@lru_cache(maxsize=1)  # consecutive cases have the same layers, and share what is compiled
def built_layers(name: str, mode: str, device: torch.device) -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """Return each competitor's layer, and the function that calls it, which may be compiled."""
    layers = LAYERS[name](device)
    if mode == "eager":
        return {name: (layer, layer) for name, layer in layers.items()}
    torch.compiler.reset()  # otherwise torch.compile gives up after compiling a class about eight times
    options: dict[str, Any] = {"mode": None if mode == COMPILED else mode}
    if device.type != "cuda":
        options = {"backend": "aot_eager"}  # traces without compiling, which would take minutes
    return {name: (layer, torch.compile(layer, fullgraph=True, **options)) for name, layer in layers.items()}


def forward(call: Callable[[Tensor], Tensor], x: Tensor, wanted: list[Tensor], dy: Tensor) -> object:
    return call(x)


def step(call: Callable[[Tensor], Tensor], x: Tensor, wanted: list[Tensor], dy: Tensor) -> object:
    return torch.autograd.grad(call(x), wanted, dy)


def evaluation(call: Callable[[Tensor], Tensor], x: Tensor, wanted: list[Tensor], dy: Tensor) -> object:
    with torch.no_grad():
        return call(x)


STEPS = {FORWARD: forward, STEP: step, EVALUATION: evaluation}


def marking_step_begin(call: Callable[[], object]) -> Callable[[], object]:
    """Return the call so that it first tells CUDA graphs that the results of the last call are no longer needed."""

    def marked_call() -> object:
        torch.compiler.cudagraph_mark_step_begin()
        return call()

    return marked_call


def host_microseconds(call: Callable[[], object], device: torch.device) -> float:
    """Measure the host's microseconds per call over a few calls, none of which waits for the device."""
    calls = CALLS if device.type == "cuda" else 2
    if device.type == "cuda":
        torch.cuda.synchronize()
    microseconds = 1e6 * Timer(call).timeit(calls) / calls
    if device.type == "cuda":
        torch.cuda.synchronize()
    return microseconds
