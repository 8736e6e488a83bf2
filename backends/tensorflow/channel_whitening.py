"""IterNorm in graphs: one copy of the input, shifted to about zero, serves forward and backward.

Whitening doesn't depend on a constant that is added to every sample. So the mean of an eighth of the batch, which costs
little, is subtracted first, and all that follows takes its sums of the difference. An eighth is enough: the mean of a
fraction f of any numbers is at most sqrt(1 / f - 1) standard deviations away from the mean of all of them, by the
inequality of Cauchy and Schwarz. Here these are 2.65 standard deviations, so covariances lose at most three bits, and
usually none.
"""

from __future__ import annotations

import tensorflow as tf

from polywhiten.blocks import ChannelGroups
from polywhiten.kernels import along
from polywhiten.reference import Gradients, Reference
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import NO_STATISTICS, Statistics
from polywhiten.tensorflow.kernels import NearZeroKernels
from polywhiten.tensorflow.namespace import Tensor, xp

EVERY = 8  # the shift is the mean of one in so many samples

NEAR_ZERO_KERNELS = NearZeroKernels(xp)
NEAR_ZERO = Reference(NEAR_ZERO_KERNELS)


class ChannelWhitening(Reference):
    """IterNorm in graphs. An eager tape would keep the shifted copy in addition to the input."""

    name = "graphs"

    def supports(self, spec: WhiteningSpec | None, x: Tensor, *others: Tensor | None) -> bool:
        """Return whether a graph whitens channels of one worker's samples; several workers would need one shift."""
        if spec is None or tf.executing_eagerly():
            return False
        return isinstance(spec.blocks, ChannelGroups) and spec.all_reduce is None

    def statistics(self, spec: WhiteningSpec, x: Tensor) -> Statistics:
        shifted, shift = self._shifted(spec, x)
        stats = NEAR_ZERO.statistics(spec, shifted)
        return stats._replace(mean=stats.mean + shift)

    def forward(
        self, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Statistics]:
        shifted, shift = self._shifted(spec, x)
        y, stats = NEAR_ZERO.forward(spec, shifted, weight, bias)
        return tf.cast(y, x.dtype), stats._replace(mean=stats.mean + shift)

    def backward(
        self,
        spec: WhiteningSpec,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        stats: Statistics,
        dy: Tensor,
        dstats: Statistics = NO_STATISTICS,
    ) -> Gradients:
        """Return the gradients; the graph computes once what `forward` computes too, the shifted copy and its mean."""
        shifted, _ = self._shifted(spec, x)
        stats = stats._replace(mean=NEAR_ZERO_KERNELS.mean(NEAR_ZERO_KERNELS.split(spec.blocks, shifted), 1))
        dx, dweight, dbias = NEAR_ZERO.backward(spec, shifted, weight, bias, stats, dy, dstats)
        return tf.cast(dx, x.dtype), dweight, dbias

    def _shifted(self, spec: WhiteningSpec, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x minus the shift, and the shift (groups, d), which is a constant for derivatives."""
        kernels, axis = NEAR_ZERO_KERNELS, 0 if spec.blocks.axis else 1  # samples, or what is beside the channels
        full = kernels.to_accumulation_dtype(x)
        part = tf.gather(full, tf.range(0, kernels.shape(x)[axis], EVERY), axis=axis)  # slices with a step are slow
        shift = tf.stop_gradient(kernels.mean(kernels.split(spec.blocks, part), 1))
        return tf.reshape(kernels.split(spec.blocks, full) - along(shift, 1), kernels.shape(x)), shift
