"""Times of IterNorm in TensorFlow: `python benchmarks/tensorflow_speed.py`.

Milliseconds of the forward pass, and of forward and backward: medians of alternating calls in one process, channels
last, float32, group 64, T = 5; beside Keras' BatchNormalization and the paper's algorithm written plainly, which
TensorFlow differentiates. As a graph and compiled by XLA.
"""

import os
import time
from functools import partial
from statistics import geometric_mean, median

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

from polywhiten.keras import IterNorm

SHAPES = ((32, 56, 56, 64), (64, 32, 32, 64), (32, 14, 14, 256), (32, 7, 7, 512))
GROUP, T, EPS = 64, 5, 1e-5
SECONDS = 4  # for the alternating calls of one shape


class Textbook(keras.layers.Layer):
    """Algorithm 1 of the IterNorm paper, line by line."""

    def build(self, shape):
        self.gamma = self.add_weight(shape=(shape[-1],), initializer="ones")
        self.beta = self.add_weight(shape=(shape[-1],), initializer="zeros")

    def call(self, x, training=True):
        shape, channels = tf.shape(x), x.shape[-1]
        rows = tf.reshape(tf.transpose(x, (3, 0, 1, 2)), (channels // GROUP, GROUP, -1))
        centred = rows - tf.reduce_mean(rows, axis=2, keepdims=True)
        count = tf.cast(tf.shape(rows)[2], x.dtype)
        cov = centred @ tf.linalg.matrix_transpose(centred) / count + EPS * tf.eye(GROUP)
        trace = tf.linalg.trace(cov)[:, None, None]
        p = tf.eye(GROUP, batch_shape=[channels // GROUP])
        for _ in range(T):
            p = 1.5 * p - 0.5 * p @ p @ p @ (cov / trace)
        y = p / tf.sqrt(trace) @ centred
        y = tf.transpose(tf.reshape(y, (channels, shape[0], shape[1], shape[2])), (1, 2, 3, 0))
        return y * self.gamma + self.beta


def steps(layer, shape, jit):
    """The forward pass, and forward and backward, as compiled functions."""
    layer.build(shape)
    signature = [tf.TensorSpec((None, *shape[1:]))] * 2

    @tf.function(jit_compile=jit, input_signature=signature[:1])
    def forward(x):
        return layer(x, training=True)

    @tf.function(jit_compile=jit, input_signature=signature)
    def both(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return tape.gradient(y, [x, layer.gamma.value, layer.beta.value], dy)

    return forward, both


def measure(calls):
    """Median milliseconds of every call, in turns."""
    for call in calls:
        call()
        call()
    times = [[] for _ in calls]
    deadline = time.perf_counter() + SECONDS
    while time.perf_counter() < deadline or len(times[0]) < 5:
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [1000 * median(taken) for taken in times]


def main():
    layers = {
        "IterNorm": lambda: IterNorm(group_size=GROUP, iterations=T, epsilon=EPS),
        "BatchNormalization": keras.layers.BatchNormalization,
        "textbook": Textbook,
    }
    print(f"TensorFlow {tf.__version__}, {os.cpu_count()} cores; forward / forward and backward, ms")
    print("| shape | | " + " | ".join(layers) + " | textbook / IterNorm |")
    print("| --- " * (len(layers) + 3) + "|")
    for jit in (False, True):
        ratios = []
        for shape in SHAPES:
            x, dy = tf.random.normal(shape), tf.random.normal(shape)
            pairs = [steps(make(), shape, jit) for make in layers.values()]
            calls = [call for forward, both in pairs for call in (partial(forward, x), partial(both, x, dy))]
            times = measure(calls)
            cells = [f"{times[2 * i]:.1f} / {times[2 * i + 1]:.1f}" for i in range(len(layers))]
            ratios.append(times[5] / times[1])
            print(
                f"| {shape} | {'XLA' if jit else 'graph'} | " + " | ".join(cells) + f" | {ratios[-1]:.2f} |", flush=True
            )
        print(f"| geometric mean | {'XLA' if jit else 'graph'} | | | | {geometric_mean(ratios):.2f} |")


if __name__ == "__main__":
    main()
