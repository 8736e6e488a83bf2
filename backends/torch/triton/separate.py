"""Whitening with a launch for each step of the algorithm: up to four launches forward, and four backward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import polywhiten.torch.namespace as xp
from polywhiten.blocks import Blocks, ChannelGroups
from polywhiten.kernels import Term
from polywhiten.reference import Gradients, Reference
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import NO_STATISTICS, Statistics
from polywhiten.torch._internals import can_bypass_autograd
from polywhiten.torch.triton.affine_map import affine_map
from polywhiten.torch.triton.combine_cross_moments import combine_cross_moments
from polywhiten.torch.triton.grouped_samples import GroupedSamples
from polywhiten.torch.triton.inverse_sqrt_adjoint import inverse_sqrt_adjoint
from polywhiten.torch.triton.kernels import TritonKernels
from polywhiten.torch.triton.partial_cross_moments import partial_cross_moments
from polywhiten.torch.triton.partial_sample_cross_moments import partial_sample_cross_moments
from polywhiten.torch.triton.support import DTYPES, is_on_supported_device
from polywhiten.torch.triton.tiles import MAX_VARIABLES, fits_32_bits, have_size
from polywhiten.torch.triton.whiten_sample import whiten_sample


class SeparateImplementation(Reference):
    """Triton's kernels, which apply weight and bias on the way.

    They serve tensors on CUDA devices unless PyTorch records or transforms what is done with them.
    """

    name = "Triton"

    kernels: TritonKernels

    def __init__(self) -> None:
        super().__init__(TritonKernels(xp))

    def is_on_device(self, x: Tensor) -> bool:
        """Return whether x is on a device that the kernels are for."""
        return is_on_supported_device(x)

    def supports(self, spec: WhiteningSpec | None, *arrays: Tensor | None) -> bool:
        """Return whether the kernels can read all tensors, and PyTorch needn't know what they do."""
        x, *others = arrays
        if x is None or not self.is_on_device(x) or x.numel() == 0:
            return False
        if spec is not None and not have_size(others[:2], x.shape[spec.blocks.axis]):
            return False
        d = _num_variables(spec, x, others)
        tensors = [x, *(tensor for tensor in others if tensor is not None)]
        return (
            d is not None
            and d <= MAX_VARIABLES
            and all(tensor.dtype in DTYPES and fits_32_bits(tensor.shape, tensor.stride()) for tensor in tensors)
            and can_bypass_autograd(tensors)
        )

    def forward(
        self, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Statistics]:
        """Whiten; a small sample of group whitening takes a single launch."""
        steps = spec.solver.newton_steps(x.element_size())
        groups = None if isinstance(spec.blocks, ChannelGroups) else GroupedSamples.of(spec.blocks, x)
        if steps is None or spec.all_reduce is not None or groups is None or not groups.are_small:
            return super().forward(spec, x, weight, bias)
        y, stats = whiten_sample(groups.x, groups.affine(weight=weight, bias=bias), spec.eps, steps)
        return y.reshape(x.shape), stats

    def apply(
        self, blocks: Blocks, x: Tensor, mean: Tensor, whitener: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Return diag(weight) whitener (x - mean) + bias from one pass over x."""
        if isinstance(blocks, ChannelGroups):
            term = Term(whitener, self.kernels.split(blocks, x), mean)
            scale, offset = _by_block(weight, mean), _by_block(bias, mean)
            return affine_map([term], offset, blocks.block_axis, x.dtype, scale).reshape(x.shape)
        groups = GroupedSamples.of(blocks, x)
        if groups is None:
            result: Tensor = super().apply(blocks, x, mean, whitener, weight, bias)
            return result
        affine = groups.affine(weight=weight, bias=bias)
        y = affine_map([Term(whitener, groups.x, mean)], None, blocks.block_axis, x.dtype, channel_affine=affine)
        return y.reshape(x.shape)

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
        """Return the gradients; Newton's iteration takes four launches if only y has a gradient, from this worker."""
        steps = spec.solver.newton_steps(x.element_size())
        is_complete = all(each is not None for each in stats)
        if steps is None or spec.all_reduce is not None or not is_complete or any(d is not None for d in dstats):
            return super().backward(spec, x, weight, bias, stats, dy, dstats)
        if isinstance(spec.blocks, ChannelGroups):
            x4, dy4 = (self.kernels.split(spec.blocks, each) for each in (x, dy))
            dx, dweight, dbias = _iter_norm_gradients(x4, weight, bias, stats, dy4, spec.eps, steps)
            return dx.reshape(x.shape), dweight, dbias
        groups, dy_groups = GroupedSamples.of(spec.blocks, x), GroupedSamples.of(spec.blocks, dy)
        if groups is None or dy_groups is None:
            return super().backward(spec, x, weight, bias, stats, dy, dstats)
        dx, dweight, dbias = _group_whitening_gradients(groups, weight, bias, stats, dy_groups, spec.eps, steps)
        return dx.reshape(x.shape), dweight, dbias


def _iter_norm_gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Statistics, dy: Tensor, eps: float, steps: int
) -> Gradients:
    """Return the gradients of x, weight and bias for x and dy (p, q, d, l)."""
    samples = x.shape[0] * x.shape[3]
    scale = _by_block(weight, stats.mean)
    moments = combine_cross_moments(*partial_cross_moments(dy, x, stats.mean, 1), samples, scale, stats.whitener)
    a = stats.whitener if moments.scaled_whitener is None else moments.scaled_whitener
    b = inverse_sqrt_adjoint(stats.covariance, moments.k, eps, steps, samples)
    dx = affine_map([Term(a.mT, dy, moments.mean_s), Term(b, x, stats.mean)], None, 1, x.dtype)
    return dx, _of_channels(moments.row_scale_gradient, weight), _of_channels(moments.s, bias)


def _group_whitening_gradients(
    groups: GroupedSamples,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Statistics,
    dy_groups: GroupedSamples,
    eps: float,
    steps: int,
) -> Gradients:
    """Return the gradients of x (N, q, d, l), weight and bias."""
    x, dy = groups.x, dy_groups.x
    samples = x.shape[1] * x.shape[3]
    partial = partial_sample_cross_moments(dy_groups, groups, stats.mean, stats.whitener, weight, bias)
    moments = combine_cross_moments(partial.sums, partial.products, samples)
    b = inverse_sqrt_adjoint(stats.covariance, moments.k, eps, steps, samples)
    terms = [Term(stats.whitener.mT, dy, moments.mean_s), Term(b, x, stats.mean)]
    dx = affine_map(terms, None, 0, x.dtype, channel_affine=groups.affine(input_weight=weight))
    return dx, _sum_of_parts(partial.dweight, weight), _sum_of_parts(partial.dbias, bias)


def _num_variables(spec: WhiteningSpec | None, x: Tensor, others: Sequence[Tensor | None]) -> int | None:
    """Return the number of variables of a block, None if it isn't known."""
    if spec is not None:
        d: int = spec.blocks.split(x.shape)[2]
        return d
    if not others:  # x are covariances
        return x.shape[-1]
    whitener = others[1] if len(others) == 4 else None  # frozen statistics have one, a mask has none
    return None if whitener is None else whitener.shape[-1]


def _by_block(values: Tensor | None, mean: Tensor) -> Tensor | None:
    """Return values (C,) as (blocks, d)."""
    return None if values is None else values.reshape(mean.shape)


def _of_channels(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """Return a gradient (blocks, d) in the shape and dtype of its parameter (C,)."""
    return None if gradient is None or parameter is None else gradient.reshape(-1).to(parameter.dtype)


def _sum_of_parts(parts: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """Return the sum of a gradient's parts (parts, C) in the dtype of its parameter."""
    return None if parts is None or parameter is None else parts.sum(0).to(parameter.dtype)
