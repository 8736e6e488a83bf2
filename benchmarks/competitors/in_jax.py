"""The competitors in JAX, compiled by `jax.jit`."""

import os
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave GPU memory to other frameworks

import jax
import jax.numpy as jnp
import textbook
from problems import EPS, ITER_NORM, Problem
from records import SUBJECT

import polywhiten as pw
from competitors import CONV, DBN, SAME_TRAFFIC, TEXTBOOK, Framework, Step, subject

Array = jax.Array
Layer = Callable[[Array, Array, Array], Array]


def textbook_layer(problem: Problem) -> Layer:
    """Return the papers' algorithm with the papers' gradient."""
    blocks = problem.blocks

    @jax.custom_vjp
    def layer(x: Array, weight: Array, bias: Array) -> Array:
        return forward(x, weight, bias)[0]

    def forward(x: Array, weight: Array, bias: Array) -> tuple[Array, textbook.Saved]:
        return textbook.forward(jnp, blocks, x, weight, bias, problem.iterations, EPS)

    layer.defvjp(forward, partial(textbook.backward, jnp, blocks))
    return layer


def normalization(problem: Problem) -> Layer:
    """Return batch or group normalization in JAX's operations, because JAX has no such function."""

    def layer(x: Array, weight: Array, bias: Array) -> Array:
        if problem.what == ITER_NORM:
            shape, axes = x.shape, tuple(i for i in range(x.ndim) if i != problem.axis)
        else:
            axis = problem.axis
            shape = (*x.shape[:axis], problem.group, problem.channels // problem.group, *x.shape[axis + 1 :])
            axes = tuple(i for i in range(1, len(shape)) if i != axis)
        groups = x.reshape(shape)
        scale = jax.lax.rsqrt(groups.var(axes, keepdims=True) + EPS)
        y = ((groups - groups.mean(axes, keepdims=True)) * scale).reshape(x.shape)
        return y * problem.blocks.per_channel(jnp, weight, x.ndim) + problem.blocks.per_channel(jnp, bias, x.ndim)

    return layer


def convolution(problem: Problem) -> Layer:
    layout = problem.layout

    def layer(x: Array, weight: Array, bias: Array) -> Array:
        y = jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=(layout, "HWIO", layout))
        return y + problem.blocks.per_channel(jnp, bias, x.ndim)

    return layer


class Jax(Framework):
    """polywhiten's functions, and others written in JAX's operations."""

    MODES = ("jit",)
    PACKAGES = ("jax", "jaxlib")

    def __init__(self, device: str) -> None:
        super().__init__(device)
        try:
            self._jax_device = jax.devices(device)[0]
        except RuntimeError as error:
            raise ValueError(f"JAX has no device {device}: {error}") from error

    def training(self, problem: Problem, mode: str) -> dict[str, Step]:
        x, dy, weight, bias = self._arrays(problem)
        layers = {
            SUBJECT: subject(problem),
            SAME_TRAFFIC[problem.what]: normalization(problem),
            TEXTBOOK: textbook_layer(problem),
        }
        if problem.what == ITER_NORM:
            layers[DBN] = partial(_exact, problem)
        steps = {name: _Compiled(_training(layer), x, weight, bias, dy) for name, layer in layers.items()}
        if problem.what == ITER_NORM and problem.is_picture:
            kernel = self._random(3, 3, problem.channels, problem.channels)
            steps[CONV] = _Compiled(_training(convolution(problem)), x, kernel, bias, dy)
        return steps

    def evaluation(self, problem: Problem, mode: str) -> dict[str, Step]:
        x, _, weight, bias = self._arrays(problem)
        axis, blocks = problem.axis, problem.blocks
        options: dict[str, Any] = {"group_size": problem.group, "iterations": problem.iterations, "eps": EPS}
        stats = pw.whitening_stats(x, axis=axis, **options)
        return {
            SUBJECT: _Compiled(
                lambda x, stats, w, b: (pw.apply_whitening(x, stats, weight=w, bias=b, axis=axis),),
                *(x, stats, weight, bias),
            ),
            TEXTBOOK: _Compiled(
                lambda x, stats, w, b: (textbook.frozen(jnp, blocks, x, stats.mean, stats.whitener, w, b),),
                *(x, stats, weight, bias),
            ),
        }

    def products(self, mode: str, channels: int, batch: int, size: int) -> dict[str, Step]:
        x, kernel = self._random(batch, size, size, channels), self._random(1, 1, channels, channels)
        a, b = self._random(2, 4 * channels, 4 * channels)
        dimensions = ("NHWC", "HWIO", "NHWC")
        return {
            "convolution": _Compiled(
                lambda x, w: (jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dimensions),),
                *(x, kernel),
            ),
            "matrices": _Compiled(lambda a, b: (a @ b,), a, b),
        }

    def wait(self, result: Any) -> None:
        jax.block_until_ready(result)

    def peak_bytes(self, step: Step) -> int:
        if self.device == "cpu":
            return super().peak_bytes(step)
        # The device's statistics don't help here, because JAX can't reset their peak.
        analysis = step.compiled.memory_analysis()  # type: ignore[attr-defined]
        return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)

    def device_name(self) -> str:
        return str(self._jax_device.device_kind)

    def _arrays(self, problem: Problem) -> list[Array]:
        drawn = problem.draw()
        return [jax.device_put(a, self._jax_device) for a in (drawn.x, drawn.dy, drawn.weight, drawn.bias)]

    def _random(self, *shape: int) -> Array:
        return jax.device_put(jax.random.normal(jax.random.key(0), shape), self._jax_device)


class _Compiled:
    """A function with its arrays, compiled when it is first called or its compiled form is first needed."""

    def __init__(self, function: Callable[..., Any], *arrays: Any) -> None:
        self.function, self.arrays = function, arrays

    @cached_property
    def compiled(self) -> jax.stages.Compiled:
        return jax.jit(self.function).lower(*self.arrays).compile()

    def __call__(self) -> Any:
        return self.compiled(*self.arrays)


def _training(layer: Layer) -> Callable[..., tuple[Array, ...]]:
    def step(x: Array, weight: Array, bias: Array, dy: Array) -> tuple[Array, ...]:
        y, pullback = jax.vjp(layer, x, weight, bias)
        return y, *pullback(dy)

    return step


def _exact(problem: Problem, x: Array, weight: Array, bias: Array) -> Array:
    y: Array = textbook.exact(jnp, problem.blocks, x, weight, bias, EPS)
    return y


FRAMEWORK = Jax
