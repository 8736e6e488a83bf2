"""The competitors in NumPy, whose gradients are pullbacks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import textbook
from problems import EPS, ITER_NORM, Arrays, Problem
from records import SUBJECT

import polywhiten as pw
from competitors import SAME_TRAFFIC, TEXTBOOK, Framework, Step

Pullback = Callable[[np.ndarray], tuple[Any, ...]]


def standardize(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, problem: Problem) -> tuple[np.ndarray, Pullback]:
    """Apply batch or group normalization; a row of a block is a channel or a group."""
    blocks = problem.blocks
    rows = blocks.rows(np, x)
    centred = rows - rows.mean(2, keepdims=True)
    deviation = np.sqrt(np.mean(centred**2, axis=2, keepdims=True) + EPS)
    normalized = centred / deviation
    scale = blocks.per_channel(np, weight, x.ndim)
    white = blocks.restored(np, normalized, x.shape)

    def pullback(dy: np.ndarray) -> tuple[np.ndarray, ...]:
        d = blocks.rows(np, dy * scale)
        along = normalized * np.mean(d * normalized, axis=2, keepdims=True)
        dx = (d - d.mean(2, keepdims=True) - along) / deviation
        return blocks.restored(np, dx, x.shape), blocks.summed(np, dy * white), blocks.summed(np, dy)

    return white * scale + blocks.per_channel(np, bias, x.ndim), pullback


class NumPy(Framework):
    """polywhiten's pullbacks, and others written in NumPy's operations."""

    PACKAGES = ("numpy",)

    def __init__(self, device: str) -> None:
        super().__init__(device)
        if device != "cpu":
            raise ValueError("NumPy only has the device cpu")

    def training(self, problem: Problem, mode: str) -> dict[str, Step]:
        drawn: Arrays = problem.draw()
        arguments = drawn.x, drawn.weight, drawn.bias

        def subject() -> tuple[np.ndarray, ...]:
            y, pullback = self._subject(problem)(*arguments)
            return y, *pullback(drawn.dy)

        def plain() -> tuple[np.ndarray, ...]:
            y, saved = textbook.forward(np, problem.blocks, *arguments, problem.iterations, EPS)
            return y, *textbook.backward(np, problem.blocks, saved, drawn.dy)

        def normalization() -> tuple[np.ndarray, ...]:
            y, pullback = standardize(*arguments, problem)
            return y, *pullback(drawn.dy)

        return {SUBJECT: subject, SAME_TRAFFIC[problem.what]: normalization, TEXTBOOK: plain}

    def evaluation(self, problem: Problem, mode: str) -> dict[str, Step]:
        drawn: Arrays = problem.draw()
        x, weight, bias, axis = drawn.x, drawn.weight, drawn.bias, problem.axis
        options = {"group_size": problem.group, "iterations": problem.iterations, "eps": EPS}
        stats = pw.whitening_stats(x, axis=axis, **options)
        return {
            SUBJECT: lambda: (pw.apply_whitening(x, stats, weight=weight, bias=bias, axis=axis),),
            TEXTBOOK: lambda: (textbook.frozen(np, problem.blocks, x, stats.mean, stats.whitener, weight, bias),),
        }

    def products(self, mode: str, channels: int, batch: int, size: int) -> dict[str, Step]:
        random = np.random.default_rng(0)
        x, weight = (
            random.standard_normal((rows, channels), dtype=np.float32) for rows in (batch * size * size, channels)
        )
        a, b = random.standard_normal((2, 4 * channels, 4 * channels), dtype=np.float32)
        return {"convolution": lambda: (x @ weight,), "matrices": lambda: (a @ b,)}

    def _subject(self, problem: Problem) -> Callable[..., tuple[np.ndarray, Pullback]]:
        options: dict[str, Any] = {"axis": problem.axis, "iterations": problem.iterations, "eps": EPS}
        if problem.what == ITER_NORM:
            function = partial(pw.iter_norm_vjp, group_size=problem.group, **options)
        else:
            function = partial(pw.group_whiten_vjp, num_groups=problem.group, **options)
        return lambda x, weight, bias: function(x, weight=weight, bias=bias)


FRAMEWORK = NumPy
