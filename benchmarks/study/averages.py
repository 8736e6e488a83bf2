"""Evaluates one network by several statistics, to find out which of them are the best in evaluation.

IterNorm's own running averages are those of its paper, of whiteners. This module adds running averages of covariances,
taken from the same batches, and the exact statistics of training pictures, computed again when they are needed. None of
them changes training.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from polywhiten.torch import IterNorm, update_stats

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def has_averages(model: nn.Module) -> bool:
    return any(isinstance(part, (IterNorm, *BATCH_NORMS)) for part in model.modules())


class CovarianceAverages(nn.Module):
    """Running averages of the covariances of a network's layers that average whiteners.

    They are the buffers of a second layer beside each of these, which averages covariances and sees the same inputs.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        parts = model.modules()
        self._layers = tuple(part for part in parts if isinstance(part, IterNorm) and part.track == "whitener")
        self.beside = nn.ModuleList(map(_averaging_covariances, self._layers))

    def __bool__(self) -> bool:
        return bool(self._layers)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Average what the network's layers get in training."""
        pairs = zip(self._layers, self.beside, strict=True)
        handles = [layer.register_forward_pre_hook(_seen_by(beside)) for layer, beside in pairs]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Let the network's layers evaluate by the whitener of the average covariance."""
        own = [(layer.running_mean, layer.running_whitener) for layer in self._layers]
        try:
            for layer, beside in zip(self._layers, self.beside, strict=True):
                layer.running_mean, layer.running_whitener = beside.evaluation_statistics()
            yield
        finally:
            for layer, (mean, whitener) in zip(self._layers, own, strict=True):
                layer.running_mean, layer.running_whitener = mean, whitener


@contextmanager
def recomputed(model: nn.Module, batches: Iterable[Tensor]) -> Iterator[None]:
    """Let the network evaluate by the exact statistics of these batches."""
    own = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        update_stats(model, batches)
        yield
    finally:
        for buffer, before in own:
            buffer.copy_(before)


def _averaging_covariances(layer: IterNorm) -> IterNorm:
    return IterNorm(
        layer.num_features,
        layer.eps,
        layer.momentum,
        affine=False,
        group_size=layer.group_size,
        iterations=layer.iterations,
        track="covariance",
    )


def _seen_by(beside: nn.Module) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    @torch.no_grad()
    def hook(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        if layer.training:
            beside(arguments[0])

    return hook
