"""Train the demo's network in Keras, by `fit` and with Keras' progress bar, on the backend in use."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from numpy.typing import NDArray

from polywhiten.cli.demo.data import Data
from polywhiten.cli.demo.training import (
    DBN_GROUP_SIZE,
    MOMENTUM,
    NUM_GROUPS,
    Epoch,
    Settings,
    batches,
    convolutions,
    steps_per_epoch,
)
from polywhiten.keras.layers import GroupWhitening, IterNorm

BACKEND = keras.backend.backend()
TITLE = f"Keras on {BACKEND}"
SHOWS_PROGRESS = True

# PyTorch's defaults, which differ from Keras', so that results of the two frameworks can be compared.
EPSILON = 1e-5
AVERAGING = 0.9  # in PyTorch 0.1, the weight of the newest batch

LAYERS: dict[str, Callable[[], Any]] = {
    "bn": lambda: layers.BatchNormalization(epsilon=EPSILON, momentum=AVERAGING),
    "gn": lambda: layers.GroupNormalization(NUM_GROUPS, epsilon=EPSILON),
    "iternorm": lambda: IterNorm(epsilon=EPSILON, momentum=AVERAGING),
    "gw": lambda: GroupWhitening(NUM_GROUPS, epsilon=EPSILON),
    "dbn": lambda: IterNorm(
        epsilon=EPSILON, method="eigh", group_size=DBN_GROUP_SIZE, track="covariance", momentum=AVERAGING
    ),
}

TEST_BATCH = 500


def check_device(device: str) -> None:
    """Raise ValueError, with a message of one line, if the backend can't compute on the device."""
    try:
        with _device(device):
            ops.convert_to_numpy(ops.ones(1) + ops.ones(1))
        kind, _, index = device.lower().partition(":")
        if kind == "cpu" and index not in ("", "0"):  # with PyTorch, Keras would fail later, in training
            raise ValueError("there is only one")
        # TensorFlow computes on another device instead of raising an error
        if BACKEND == "tensorflow" and f"{kind}:{index or 0}" not in keras.distribution.list_devices(kind):
            raise ValueError("there is none")
    except Exception as error:  # each backend raises errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{TITLE} can't compute on {device!r} ({reason}): use cpu, or gpu:0 if there is one"
        ) from error


def _device(name: str) -> Any:
    """Return a context in which Keras computes on the device."""
    return keras.device("cpu" if name == "cpu:0" else name)  # with PyTorch, Keras doesn't train on cpu:0


def network(norm: str, data: Data, seed: int) -> Any:
    """Return convolutions, each followed by a norm and ReLU, then the mean over the map and a linear layer."""
    _, height, width, channels = data.x_train.shape
    layout = {"data_format": "channels_last"}  # the user may have configured another default
    weights = np.random.default_rng(seed)

    def uniform(fan_in: int) -> Callable[..., Any]:
        """Return PyTorch's initializer, drawing numbers by NumPy so that they are the same on every backend."""
        bound = fan_in**-0.5
        return lambda shape, dtype=None: ops.convert_to_tensor(weights.uniform(-bound, bound, shape), dtype=dtype)

    model = keras.Sequential([keras.Input((height, width, channels))])
    for outputs, halve in convolutions(height, width):
        first = uniform(9 * channels)
        model.add(layers.Conv2D(outputs, 3, padding="same", use_bias=False, kernel_initializer=first, **layout))
        model.add(LAYERS[norm]())
        model.add(layers.ReLU())
        if halve:
            model.add(layers.MaxPooling2D(**layout))
        channels = outputs
    model.add(layers.GlobalAveragePooling2D(**layout))
    first = uniform(channels)
    model.add(layers.Dense(data.classes, kernel_initializer=first, bias_initializer=first))
    return model


def train(norm: str, data: Data, settings: Settings, step_done: Callable[[], None]) -> Iterator[Epoch]:
    """Train with stochastic gradient descent; see `polywhiten.cli.demo.training.Framework.train`."""
    steps = settings.epochs * steps_per_epoch(data, settings)
    with _device(settings.device):
        model = network(norm, data, settings.seed)
        schedule = keras.optimizers.schedules.CosineDecay(settings.lr, steps)
        model.compile(
            optimizer=keras.optimizers.SGD(schedule, momentum=MOMENTUM),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=[keras.metrics.SparseCategoricalAccuracy("accuracy")],
        )
    for epoch in range(1, settings.epochs + 1):
        watch = _Watch(step_done)
        with _device(settings.device):
            history = model.fit(
                _Batches(data.x_train, data.y_train, batches(data, settings, epoch)),
                shuffle=False,
                initial_epoch=epoch - 1,
                epochs=settings.epochs,
                validation_data=(data.x_test, data.y_test),
                validation_batch_size=TEST_BATCH,
                callbacks=[watch],
                verbose=1 if sys.stdout.isatty() else 0,
            ).history
        (loss,), (test_loss,), (accuracy,) = (history[name] for name in ("loss", "val_loss", "val_accuracy"))
        result = Epoch(norm, epoch, loss, test_loss, accuracy, 1000 * median(watch.seconds))
        yield result
        if result.diverged:
            return


class _Batches(keras.utils.PyDataset):  # type: ignore[misc]  # Keras has no types
    """The batches of an epoch, in their order."""

    def __init__(self, x: NDArray[np.float32], y: NDArray[np.int64], batches: list[NDArray[np.int64]]) -> None:
        super().__init__()
        self._x, self._y, self._batches = x, y, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        chosen = self._batches[index]
        return self._x[chosen], self._y[chosen]


class _Watch(keras.callbacks.Callback):  # type: ignore[misc]
    """Measure the times of the steps of one epoch, and end it if the loss isn't finite any more.

    `keras.callbacks.TerminateOnNaN` would do the latter, but prints a line even without a terminal.
    """

    def __init__(self, step_done: Callable[[], None]) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._step_done = step_done

    def on_train_batch_begin(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self.seconds.append(time.perf_counter() - self._start)  # of the complete step, as Keras has waited for the loss
        self._step_done()
        if logs is not None and not math.isfinite(logs["loss"]):
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.model.stop_training = True  # the next call of `fit` continues the training
