"""TensorFlow's backend: whitening as a differentiable operation that saves the input and O(d^2) more for backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from polywhiten import checks
from polywhiten.backend import Backend
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import Statistics
from polywhiten.tensorflow.channel_whitening import NEAR_ZERO_KERNELS, ChannelWhitening
from polywhiten.tensorflow.kernels import KERNELS, unrecorded
from polywhiten.tensorflow.namespace import Tensor
from polywhiten.tensorflow.sample_whitening import supports, whiten_samples


class TensorFlowBackend(Backend):
    """TensorFlow's kernels, with whitening as a differentiable operation."""

    has_mutable_arrays = False

    def tensor(self, x: Tensor, name: str = "x") -> Tensor:
        """Return tensors as they are, and the value of a tf.Variable; refuse ragged and sparse tensors."""
        try:
            return tf.convert_to_tensor(x)
        except (TypeError, ValueError, RuntimeError) as error:  # the last is PyTorch's
            raise checks.wrong_type(x, name, "a tensor, or what tf.convert_to_tensor takes") from error

    def converted(self, values: Any, name: str, x: Tensor) -> Tensor:
        """Return what TensorFlow's functions convert as a tensor: the arrays of all libraries, and lists."""
        return self.tensor(values, name)

    def whiten_blocks(
        self, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Statistics]:
        """Whiten an array of equal blocks; the result and the statistics are differentiable.

        An eager gradient is computed from the statistics that the operation returned, so a second derivative comes back
        here as gradients of the statistics. In a graph it is computed from those inside, whose derivatives are known:
        then nothing that forward and backward share is computed twice.
        """
        if supports(spec):
            return whiten_samples(KERNELS, spec, x, weight, bias)
        is_eager = tf.executing_eagerly()
        inputs = [array for array in (x, weight, bias) if array is not None]
        stats: Sequence[Tensor] = ()

        def arrays(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
            rest = iter(tensors)
            return next(rest), None if weight is None else next(rest), None if bias is None else next(rest)

        @tf.custom_gradient
        def run(*tensors: Tensor) -> Any:
            y, inner = self.forward(spec, *arrays([unrecorded(tensor) for tensor in tensors]))

            def gradient(dy: Tensor, *dstats: Tensor) -> list[Tensor]:
                # forward mode asks before they are returned
                known = Statistics(*stats) if stats and is_eager else inner
                if dy.shape.rank is None:  # of a loss by tf.py_function
                    dy = tf.ensure_shape(dy, y.shape)
                gradients = self.backward(spec, *arrays(inputs), known, dy, Statistics(*dstats))
                return [gradient for gradient in gradients if gradient is not None]

            return (y, *inner), gradient

        y, *stats = run(*inputs)
        return y, Statistics(*stats)


BACKEND = TensorFlowBackend(KERNELS, ChannelWhitening(NEAR_ZERO_KERNELS))
