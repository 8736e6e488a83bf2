"""Track what a model's normalization layers do to their inputs while it is trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polywhiten import checks
from polywhiten.analysis.conditioning import block_covariances
from polywhiten.analysis.tracking import BATCH_NORM_BLOCK, Record
from polywhiten.blocks import Blocks, ChannelGroups, SampleGroups
from polywhiten.torch._internals import BatchNorm
from polywhiten.torch.masks import unmasked
from polywhiten.torch.modules import GroupWhitening, IterNorm

# How each kind of layer cuts an input, with so many dimensions, into blocks; the first kind that a layer is an instance
# of counts.
_BLOCKS: dict[type[nn.Module], Callable[[Any, int], Blocks]] = {
    IterNorm: lambda layer, ndim: ChannelGroups(layer.axis % ndim, layer.group_size),
    GroupWhitening: lambda layer, ndim: SampleGroups(layer.axis % ndim, layer.num_groups),
    BatchNorm: lambda layer, ndim: ChannelGroups(1, BATCH_NORM_BLOCK),
    nn.GroupNorm: lambda layer, ndim: SampleGroups(1, layer.num_groups),
}
_KINDS: Any = tuple(_BLOCKS)


def _never_compiled(hook: Callable[..., None]) -> Callable[..., None]:
    """Return a hook that is never compiled: a compiled one would run only while it is traced."""
    disabled: Callable[..., None] = torch.compiler.disable(hook)
    return disabled


class Tracking(Record):
    """Rows of measures, and the hooks that take them; a context manager that removes the hooks. `track` returns it.

    Attributes
    ----------
    rows : list of polywhiten.analysis.tracking.Row
    """

    def __init__(self, model: nn.Module, every: int, layers: dict[str, nn.Module], evaluation: bool) -> None:
        super().__init__()
        self._every = every
        self._evaluation = evaluation
        self._step = -1
        self._measuring = False
        self._rows_before = 0
        self._handles = [model.register_forward_pre_hook(self._pass_begins(model))]
        for name, layer in layers.items():
            self._handles.append(
                layer.register_forward_hook(self._layer_done(name or type(layer).__name__, layer), with_kwargs=True)
            )
        self._handles.append(model.register_forward_hook(self._pass_ends(model)))

    def remove(self) -> None:
        """Remove the hooks from the model and keep the rows."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _pass_begins(self, model: nn.Module) -> Callable[..., None]:
        @_never_compiled
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module is not model:  # a deep copy has these hooks too, for example an average of the weights
                return
            counts = module.training or self._evaluation
            self._step += counts
            self._measuring = counts and self._step % self._every == 0
            self._rows_before = len(self.rows)

        return hook

    def _pass_ends(self, model: nn.Module) -> Callable[..., None]:
        @_never_compiled
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if module is not model:
                return
            if self._measuring and len(self.rows) == self._rows_before:
                warnings.warn(
                    "none of the layers to track was called in the model's forward pass: "
                    "call track before the first pass of a compiled model",
                    stacklevel=2,
                )
            self._measuring = False  # checkpoints call layers again in backward, which is no step

        return hook

    def _layer_done(self, name: str, layer: nn.Module) -> Callable[..., None]:
        @_never_compiled
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if self._measuring:
                x = args[0] if args else kwargs.get("x", kwargs.get("input"))  # PyTorch's layers name it `input`
                mask = args[1] if len(args) > 1 else kwargs.get("mask")
                covariances = (_covariances(layer, values, mask) for values in (x, output))
                self._add(self._step, name, type(layer).__name__, *covariances)

        return hook


def track(
    model: nn.Module, every: int = 10, layers: Sequence[str] | None = None, *, evaluation: bool = False
) -> Tracking:
    """Measure what a model's normalization layers do to their inputs while it is trained.

    It tracks `IterNorm`, `GroupWhitening`, and PyTorch's `BatchNorm1d`, `2d` and `3d` (also `SyncBatchNorm`) and
    `GroupNorm`. For the input and the output of each layer it computes the covariance of the blocks that the layer
    normalizes, and of that the condition number, the distance from the identity and the mean absolute correlation: see
    `polywhiten.analysis.tracking.Row`.

    Parameters
    ----------
    model : Module
        Its forward passes in training mode are the steps.
    every : int
        Number of steps from one measurement to the next. The first pass is step 0 and is measured.
    layers : sequence of str, optional
        Names of the layers to track, as in `model.named_modules()`; all by default.
    evaluation : bool
        Whether passes in evaluation mode are steps too.

    Returns
    -------
    Tracking
        Has `rows`, `plot(path)`, `write_csv(path)`, and `remove()`, which a `with` statement calls at its end.

    Raises
    ------
    TypeError
        An argument has the wrong type.
    ValueError
        `every` is below 1, or the model has no such layers.

    Warns
    -----
    UserWarning
        A pass called none of the tracked layers.

    Notes
    -----
    Tracking changes no output, gradient, running average or random number, and `remove` removes all hooks. A step that
    isn't measured costs one call of a hook for each layer. A measured step computes two covariances for each layer and
    waits for the device. Covariances are those of the full batch, in float32 for half precision, else in the
    activations' dtype. In float32, rounding determines condition numbers above about 1e7.

    Call `track` before the first pass of a model that `torch.compile` compiles; its graphs are then broken at the
    tracked layers. A model that has already been compiled doesn't call hooks of its layers, and `track` warns of that.

    Examples
    --------
    >>> import torch
    >>> from polywhiten.torch import IterNorm, track
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), IterNorm(8))
    >>> with track(model, every=2) as tracking:
    ...     for _ in range(3):
    ...         y = model(torch.randn(64, 8))
    >>> [(row.step, row.layer, row.output_condition_number < row.input_condition_number) for row in tracking.rows]
    [(0, '1', True), (2, '1', True)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__module__}.{type(model).__qualname__}: pass a torch.nn.Module")
    every = checks.check_positive("every", every)
    found = {name: module for name, module in model.named_modules() if isinstance(module, _KINDS)}
    return Tracking(model, every, checks.check_layers(layers, found), evaluation)


@torch.no_grad()
def _covariances(layer: nn.Module, x: Any, mask: Tensor | None) -> list[NDArray[np.floating]]:
    """Return the covariances of the blocks that a layer normalizes, as NumPy's arrays.

    `x` is the layer's input or output, and `mask` the one that it was called with.
    """
    blocks = next(blocks(layer, x.ndim) for kind, blocks in _BLOCKS.items() if isinstance(layer, kind))
    if mask is not None:
        x, blocks = unmasked(x, mask, blocks.axis), replace(blocks, axis=1)
    return [cov.cpu().numpy() for cov in block_covariances(x, blocks)]
