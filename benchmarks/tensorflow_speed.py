"""Times of `polywhiten.iter_norm` in TensorFlow: `python benchmarks/tensorflow_speed.py`.

Milliseconds of the forward pass, and of forward and backward: medians of alternating calls in one process, channels
last, float32, group 64, T = 5; beside TensorFlow's batch normalization and the paper's algorithm written plainly, which
TensorFlow differentiates. As a graph and compiled by XLA.
"""

import os
import time
from functools import partial
from statistics import geometric_mean, median

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

import polywhiten as pw

SHAPES = ((32, 56, 56, 64), (64, 32, 32, 64), (32, 14, 14, 256), (32, 7, 7, 512))
GROUP, T, EPS = 64, 5, 1e-5
SECONDS = 4  # for the alternating calls of one shape


def iter_norm(x, gamma, beta):
    return pw.iter_norm(x, weight=gamma, bias=beta, axis=-1, group_size=GROUP, iterations=T, eps=EPS)


def batch_normalization(x, gamma, beta):
    return tf.compat.v1.nn.fused_batch_norm(x, gamma, beta, epsilon=1.001e-5)[0]


def textbook(x, gamma, beta):
    """Algorithm 1 of the IterNorm paper, line by line."""
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
    return y * gamma + beta


NORMS = {"iter_norm": iter_norm, "batch normalization": batch_normalization, "textbook": textbook}


def steps(norm, shape, jit):
    """The forward pass, and forward and backward, as compiled functions of unknown batch size."""
    array, vector = tf.TensorSpec((None, *shape[1:])), tf.TensorSpec(shape[-1:])
    forward = tf.function(norm, jit_compile=jit, input_signature=[array, vector, vector])

    @tf.function(jit_compile=jit, input_signature=[array, vector, vector, array])
    def both(x, gamma, beta, dy):
        with tf.GradientTape() as tape:
            tape.watch((x, gamma, beta))
            y = norm(x, gamma, beta)
        return tape.gradient(y, (x, gamma, beta), dy)

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
    print(f"TensorFlow {tf.__version__}, {os.cpu_count()} cores; forward / forward and backward, ms")
    print("| shape | | " + " | ".join(NORMS) + " | textbook / iter_norm |")
    print("| --- " * (len(NORMS) + 3) + "|")
    for jit in (False, True):
        ratios, kind = [], "XLA" if jit else "graph"
        for shape in SHAPES:
            x, dy = tf.random.normal(shape), tf.random.normal(shape)
            gamma, beta = tf.ones(shape[-1:]), tf.zeros(shape[-1:])
            pairs = [steps(norm, shape, jit) for norm in NORMS.values()]
            calls = [
                call
                for forward, both in pairs
                for call in (partial(forward, x, gamma, beta), partial(both, x, gamma, beta, dy))
            ]
            times = measure(calls)
            cells = [f"{forward:.1f} / {both:.1f}" for forward, both in zip(times[::2], times[1::2], strict=True)]
            ratios.append(times[5] / times[1])
            print(f"| {shape} | {kind} | " + " | ".join(cells) + f" | {ratios[-1]:.2f} |", flush=True)
        print(f"| geometric mean | {kind} | | | | {geometric_mean(ratios):.2f} |")


if __name__ == "__main__":
    main()
