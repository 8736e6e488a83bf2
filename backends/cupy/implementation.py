"""Whitening of CuPy's arrays by the CUDA kernels, in one of two structures: joined launches or separate ones."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from polywhiten._types import Array, Shape
from polywhiten.blocks import Blocks, ChannelGroups
from polywhiten.cupy.kernels import CupyKernels
from polywhiten.cupy.passes import Arrays, Launch, backward_pass, forward_pass, needed_shared_memory
from polywhiten.cupy.variants import TYPES, fits_variants
from polywhiten.gpu_launches import JOINED, gpu_launches
from polywhiten.reference import Gradients, Reference, as_dtype_of
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import NO_STATISTICS, Statistics


class SeparateImplementation(Reference):
    """One or two launches for each of the five kernels."""

    name = "CUDA"

    kernels: CupyKernels

    def supports(self, spec: WhiteningSpec | None, *arrays: Array | None) -> bool:
        """Return whether the arrays have a dtype and sizes that the kernels have variants for."""
        x: Array = arrays[0]
        if spec is None:
            # a covariance, for which the kernels choose by the solver; or x, mean and whitener of `apply_frozen`
            return len(arrays) == 1 or self._supports_frozen(x, arrays[1], arrays[2])
        if x.dtype.char not in TYPES or not _num_variables(spec.blocks, x.shape):
            return False
        dtype = self.kernels.accumulation_dtype(x.dtype)
        return not arrays[3:] or _has_dtypes(x.dtype, dtype, *arrays[3:])

    def _supports_frozen(self, x: Array, mean: Array, whitener: Array) -> bool:
        if x.dtype.char not in TYPES or x.size == 0:
            return False
        (channels,), (groups, d, _) = mean.shape, whitener.shape
        return fits_variants((x.size // channels, groups, d, 1), block_axis=1)


class JoinedImplementation(Reference):
    """Two launches for the forward pass, and two for the backward pass.

    The first launch of each sums over the samples, and the last thread block to finish does Newton's iteration or its
    adjoint. The second launch maps the samples. Weight and bias are applied in the same launches.
    """

    name = "joined CUDA"
    kernels: CupyKernels

    def supports(self, spec: WhiteningSpec | None, *arrays: Array | None) -> bool:
        """Return whether joined launches are wanted and there are variants for these arrays."""
        if gpu_launches() != JOINED or spec is None or spec.all_reduce is not None:
            return False
        x: Array = arrays[0]
        if x.dtype.char not in TYPES or spec.solver.newton_steps(x.itemsize) is None:
            return False
        d, backward = _num_variables(spec.blocks, x.shape), len(arrays) > 3
        if not d or (backward and not self._are_readable(x, *arrays[3:])):
            return False
        itemsize = 8 if x.itemsize == 8 else 4
        return needed_shared_memory(d, itemsize, backward) <= self.kernels.launch.max_shared_memory

    def forward(
        self, spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None
    ) -> tuple[Array, Statistics]:
        """Return y and the statistics, as `Reference.forward` does."""
        kernels, dtype = self.kernels, self.kernels.accumulation_dtype(x.dtype)
        empty, launch = kernels.xp.empty, kernels.launch
        weight, bias = self._parameter(weight, dtype), self._parameter(bias, dtype)
        x4 = kernels.split(spec.blocks, x)
        arrays = _properties(spec.blocks, x, x4)
        launches = forward_pass(arrays, launch.multiprocessors, launch.max_shared_memory)
        blocks, d = launches.blocks, launches.d
        y = empty(x.shape, dtype=x.dtype)
        mean, cov = empty((blocks, d), dtype=dtype), empty((blocks, d, d), dtype=dtype)
        whitener, workspace = empty((blocks, d, d), dtype=dtype), empty((launches.workspace,), dtype=dtype)
        newton = float(spec.eps), spec.solver.newton_steps(x.itemsize)
        counters = self._counters(launches.num_counters)
        self._launch(launches.sums, x4, launches.args, *newton, workspace, counters, mean, cov, whitener)
        self._launch(launches.maps, x4, mean, whitener, _or_null(weight), _or_null(bias), launches.args, y)
        return y, Statistics(mean, cov, whitener)

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
        """Return the gradients of x, weight and bias, as `Reference.backward` does without `dstats`."""
        kernels, (mean, cov, whitener) = self.kernels, stats
        empty, launch = kernels.xp.empty, kernels.launch
        kernel_weight, kernel_bias = self._parameter(weight, mean.dtype), self._parameter(bias, mean.dtype)
        x4, dy4 = kernels.split(spec.blocks, x), kernels.split(spec.blocks, dy)
        arrays = _properties(spec.blocks, x, x4)
        has_parameters = weight is not None or bias is not None
        newton = float(spec.eps), spec.solver.newton_steps(x.itemsize)
        launches = backward_pass(
            arrays, dy4.strides, has_parameters, newton[1], launch.multiprocessors, launch.max_shared_memory
        )
        dx, workspace = empty(x.shape, dtype=x.dtype), empty((launches.workspace,), dtype=mean.dtype)
        dweight, dbias = (None if p is None else empty(p.shape, dtype=p.dtype) for p in (kernel_weight, kernel_bias))
        common = mean, whitener, _or_null(kernel_weight), launches.args
        counters = self._counters(launches.num_counters)
        self._launch(launches.sums, dy4, x4, cov, *common, *newton, workspace, counters)
        self._launch(launches.maps, dy4, x4, *common, workspace, dx, _or_null(dweight), _or_null(dbias))
        return dx, as_dtype_of(kernels, dweight, weight), as_dtype_of(kernels, dbias, bias)

    def _are_readable(
        self, x: Array, dy: Array, mean: Array | None, cov: Array | None, whitener: Array | None, *dstats: Array | None
    ) -> bool:
        """Return whether backward has all statistics as the kernels read them, and no gradients of statistics."""
        if mean is None or cov is None or whitener is None:
            return False
        for gradient in dstats:
            if gradient is not None:
                return False
        dtype = self.kernels.accumulation_dtype(x.dtype)
        return _has_dtypes(x.dtype, dtype, dy, mean, cov, whitener) and bool(
            mean.flags.c_contiguous and cov.flags.c_contiguous and whitener.flags.c_contiguous
        )

    def _parameter(self, values: Array | None, dtype: Any) -> Array | None:
        """Return weight or bias as the kernels read it: contiguous, and of the dtype of statistics."""
        return None if values is None else self.kernels.contiguous(values, dtype)

    def _counters(self, count: int) -> Array | int:
        return self.kernels.launch.counters(count) if count else 0

    def _launch(self, launch: Launch, *args: Any) -> None:
        self.kernels.launch(launch.file, launch.name, launch.thread_blocks, launch.threads, args, launch.shared)


@lru_cache(maxsize=1024)
def _num_variables(blocks: Blocks, shape: Shape) -> int:
    """Return the number of variables, or 0 if the kernels have no variant for an array of this shape."""
    split = blocks.split(shape)
    return split[2] if fits_variants(split, blocks.block_axis) else 0


def _has_dtypes(dtype: Any, accumulation_dtype: Any, dy: Array, *stats: Array | None) -> bool:
    """Return whether dy has the dtype of x, and statistics have the accumulation dtype."""
    if dy.dtype != dtype:
        return False
    for values in stats:  # noqa: SIM110 - `all` takes twice as long
        if values is not None and values.dtype != accumulation_dtype:
            return False
    return True


def _properties(blocks: Blocks, x: Array, x4: Array) -> Arrays:
    channels = 1 if isinstance(blocks, ChannelGroups) else x.shape[blocks.axis] // blocks.num_groups
    return Arrays(blocks.block_axis, channels, x4.shape, x4.strides, x4.dtype.char)


def _or_null(values: Array | None) -> Array | int:
    return 0 if values is None else values
