"""Whitening as one operation with a gradient of its own, that keeps the input and O(d^2) for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from polywhiten import checks
from polywhiten.backend import Backend
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import Statistics
from polywhiten.tensorflow.kernels import KERNELS, unrecorded
from polywhiten.tensorflow.namespace import Tensor


class TensorFlowBackend(Backend):
    """TensorFlow's kernels, with whitening as an operation of its own."""

    def tensor(self, x: Tensor, name: str = "x") -> Tensor:
        """The value of a tf.Variable; tensors as they are; no ragged and sparse ones."""
        try:
            return tf.convert_to_tensor(x)
        except (TypeError, ValueError, RuntimeError) as error:  # the last is PyTorch's
            raise checks.wrong_type(x, name, "a tensor, or what tf.convert_to_tensor takes") from error

    def converted(self, values: Any, name: str, x: Tensor) -> Tensor:
        """As TensorFlow's functions convert it: the arrays of all libraries, and lists."""
        return self.tensor(values, name)

    def whiten_blocks(
        self, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Statistics]:
        """Y and the statistics, all differentiable.

        The gradient is computed from the statistics as they are given out, so that a second derivative comes back
        here as gradients of the statistics.
        """
        inputs = [array for array in (x, weight, bias) if array is not None]
        stats: Sequence[Tensor] = ()

        def arrays(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
            given = iter(tensors)
            return next(given), None if weight is None else next(given), None if bias is None else next(given)

        @tf.custom_gradient
        def run(*tensors: Tensor) -> Any:
            y, inner = self.forward(spec, *arrays([unrecorded(tensor) for tensor in tensors]))

            def gradient(dy: Tensor, *dstats: Tensor) -> list[Tensor]:
                known = Statistics(*stats) if stats else inner  # forward mode asks before they are given out
                gradients = self.backward(spec, *arrays(inputs), known, dy, Statistics(*dstats))
                return [gradient for gradient in gradients if gradient is not None]

            return (y, *inner), gradient

        y, *stats = run(*inputs)
        return y, Statistics(*stats)


BACKEND = TensorFlowBackend(KERNELS)
