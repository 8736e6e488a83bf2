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
from polywhiten.statistics import NO_STATISTICS, Statistics, batch_statistics
from polywhiten.tensorflow.kernels import NearZeroKernels
from polywhiten.tensorflow.namespace import Tensor, xp

EVERY = 8  # the shift is the mean of one in so many samples

NEAR_ZERO_KERNELS = NearZeroKernels(xp)
NEAR_ZERO = Reference(NEAR_ZERO_KERNELS)


class ChannelWhitening(Reference):
    """IterNorm in graphs. An eager tape would keep the shifted copy in addition to the input."""

    name = "graphs"

    def supports(self, spec: WhiteningSpec | None, x: Tensor, *others: Tensor | None) -> bool:
        return spec is not None and isinstance(spec.blocks, ChannelGroups) and not tf.executing_eagerly()

    def statistics(self, spec: WhiteningSpec, x: Tensor) -> Statistics:
        shifted, shift = self._shifted(spec, x)
        return batch_statistics(NEAR_ZERO_KERNELS, spec, shifted, shift)

    def forward(
        self, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Statistics]:
        stats = self.statistics(spec, x)
        shifted, mean = self._near_zero(spec, x, stats)
        y = NEAR_ZERO.apply(spec.blocks, shifted, mean, stats.whitener, weight, bias)
        return tf.cast(y, x.dtype), stats

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
        shifted, mean = self._near_zero(spec, x, stats)
        dx, dweight, dbias = NEAR_ZERO.backward(spec, shifted, weight, bias, stats._replace(mean=mean), dy, dstats)
        return tf.cast(dx, x.dtype), dweight, dbias

    def _near_zero(self, spec: WhiteningSpec, x: Tensor, stats: Statistics) -> tuple[Tensor, Tensor]:
        """Return x minus the shift, and the mean of that: of all workers' samples, from which the shift may be far."""
        shifted, shift = self._shifted(spec, x)
        if spec.all_reduce is not None:
            return shifted, stats.mean - shift
        return shifted, NEAR_ZERO_KERNELS.mean(NEAR_ZERO_KERNELS.split(spec.blocks, shifted), 1)

    def _shifted(self, spec: WhiteningSpec, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x minus the shift, and the shift (groups, d), which is a constant for derivatives."""
        kernels, axis = NEAR_ZERO_KERNELS, 0 if spec.blocks.axis else 1  # samples, or what is beside the channels
        full = kernels.to_accumulation_dtype(x)
        part = tf.gather(full, tf.range(0, kernels.shape(x)[axis], EVERY), axis=axis)  # slices with a step are slow
        shift = tf.stop_gradient(kernels.mean(kernels.split(spec.blocks, part), 1))
        return tf.reshape(kernels.split(spec.blocks, full) - along(shift, 1), kernels.shape(x)), shift
