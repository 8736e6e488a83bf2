"""Whitening in two launches, and its gradient in two more, with weight and bias on the way.

The first launch of each adds up the samples, and its last program takes Newton's steps or those of their adjoint; the
second one maps the samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from polywhiten._types import Array
from polywhiten.blocks import ChannelGroups
from polywhiten.cupy.passes import Arrays, Launch, backward_pass, forward_pass, needed_memory
from polywhiten.cupy.variants import TYPES, is_sized
from polywhiten.reference import as_dtype_of
from polywhiten.solvers.newton import Newton
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import Statistics

if TYPE_CHECKING:
    from polywhiten.cupy.kernels import CupyKernels


class JoinedWhitening(NamedTuple):
    """Forward and backward of (p, q, d, l)."""

    kernels: CupyKernels
    x: Array
    block_axis: int
    channels: int  # of a variable
    solver: Newton
    eps: float

    @classmethod
    def of(
        cls, kernels: CupyKernels, spec: WhiteningSpec, x: Array, *in_backward: Array | None
    ) -> JoinedWhitening | None:
        """None for arrays that the kernels aren't made for; in backward dy and the statistics come beside x."""
        blocks = spec.blocks
        if x.dtype.char not in TYPES or spec.solver.newton_steps(x.itemsize) is None:
            return None
        if in_backward and not _are_readable(kernels, x, *in_backward):
            return None
        x4 = kernels.split(blocks, x)
        if not (is_sized(x4, blocks.block_axis) and _fits(kernels, x4, bool(in_backward))):
            return None
        channels = 1 if isinstance(blocks, ChannelGroups) else x.shape[blocks.axis] // blocks.num_groups
        return cls(kernels, x4, blocks.block_axis, channels, spec.solver, float(spec.eps))

    def forward(self, weight: Array | None, bias: Array | None) -> tuple[Array, Statistics]:
        """As `polywhiten.reference.Reference.forward`."""
        kernels, x = self.kernels, self.x
        empty, launch = kernels.xp.empty, kernels.launch
        weight, bias = self._parameter(weight), self._parameter(bias)
        this = forward_pass(self._arrays(weight, bias), launch.processors, launch.shared_memory)
        dtype, matrices = kernels.accumulation_dtype(x.dtype), (this.blocks, this.d, this.d)
        y = empty(x.shape, dtype=x.dtype)
        mean, cov = empty(matrices[:2], dtype=dtype), empty(matrices, dtype=dtype)
        whitener, memory = empty(matrices, dtype=dtype), empty((this.memory,), dtype=dtype)
        newton = self.eps, self.solver.iterations
        results = mean, cov, whitener
        self._launch(this.sums, x, this.numbers, *newton, memory, self._counters(this.counters), *results)
        self._launch(this.maps, x, mean, whitener, _or_null(weight), _or_null(bias), this.numbers, y)
        return y, Statistics(mean, cov, whitener)

    def backward(
        self, weight: Array | None, bias: Array | None, stats: Statistics, dy: Array
    ) -> tuple[Array, Array | None, Array | None]:
        """As `polywhiten.reference.Reference.backward`, of dy as (p, q, d, l)."""
        kernels, x = self.kernels, self.x
        empty, launch = kernels.xp.empty, kernels.launch
        mean, cov, whitener = stats
        scale, shift = self._parameter(weight), self._parameter(bias)
        has_parameters = weight is not None or bias is not None
        device = launch.processors, launch.shared_memory
        this = backward_pass(self._arrays(scale, shift), dy.strides, has_parameters, *device)
        dx, memory = empty(x.shape, dtype=x.dtype), empty((this.memory,), dtype=mean.dtype)
        dweight, dbias = (None if each is None else empty(each.shape, dtype=each.dtype) for each in (scale, shift))
        given = (mean, whitener, _or_null(scale), this.numbers)
        newton = self.eps, self.solver.iterations
        counters = self._counters(this.counters)
        self._launch(this.sums, dy, x, cov, *given, *newton, memory, counters)
        self._launch(this.maps, dy, x, *given, memory, dx, _or_null(dweight), _or_null(dbias))
        return dx, as_dtype_of(kernels, dweight, weight), as_dtype_of(kernels, dbias, bias)

    def _arrays(self, weight: Array | None, bias: Array | None) -> Arrays:
        x = self.x
        return Arrays(
            self.block_axis, self.channels, x.shape, x.strides, x.dtype.char, _is_half(weight), _is_half(bias)
        )

    def _parameter(self, values: Array | None) -> Array | None:
        """Weight or bias as the kernels read it: without gaps, and in float16 or the dtype of statistics."""
        if values is None:
            return None
        kernels = self.kernels
        if not _is_half(values):
            values = kernels.xp.astype(values, kernels.accumulation_dtype(self.x.dtype), copy=False)
        return kernels.in_order(values)

    def _counters(self, count: int) -> Array | int:
        return self.kernels.launch.counters(count) if count else 0

    def _launch(self, launch: Launch, *arguments: Any) -> None:
        self.kernels.launch(launch.file, launch.name, launch.programs, launch.threads, arguments, launch.shared)


def _fits(kernels: CupyKernels, x: Array, backward: bool) -> bool:
    """Whether the device has enough shared memory."""
    return needed_memory(x.shape[2], 8 if x.itemsize == 8 else 4, backward) <= kernels.launch.shared_memory


def _are_readable(kernels: CupyKernels, x: Array, dy: Array, *stats: Array | None) -> bool:
    """Whether dy has the dtype of x, and statistics are there in theirs, without gaps."""
    dtype = kernels.accumulation_dtype(x.dtype)
    return dy.dtype == x.dtype and all(
        each is not None and each.dtype == dtype and each.flags.c_contiguous for each in stats
    )


def _is_half(values: Array | None) -> bool:
    return values is not None and values.dtype.char == "e"


def _or_null(values: Array | None) -> Array | int:
    return 0 if values is None else values
