"""The steps of whitening as launches: each adds those of one kernel of `polywhiten.kernels`, or of a part of it.

Arrays are addresses in the launches' args. A step can be shared by any number of workers, up to the number of blocks
or panels. If there are as many parts as blocks, and blocks have one chunk, a part of any step is one block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from polywhiten.cpu import tuning
from polywhiten.cpu.arguments import (
    AffineMapArgs,
    CombineCrossMomentsArgs,
    CombineMomentsArgs,
    CrossMomentsArgs,
    InverseSqrtArgs,
    MomentsArgs,
    TermArgs,
)
from polywhiten.cpu.device import newton
from polywhiten.cpu.device.affine_map import affine_map, pack_matrices
from polywhiten.cpu.device.channels import Channels
from polywhiten.cpu.device.cross_moments import combine_cross_moments, cross_moments
from polywhiten.cpu.device.moments import combine_moments, moments
from polywhiten.cpu.device.panels import Layout
from polywhiten.cpu.device.simd import CACHE_LINE
from polywhiten.cpu.geometry import newton_workspace_size, num_newton_phases, num_panels, padded
from polywhiten.cpu.launches import Address, IsAligned, LaunchBuilder
from polywhiten.cpu.layout import is_read_as_rows

Pointer = Address | int
NO_ARRAY: Pointer = 0
NO_CHANNELS = Channels(0, 1)


class BlockArray(NamedTuple):
    """An array of blocks."""

    address: Address
    layout: Layout


class NewtonSteps(NamedTuple):
    """How inverse square roots are computed."""

    steps: int
    eps: float
    shares_phases: bool  # whether all workers work on each matrix together, else each on its own matrices
    kept: int = -1  # where in each worker's workspace all iterates are kept, in elements; -1 if they aren't


class ChannelAffine(NamedTuple):
    """Weight and bias (channels,) of channels along the samples, applied to the input of a map or to its result."""

    channels: Channels
    input_weight: Pointer = 0
    output_weight: Pointer = 0
    bias: Pointer = 0


NO_AFFINE = ChannelAffine(NO_CHANNELS)


class WeightSums(NamedTuple):
    """What the gradients of channels' weight and bias are summed up by, on the way to the cross moments."""

    channels: Channels
    whitener: Address
    weight: Pointer
    begin: int  # of the sums (2, channels) of float64 in each worker's workspace, in elements


def add_moments(
    builder: LaunchBuilder, x: BlockArray, block_axis: int, num_chunks: int, mean: Address, cov: Address
) -> tuple[Callable[..., None], Any]:
    """Add the sums of each block, in several chunks, and return the launch that finishes mean and covariance."""
    layout, dp = x.layout, padded(x.layout.d)
    args = MomentsArgs(
        num_chunks=num_chunks,
        as_rows=is_read_as_rows(layout, block_axis),
        x=x.address,
        products=builder.temporary(layout.blocks * num_chunks * dp * dp),
        panel_means=builder.temporary(layout.blocks * num_panels(layout) * dp),
        layout=layout,
    )
    builder.launch(moments, args)
    return combine_moments, CombineMomentsArgs(args, mean, cov)


def add_cross_moments(
    builder: LaunchBuilder,
    dy: BlockArray,
    x: BlockArray,
    block_axis: int,
    num_chunks: int,
    mean: Address,
    s: Address,
    k: Address,
    weight_sums: WeightSums | None = None,
) -> tuple[Callable[..., None], Any]:
    """Add the sums of each block, in several chunks, and return the launch that finishes s and K."""
    layout, dp = x.layout, padded(x.layout.d)
    args = CrossMomentsArgs(
        num_chunks=num_chunks,
        as_rows=is_read_as_rows(layout, block_axis),
        dy=dy.address,
        x=x.address,
        mean=mean,
        sums=builder.temporary(layout.blocks * num_chunks * dp * (dp + 1)),
        whitener=weight_sums.whitener if weight_sums else 0,
        weight=weight_sums.weight if weight_sums else 0,
        parameter_sums=weight_sums.begin if weight_sums else 0,
        channels=weight_sums.channels if weight_sums else NO_CHANNELS,
        dy_layout=dy.layout,
        x_layout=layout,
    )
    builder.launch(cross_moments, args)
    return combine_cross_moments, CombineCrossMomentsArgs(num_chunks, layout.blocks, layout.d, args.sums, s, k)


def add_affine_map(
    builder: LaunchBuilder,
    terms: Sequence[TermArgs],
    y: BlockArray,
    block_axis: int,
    shift: Pointer = 0,
    row_scale: Pointer = 0,
    affine: ChannelAffine = NO_AFFINE,
) -> None:
    """Add y = the sum of the terms, plus the shift of each block. Samples of y and of all terms have the same order."""
    layout, (first, *others) = y.layout, terms
    dp, as_rows = padded(layout.d), is_read_as_rows(layout, block_axis)
    by_block = builder.num_parts is not None
    nontemporal: Any = as_rows and _may_bypass_caches(layout, builder.itemsize)
    if nontemporal:
        nontemporal = IsAligned(y.address.array)
    args = AffineMapArgs(
        num_terms=len(terms),
        as_rows=as_rows,
        first=first,
        second=others[0] if others else TermArgs(0, 0, 0, layout),
        row_scale=row_scale,
        packed_matrices=builder.temporary(layout.blocks * len(terms) * dp * dp),
        y=y.address,
        shift=shift,
        input_weight=affine.input_weight,
        output_weight=affine.output_weight,
        channel_bias=affine.bias,
        channels=affine.channels,
        panels_first=not by_block and (as_rows or layout.block_stride < layout.outer_stride),
        nontemporal=nontemporal,
        y_layout=layout,
    )
    builder.launch(pack_matrices, args)
    builder.launch(affine_map, args)


def _may_bypass_caches(layout: Layout, itemsize: int) -> bool:
    """Return whether y is so large that this pays, and all rows begin where cache lines do if the first one does."""
    size = layout.blocks * layout.outer * layout.d * layout.inner * itemsize
    strides = layout.block_stride * itemsize, layout.inner_stride * itemsize
    return size >= tuning.STREAMING_STORE_BYTES and all(stride % CACHE_LINE == 0 for stride in strides)


def add_inverse_sqrt(
    builder: LaunchBuilder, how: NewtonSteps, blocks: int, d: int, cov: Address, whitener: Address
) -> None:
    """Add W = (cov + eps I)^(-1/2)."""
    _add_iteration(builder, how, _iteration_args(builder, how, blocks, d, cov)._replace(whitener=whitener), False)


def add_inverse_sqrt_adjoint(
    builder: LaunchBuilder,
    how: NewtonSteps,
    blocks: int,
    d: int,
    cov: Address,
    grad: Address,
    dcov: Address,
    row_scale: Pointer = 0,
    whitener: Pointer = 0,
) -> None:
    """Add the gradient with respect to cov, where the rows of that of W are scaled first; W itself if asked for.

    If iterates are kept, `add_inverse_sqrt` has computed them.
    """
    args = _iteration_args(builder, how, blocks, d, cov)
    args = args._replace(whitener=whitener, grad=grad, row_scale=row_scale, dcov=dcov)
    _add_iteration(builder, how, args, True)


def _iteration_args(builder: LaunchBuilder, how: NewtonSteps, blocks: int, d: int, cov: Address) -> InverseSqrtArgs:
    return InverseSqrtArgs(
        phase=-1,
        kept=how.kept,
        blocks=blocks,
        d=d,
        steps=how.steps,
        eps=how.eps,
        smallest_normal=float(np.finfo(builder.dtype).smallest_normal),
        matrices=0,
        cov=cov,
        whitener=0,
        grad=0,
        row_scale=0,
        dcov=0,
    )


def _add_iteration(builder: LaunchBuilder, how: NewtonSteps, args: InverseSqrtArgs, derivative: bool) -> None:
    """Add one launch, in whose parts workers have matrices of their own, or one for each phase if they share them."""
    kernel, phases = newton.inverse_sqrt_adjoint if derivative else newton.inverse_sqrt, [-1]
    if how.shares_phases:
        phases = list(range(num_newton_phases(how.steps, derivative)))
        args = args._replace(matrices=builder.temporary(args.blocks * newton_workspace_size(args.d, derivative)))
    for phase in phases:
        builder.launch(kernel, args._replace(phase=phase))
