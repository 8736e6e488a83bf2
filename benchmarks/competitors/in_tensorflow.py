"""The competitors in TensorFlow, as a graph and compiled by XLA."""

import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import textbook
from problems import EPS, ITER_NORM, Problem
from records import SUBJECT

import polywhiten as pw
from competitors import CONV, DBN, SAME_TRAFFIC, TEXTBOOK, Framework, Step, subject

Layer = Callable[[Any, Any, Any], Any]

NAMESPACE = SimpleNamespace(  # the functions that the textbook uses
    permute_dims=tf.transpose,
    reshape=tf.reshape,
    mean=tf.reduce_mean,
    sum=tf.reduce_sum,
    eye=tf.eye,
    sqrt=tf.sqrt,
    matrix_transpose=tf.linalg.matrix_transpose,
    linalg=tf.linalg,
)


def textbook_layer(problem: Problem) -> Layer:
    """Return the papers' algorithm with the papers' gradient."""

    @tf.custom_gradient
    def layer(x: Any, weight: Any, bias: Any) -> Any:
        y, saved = textbook.forward(NAMESPACE, problem.blocks, x, weight, bias, problem.iterations, EPS)
        return y, partial(textbook.backward, NAMESPACE, problem.blocks, saved)

    return layer


def batch_norm(problem: Problem) -> Layer:
    """Return TensorFlow's fused batch norm in NHWC, which all devices support, or else one in its operations."""
    if problem.layout == "NHWC":
        epsilon = max(EPS, 1.001e-5)  # the fused function accepts no smaller one
        return lambda x, w, b: tf.compat.v1.nn.fused_batch_norm(x, w, b, epsilon=epsilon)[0]
    axes, per_channel = [i for i in range(len(problem.shape)) if i != problem.axis], problem.blocks.per_channel

    def layer(x: Any, weight: Any, bias: Any) -> Any:
        scale, shift = (per_channel(NAMESPACE, v, len(problem.shape)) for v in (weight, bias))
        return tf.nn.batch_normalization(x, *tf.nn.moments(x, axes, keepdims=True), shift, scale, EPS)

    return layer


def group_norm(problem: Problem) -> Layer:
    axis, shape = problem.axis, list(problem.array_shape)
    groups = [*shape[:axis], problem.group, problem.channels // problem.group, *shape[axis + 1 :]]
    axes = [i for i in range(1, len(groups)) if i != axis]

    def layer(x: Any, weight: Any, bias: Any) -> Any:
        scale, shift = (problem.blocks.per_channel(NAMESPACE, v, len(shape)) for v in (weight, bias))
        cut = tf.reshape(x, groups)
        mean, variance = tf.nn.moments(cut, axes, keepdims=True)
        return tf.reshape((cut - mean) * tf.math.rsqrt(variance + EPS), shape) * scale + shift

    return layer


def convolution(x: Any, kernel: Any, bias: Any) -> Any:
    return tf.nn.bias_add(tf.nn.conv2d(x, kernel, 1, "SAME"), bias)


class TensorFlow(Framework):
    """polywhiten's functions, TensorFlow's, and others written in TensorFlow's operations."""

    MODES = ("graph", "XLA")
    PACKAGES = ("tensorflow",)

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self._devices = tf.config.list_physical_devices("GPU")
        if device == "cuda" and not self._devices:
            raise ValueError("TensorFlow has no GPU")
        for found in self._devices:
            tf.config.experimental.set_memory_growth(found, True)  # leave memory to other frameworks
        self._tf_device = "/GPU:0" if device == "cuda" else "/CPU:0"

    def training(self, problem: Problem, mode: str) -> dict[str, Step]:
        x, dy, weight, bias = self._tensors(problem)
        is_iter_norm = problem.what == ITER_NORM
        layers = {
            SUBJECT: subject(problem),
            SAME_TRAFFIC[problem.what]: batch_norm(problem) if is_iter_norm else group_norm(problem),
            TEXTBOOK: textbook_layer(problem),
        }
        if is_iter_norm:
            layers[DBN] = lambda x, w, b: textbook.exact(NAMESPACE, problem.blocks, x, w, b, EPS)
        steps = {name: self._compiled(mode, _training(layer), x, weight, bias, dy) for name, layer in layers.items()}
        if is_iter_norm and problem.layout == "NHWC":  # TensorFlow's convolutions on a CPU support no other
            kernel = self._random(3, 3, problem.channels, problem.channels)
            steps[CONV] = self._compiled(mode, _training(convolution), x, kernel, bias, dy)
        return steps

    def evaluation(self, problem: Problem, mode: str) -> dict[str, Step]:
        x, _, weight, bias = self._tensors(problem)
        axis, blocks = problem.axis, problem.blocks
        options: dict[str, Any] = {"group_size": problem.group, "iterations": problem.iterations, "eps": EPS}
        stats = pw.whitening_stats(x, axis=axis, **options)

        def frozen(x: Any, stats: Any, weight: Any, bias: Any) -> Any:
            return (pw.apply_whitening(x, stats, weight=weight, bias=bias, axis=axis),)

        def plain(x: Any, stats: Any, weight: Any, bias: Any) -> Any:
            return (textbook.frozen(NAMESPACE, blocks, x, stats.mean, stats.whitener, weight, bias),)

        arguments = x, stats, weight, bias
        return {SUBJECT: self._compiled(mode, frozen, *arguments), TEXTBOOK: self._compiled(mode, plain, *arguments)}

    def products(self, mode: str, channels: int, batch: int, size: int) -> dict[str, Step]:
        x, kernel = self._random(batch, size, size, channels), self._random(1, 1, channels, channels)
        a, b = self._random(4 * channels, 4 * channels), self._random(4 * channels, 4 * channels)
        return {
            "convolution": self._compiled(mode, lambda x, w: (tf.nn.conv2d(x, w, 1, "SAME"),), x, kernel),
            "matrices": self._compiled(mode, lambda a, b: (a @ b,), a, b),
        }

    def wait(self, result: Any) -> None:
        if self.device == "cuda":
            tf.test.experimental.sync_devices()

    def values(self, result: Any) -> list[np.ndarray]:
        return [part.numpy() for part in result]

    def peak_bytes(self, step: Step) -> int:
        """Return the peak of TensorFlow's allocator, and on a CPU also that of other allocations.

        The latter are mainly XLA's temporary arrays.
        """
        self.wait(None)
        name, statistics = "GPU:0" if self.device == "cuda" else "CPU:0", tf.config.experimental
        try:
            statistics.reset_memory_stats(name)
        except ValueError:  # the allocator has no pool, as on CPUs without oneDNN: memray sees everything
            return super().peak_bytes(step)
        before = statistics.get_memory_info(name)["current"]
        if self.device == "cuda":
            self.run(step)
            outside = 0
        else:
            outside = super().peak_bytes(step)
        return int(statistics.get_memory_info(name)["peak"] - before) + outside

    def device_name(self) -> str:
        return str(tf.config.experimental.get_device_details(self._devices[0])["device_name"])

    def _compiled(self, mode: str, function: Callable[..., Any], *tensors: Any) -> Step:
        """Return a step that is traced, and in the mode XLA compiled, when it is first called."""
        compiled = tf.function(function, autograph=False, jit_compile=mode == "XLA")

        def step() -> Any:
            with tf.device(self._tf_device):
                return compiled(*tensors)

        return step

    def _tensors(self, problem: Problem) -> list[Any]:
        drawn = problem.draw()
        with tf.device(self._tf_device):
            return [tf.constant(a) for a in (drawn.x, drawn.dy, drawn.weight, drawn.bias)]

    def _random(self, *shape: int) -> Any:
        with tf.device(self._tf_device):
            return tf.random.normal(shape)


def _training(layer: Layer) -> Callable[..., Any]:
    def step(x: Any, weight: Any, bias: Any, dy: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch((x, weight, bias))
            y = layer(x, weight, bias)
        return y, *tape.gradient(y, (x, weight, bias), dy)

    return step


FRAMEWORK = TensorFlow
