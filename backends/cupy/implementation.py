"""Whitening of CuPy's arrays."""

from __future__ import annotations

from polywhiten._types import Array
from polywhiten.cupy.joined import JoinedWhitening
from polywhiten.cupy.kernels import CupyKernels
from polywhiten.gpu_launches import JOINED, gpu_launches
from polywhiten.reference import Gradients, Reference
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import NO_STATISTICS, Statistics


class CupyImplementation(Reference):
    """CUDA kernels, with joined launches where these are wanted."""

    name = "CUDA"

    kernels: CupyKernels

    def forward(
        self, spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None
    ) -> tuple[Array, Statistics]:
        """Whiten, in two launches if these serve the array."""
        joined = self.joined(spec, x)
        if joined is None:
            return super().forward(spec, x, weight, bias)
        y, stats = joined.forward(weight, bias)
        return y.reshape(x.shape), stats

    def backward(
        self,
        spec: WhiteningSpec,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        stats: Statistics,
        dy: Array,
        dstats: Statistics = NO_STATISTICS,
    ) -> Gradients:
        """Return the gradients, in two launches if these serve the arrays."""
        alone = all(each is None for each in dstats)
        joined = self.joined(spec, x, dy, *stats) if alone else None
        if joined is None:
            return super().backward(spec, x, weight, bias, stats, dy, dstats)
        dx, dweight, dbias = joined.backward(weight, bias, stats, self.kernels.split(spec.blocks, dy))
        return dx.reshape(x.shape), dweight, dbias

    def joined(self, spec: WhiteningSpec, x: Array, *in_backward: Array | None) -> JoinedWhitening | None:
        """Return what whitens x in two launches, None if that isn't wanted or can't serve the arrays."""
        if gpu_launches() != JOINED or spec.all_reduce is not None:
            return None
        return JoinedWhitening.of(self.kernels, spec, x, *in_backward)
