"""Track what the normalization layers of a model do to their inputs during training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import numpy as np
from keras import layers as keras_layers
from keras import ops
from numpy.typing import NDArray

from polywhiten import checks
from polywhiten.analysis.conditioning import block_covariances
from polywhiten.analysis.tracking import BATCH_NORM_BLOCK, Record
from polywhiten.blocks import Blocks, ChannelGroups, SampleGroups
from polywhiten.keras.layers import GroupWhitening, IterNorm

Tensor = Any  # of the backend in use
Covariances = list[NDArray[np.floating]]


def _sample_groups(layer: Any, axis: int, channels: int) -> Blocks:
    return SampleGroups(axis, channels if layer.groups == -1 else layer.groups)


# How each kind of layer cuts an input whose channels are at an axis; the first that fits.
_BLOCKS: dict[type, Callable[[Any, int, int], Blocks]] = {
    IterNorm: lambda layer, axis, channels: ChannelGroups(axis, layer.group_size),
    GroupWhitening: _sample_groups,
    keras_layers.BatchNormalization: lambda layer, axis, channels: ChannelGroups(axis, BATCH_NORM_BLOCK),
    keras_layers.GroupNormalization: _sample_groups,
}
_KINDS: Any = tuple(_BLOCKS)


class WhiteningTracker(Record, keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """Callback that measures what a model's normalization layers do.

    It measures `IterNorm`, `GroupWhitening`, and Keras' `BatchNormalization` and
    `GroupNormalization`, wherever they are in a model of any kind. The measures
    are the condition number of the covariance of each layer's input and output,
    its distance from the identity, and the mean absolute correlation; see
    `polywhiten.analysis.tracking.Row`. Covariances are those of the blocks that
    the layer normalizes.

    A callback can't see what a compiled training step computes inside.
    Therefore it measures a separate batch, which passes through the model as in
    training (layers normalize by it, dropout is active), before training and
    then at regular intervals. This changes neither moving averages nor random
    seeds.

    Args:
        data: A batch of the model's inputs (no targets), as the model itself
            takes them: an array, or a list or dictionary of arrays.
        every: `"epoch"` to measure after every epoch, or an integer, the number
            of batches between two measurements. Defaults to `"epoch"`.
        layers: Optional sequence of the names, `layer.path`, of the layers to
            track. Defaults to all.

    Attributes:
        rows: List of `polywhiten.analysis.tracking.Row`. Their `step` is the
            number of batches trained before, in all calls of `fit()`.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: `every` is below 1; the model has no such layers.

    A measurement costs a forward pass of `data`, outside of compiled code, and
    two covariances a layer. With JAX, the first one takes about as long as
    compiling the model. Covariances are computed in float32 for half precision,
    else in the dtype of the activations; in float32, condition numbers above
    1e7 or so consist of rounding errors. Masked positions are left out for
    layers that leave them out.

    Example:

    >>> import keras, numpy as np
    >>> from polywhiten.keras import IterNorm, WhiteningTracker
    >>> x, y = np.random.normal(size=(64, 8)), np.zeros((64, 1))
    >>> model = keras.Sequential([keras.Input((8,)), IterNorm(), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> tracker = WhiteningTracker(x)
    >>> history = model.fit(x, y, epochs=2, verbose=0, callbacks=[tracker])
    >>> [(row.step, row.output_condition_number < row.input_condition_number) for row in tracker.rows]
    [(0, True), (2, True), (4, True)]
    """

    def __init__(self, data: Any, every: str | int = "epoch", layers: Sequence[str] | None = None) -> None:
        super().__init__()
        self.data = data
        self.every = every
        self._batches: int | None = None
        if every != "epoch":
            self._batches = checks.check_positive("every", every)  # type: ignore[arg-type]  # another string is found out
        self.layers = layers
        self._step = self._begun = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Measure the model as it is."""
        self._measure()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Count batches from the beginning of the epoch."""
        self._begun = self._step

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Measure if another `every` batches are done."""
        # with `steps_per_execution`, Keras has done several, and counts the last ones of an epoch as if all were there
        done = min(batch + 1, self.params["steps"] or batch + 1)
        before, self._step = self._step, self._begun + done
        if self._batches is not None and self._step // self._batches > before // self._batches:
            self._measure()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Measure if that is wanted at the end of every epoch."""
        if self._batches is None:
            self._measure()

    def _measure(self) -> None:
        if self.rows and self.rows[-1].step == self._step:  # the end of one call of `fit` is the next one's beginning
            return
        model = self.model
        if not model.built:  # a subclassed one, before its first step
            model(self.data)
        found = {layer.path: layer for layer in model._flatten_layers() if isinstance(layer, _KINDS)}
        options = {"training": True} if "training" in inspect.signature(model.call).parameters else {}
        with ExitStack() as watches:
            watches.enter_context(_preserved_random_state())
            for name, layer in checks.check_layers(self.layers, found).items():
                watches.enter_context(_watched(layer, self._recorder(name, layer)))
            variables = (
                [v.value for v in group] for group in (model.trainable_variables, model.non_trainable_variables)
            )
            model.stateless_call(*variables, self.data, **options)

    def _recorder(self, name: str, layer: Any) -> Callable[..., None]:
        def record(x: Tensor, y: Tensor, mask: Tensor | None) -> None:
            covariances = (_covariances(values, layer, mask) for values in (x, y))
            self._add(self._step, name, type(layer).__name__, *covariances)

        return record


@contextmanager
def _preserved_random_state() -> Iterator[None]:
    """Restore PyTorch's random state, which Keras' dropout uses beside Keras' own seeds, which are variables."""
    if keras.backend.backend() != "torch":
        yield
        return
    import torch

    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield


@contextmanager
def _watched(layer: Any, record: Callable[..., None]) -> Iterator[None]:
    """Record input, output and mask of every call of the layer inside the `with` statement."""
    call = layer.call

    def watched(inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        outputs = call(inputs, *args, **kwargs)
        record(inputs, outputs, kwargs.get("mask"))
        return outputs

    layer.call = watched
    try:
        yield
    finally:
        del layer.call  # which uncovers the method of the class


def _covariances(x: Tensor, layer: Any, mask: Tensor | None) -> Covariances:
    x = ops.stop_gradient(x)
    axis, channels = layer.axis % len(x.shape), x.shape[layer.axis]
    blocks = next(blocks(layer, axis, channels) for kind, blocks in _BLOCKS.items() if isinstance(layer, kind))
    if mask is not None and isinstance(blocks, ChannelGroups):
        keep = ops.convert_to_numpy(mask).astype(bool)
        full = keras.backend.result_type(x.dtype, "float32")  # NumPy has no bfloat16
        x = np.moveaxis(ops.convert_to_numpy(ops.cast(x, full)), axis, -1)[keep]
        blocks = ChannelGroups(1, blocks.group_size)
    return [np.asarray(ops.convert_to_numpy(cov)) for cov in block_covariances(x, blocks)]
