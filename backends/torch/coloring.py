"""Coloring: a learned matrix for each group of channels, which multiplies the whitened channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from polywhiten.blocks import ChannelGroups, take_channels
from polywhiten.solvers.eigh import Eigh
from polywhiten.spec import WhiteningSpec
from polywhiten.torch._internals import as_non_view, can_bypass_autograd
from polywhiten.torch.backend import BACKEND
from polywhiten.torch.kernels import full_precision, is_tracing, on_device_of


def color(z: Tensor, matrices: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    """Return matrices z + bias for whitened channels z at `axis`, matrices (groups, d, d) and bias (C,).

    If the last group is smaller, the upper left corner of its matrix counts.
    """
    if is_tracing():
        return _colored(z, matrices, bias, axis)
    if not torch.compiler.is_compiling() and can_bypass_autograd([t for t in (z, matrices, bias) if t is not None]):
        return as_non_view(_colored(z, matrices, bias, axis))
    y: Tensor = _Color.apply(z, matrices, bias, axis)
    return y


@full_precision
def colored_whitener(matrices: Tensor, whitener: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the products of coloring matrices and whiteners, both (groups, d, d), in the dtype of statistics.

    A smaller last whitener is in the upper left corner, with zeros around it, so this corner of the product is right.
    """
    return matrices.to(dtype) @ whitener.to(dtype)


def diagonal_matrices(weight: Tensor, like: Tensor) -> Tensor:
    """Return the coloring matrices, of the shape of `like`, that multiply channels by weights (C,)."""
    groups, d, _ = like.shape
    filling = weight.new_ones(groups * d - len(weight))
    return torch.diag_embed(torch.cat([weight, filling]).reshape(groups, d))


class _Color(torch.autograd.Function):
    """The map and its gradients by the fastest kernels for the tensors; the input is saved for backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, matrices: Tensor, bias: Tensor | None, axis: int) -> Tensor:
        return as_non_view(_colored(z, matrices, bias, axis))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, matrices, bias, ctx.axis = inputs
        ctx.save_for_backward(z, matrices, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, matrices, bias = ctx.saved_tensors
        needs_dz, *needs_parameters, _ = ctx.needs_input_grad
        dz = _colored(dy, matrices.transpose(1, 2), None, ctx.axis) if needs_dz else None
        dmatrices = dbias = None
        if any(needs_parameters):
            sums, products = _sums_and_products(dy, z, matrices.shape[-1], ctx.axis)
            dmatrices = products.to(matrices.dtype)
            dbias = None if bias is None else sums.to(bias.dtype)
        return dz, dmatrices, dbias, None


@full_precision
def _colored(z: Tensor, matrices: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    mean = matrices.new_zeros(z.shape[axis])
    return BACKEND.apply_frozen(axis, z, mean, matrices, None, bias)


@full_precision
def _sums_and_products(dy: Tensor, z: Tensor, d: int, axis: int) -> tuple[Tensor, Tensor]:
    """Return the sums of dy over all samples, (C,), and the products dY Z' of groups of d channels, (groups, d, d)."""
    z, last, _ = BACKEND.in_memory_order(z, axis)
    dy = dy.movedim(axis, last)
    sums, products = [], []
    spec = WhiteningSpec(ChannelGroups(last, d), Eigh(), eps=0.0)  # nothing is solved
    for part, equal in spec.equal_parts(z):
        dy_part, z_part = take_channels(dy, part, last), take_channels(z, part, last)
        with on_device_of(z):
            kernels = BACKEND.implementation(equal, z_part, None, None, dy_part).kernels
            dy4, z4 = kernels.split(equal.blocks, dy_part), kernels.split(equal.blocks, z_part)
            zeros = z.new_zeros(z4.shape[1:3], dtype=kernels.accumulation_dtype(z.dtype))
            s, k = kernels.cross_moments(dy4, z4, zeros, equal.blocks.block_axis)
        missing = d - k.shape[-1]
        sums.append(s.reshape(-1))
        products.append(functional.pad(k, (0, missing, 0, missing)))
    return torch.cat(sums), torch.cat(products)
