"""The competitors in PyTorch, which runs eagerly."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import textbook
import torch
from problems import EPS, ITER_NORM, Arrays, Problem
from records import SUBJECT
from textbook import Blocks
from torch import Tensor, nn

from competitors import BATCH_NORM, CONV, DBN, GROUP_NORM, GROUPED_CONV, TEXTBOOK, Framework, Step
from polywhiten.torch import GroupWhitening, IterNorm


def namespace(device: torch.device) -> SimpleNamespace:
    """Return the functions that the textbook uses, for tensors on the device."""
    return SimpleNamespace(
        permute_dims=lambda x, order: x.permute(order).contiguous(),  # as the authors' code does
        reshape=torch.reshape,
        mean=torch.mean,
        sum=torch.sum,
        eye=partial(torch.eye, device=device),
        sqrt=torch.sqrt,
        matrix_transpose=lambda x: x.mT,
        linalg=torch.linalg,
    )


class Textbook(nn.Module):
    """The papers' algorithm with the papers' gradient, in float32 because the recurrence needs it."""

    def __init__(self, channels: int, blocks: Blocks, iterations: int, eps: float, **factory: Any) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(channels, **factory)) for _ in range(2))
        self.options = blocks, iterations, eps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Textbook.apply(x.float(), self.weight.float(), self.bias.float(), *self.options)
        return y.to(x.dtype)


class _Textbook(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, blocks: Blocks, iterations: int, eps: float
    ) -> Tensor:
        y: Tensor
        y, saved = textbook.forward(namespace(x.device), blocks, x, weight, bias, iterations, eps)
        ctx.save_for_backward(*saved)
        ctx.blocks = blocks
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        return *textbook.backward(namespace(dy.device), ctx.blocks, ctx.saved_tensors, dy), None, None, None


class ExactWhitening(nn.Module):
    """Exact whitening, differentiated by PyTorch."""

    def __init__(self, channels: int, blocks: Blocks, eps: float, **factory: Any) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(channels, **factory)) for _ in range(2))
        self.blocks, self.eps = blocks, eps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = textbook.exact(namespace(x.device), self.blocks, x, self.weight, self.bias, self.eps)
        return y


def set_affine(layers: dict[str, Any], weight: Tensor, bias: Tensor) -> None:
    """Give all layers the same weight and bias."""
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)


def train(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Return the output, and the gradients of x, weight and bias."""
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)  # type: ignore[arg-type]


class Torch(Framework):
    """polywhiten's layers, PyTorch's, and the textbook's."""

    PACKAGES = ("torch",)

    def __init__(self, device: str) -> None:
        super().__init__(device)
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("PyTorch has no CUDA device")

    def training(self, problem: Problem, mode: str) -> dict[str, Step]:
        x, dy, weight, bias = self._tensors(problem)
        layers = self._layers(problem, weight, bias)
        return {name: partial(train, layer, x.requires_grad_(), dy) for name, layer in layers.items()}

    def evaluation(self, problem: Problem, mode: str) -> dict[str, Step]:
        x, _, weight, bias = self._tensors(problem)
        layers = self._layers(problem, weight, bias)
        for name in (TEXTBOOK, DBN):  # `textbook.frozen` below replaces the former; with it, DBN would be the same
            del layers[name]
        subject = layers[SUBJECT]
        subject.momentum = 1.0
        subject(x)  # sets the running statistics to those of x
        if problem.is_picture:
            groups = problem.channels // problem.group
            conv = nn.Conv2d(problem.channels, problem.channels, 1, groups=groups, device=x.device)
            layers[GROUPED_CONV] = conv.to(memory_format=self._memory_format(problem))
        arguments = problem_blocks(problem), x, subject.running_mean, subject.running_whitener, weight, bias
        calls = {name: partial(layer.eval(), x) for name, layer in layers.items()}
        calls[TEXTBOOK] = partial(textbook.frozen, namespace(x.device), *arguments)

        def evaluate(call: Step) -> tuple[Tensor]:
            with torch.no_grad():
                return (call(),)

        return {name: partial(evaluate, call) for name, call in calls.items()}

    def products(self, mode: str, channels: int, batch: int, size: int) -> dict[str, Step]:
        conv = nn.Conv2d(channels, channels, 1, device=self.device).to(memory_format=torch.channels_last)
        x = torch.randn(batch, channels, size, size, device=self.device).to(memory_format=torch.channels_last)
        a, b = torch.randn(2, 4 * channels, 4 * channels, device=self.device)

        def convolve() -> tuple[Tensor]:
            with torch.no_grad():
                return (conv(x),)

        return {"convolution": convolve, "matrices": lambda: (a @ b,)}

    def wait(self, result: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def values(self, result: Any) -> list[np.ndarray]:
        return [part.detach().cpu().numpy() for part in result]

    def peak_bytes(self, step: Step) -> int:
        if self.device != "cuda":
            return super().peak_bytes(step)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def kept_bytes(self, problem: Problem) -> dict[str, int]:
        x, _, weight, bias = self._tensors(problem)
        layers = self._layers(problem, weight, bias)
        return {name: _kept(layer, x.requires_grad_()) for name, layer in layers.items()}

    def device_name(self) -> str:
        return torch.cuda.get_device_name()

    def _memory_format(self, problem: Problem) -> torch.memory_format:
        return torch.channels_last if problem.layout == "NHWC" else torch.contiguous_format

    def _tensors(self, problem: Problem) -> list[Tensor]:
        drawn: Arrays = problem.draw()
        tensors = [torch.from_numpy(a).to(self.device) for a in (drawn.x, drawn.dy, drawn.weight, drawn.bias)]
        if problem.layout == "NHWC":
            tensors[:2] = [a.permute(0, 3, 1, 2) for a in tensors[:2]]  # PyTorch's shape is (N, C, H, W) in any layout
        return tensors

    def _layers(self, problem: Problem, weight: Tensor, bias: Tensor) -> dict[str, Any]:
        channels, group, iterations = problem.channels, problem.group, problem.iterations
        device: dict[str, Any] = {"device": self.device}
        blocks = problem_blocks(problem)
        layers: dict[str, Any]
        if problem.what == ITER_NORM:
            batch_norm = nn.BatchNorm2d if problem.is_picture else nn.BatchNorm1d
            layers = {
                SUBJECT: IterNorm(channels, EPS, group_size=group, iterations=iterations, **device),
                BATCH_NORM: batch_norm(channels, EPS, **device),
                DBN: ExactWhitening(channels, blocks, EPS, **device),
            }
        else:
            layers = {
                SUBJECT: GroupWhitening(group, channels, EPS, iterations=iterations, **device),
                GROUP_NORM: nn.GroupNorm(group, channels, EPS, **device),
            }
        layers[TEXTBOOK] = Textbook(channels, blocks, iterations, EPS, **device)
        set_affine(layers, weight, bias)
        if problem.what == ITER_NORM and problem.is_picture:
            conv = nn.Conv2d(channels, channels, 3, padding=1, **device)
            layers[CONV] = conv.to(memory_format=self._memory_format(problem))
        return layers


def problem_blocks(problem: Problem) -> Blocks:
    """Return the problem's blocks with the channels at axis 1, where PyTorch has them in every layout."""
    return Blocks(problem.blocks.per_sample, problem.group)


def _kept(layer: nn.Module, x: Tensor) -> int:
    """Return the bytes that the layer saves for backward in addition to input, output, parameters and buffers."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    for tensor in (x, y, *layer.parameters(), *layer.buffers()):
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(found.values())


FRAMEWORK = Torch
