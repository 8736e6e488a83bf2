"""What a layer costs the host on a GPU: Python, allocations and launches, by the host's clock.

Small layers take the device less time than the host needs to launch them, so this is what a network of them waits for.
A measurement is a loop of few calls: the device falls behind, and as long as its queue of launches isn't full, nobody
waits for it. Three modes: "eager"; "compiled" by torch.compile; and "reduce-overhead", which has torch.compile replay
CUDA graphs. Each structure of polywhiten's kernels has its own layer and its own compiled function.
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
CALLS = 25  # of some 20 launches and more each: a device's queue takes about a thousand
WARM = 4  # what "reduce-overhead" needs to compile, to run once, to record and to replay

COMPILED, REDUCED = "compiled", "reduce-overhead"
MODES = ("eager", COMPILED, REDUCED)
FORWARD, STEP, EVALUATION = "host forward", "host step", "host evaluation"
MEASURES = (FORWARD, STEP, EVALUATION)

Layers = dict[str, nn.Module]


def iter_norm_layers(device: torch.device) -> Layers:
    found: Layers = {name: IterNorm(CHANNELS, device=device) for name in SUBJECTS.values()}
    return found | {"BatchNorm2d": nn.BatchNorm2d(CHANNELS, device=device)}


def bare_iter_norm_layers(device: torch.device) -> Layers:
    """Without weight, bias and running averages: what whitening alone costs."""
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
NOT_COMPILED = "IterNorm without affine and averages"  # compilation takes long, and the others say as much


@dataclass(frozen=True, kw_only=True)
class HostCase(Case):
    """One of MEASURES of the LAYERS of a name."""

    layers: str
    measured: str

    def measure(self, seconds: float, check_time: Callable[[], None]) -> Measured:
        """Microseconds of the host for a call."""
        failures = Failures()
        timers: dict[str, Callable[[], float]] = {}
        for name, call in self._calls().items():
            with failures.kept(name), launches_of(name):
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
            calls[name] = beginning(step) if self.mode == REDUCED else step
        return calls


def host_cases(device: torch.device) -> Iterator[HostCase]:
    for mode in MODES:
        for layers in LAYERS:
            if mode == "eager" or layers != NOT_COMPILED:
                for measured in MEASURES if mode != REDUCED else (FORWARD, STEP):
                    what = f"{layers}, {measured}"
                    yield HostCase(device, what, mode, SHAPE, layout="NCHW", layers=layers, measured=measured)


@lru_cache(maxsize=1)  # the cases of the same layers follow one another, and share what is compiled
def built_layers(name: str, mode: str, device: torch.device) -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """Each competitor's layer, and what calls it."""
    layers = LAYERS[name](device)
    if mode == "eager":
        return {name: (layer, layer) for name, layer in layers.items()}
    torch.compiler.reset()  # it counts how often a class is compiled, and gives up after some eight times
    options: dict[str, Any] = {"mode": None if mode == COMPILED else mode}
    if device.type != "cuda":
        options = {"backend": "aot_eager"}  # traced all the same, and nothing is compiled, which would take minutes
    return {name: (layer, torch.compile(layer, fullgraph=True, **options)) for name, layer in layers.items()}


def forward(call: Callable[[Tensor], Tensor], x: Tensor, wanted: list[Tensor], dy: Tensor) -> object:
    return call(x)


def step(call: Callable[[Tensor], Tensor], x: Tensor, wanted: list[Tensor], dy: Tensor) -> object:
    return torch.autograd.grad(call(x), wanted, dy)


def evaluation(call: Callable[[Tensor], Tensor], x: Tensor, wanted: list[Tensor], dy: Tensor) -> object:
    with torch.no_grad():
        return call(x)


STEPS = {FORWARD: forward, STEP: step, EVALUATION: evaluation}


def beginning(call: Callable[[], object]) -> Callable[[], object]:
    """The call, after CUDA graphs are told that nobody needs the results of the one before."""

    def begun() -> object:
        torch.compiler.cudagraph_mark_step_begin()
        return call()

    return begun


def host_microseconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one of a few calls, none of which waits for the device."""
    calls = CALLS if device.type == "cuda" else 2
    if device.type == "cuda":
        torch.cuda.synchronize()
    microseconds = 1e6 * Timer(call).timeit(calls) / calls
    if device.type == "cuda":
        torch.cuda.synchronize()
    return microseconds
