"""Masks, which say at which positions of an input a layer takes its statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polywhiten import checks


def check_mask(mask: Any, x: Tensor, axis: int) -> None:
    """Raise an error if a mask isn't boolean, of the shape of x without its channel axis, and on the device of x."""
    if not isinstance(mask, Tensor):
        raise checks.wrong_type(mask, "mask", "a boolean tensor, as torch.as_tensor(mask, device=x.device)")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask has dtype {mask.dtype}: booleans are needed, true at positions that count; use mask.bool()"
        )
    wanted = (*x.shape[:axis], *x.shape[axis + 1 :])
    if tuple(mask.shape) != wanted:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}: {wanted} is needed, the shape of x, {tuple(x.shape)}, without its "
            "channel axis"
        )
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device} and x on {x.device}: move it, as mask.to(x.device)")


def unmasked(x: Tensor, mask: Tensor, axis: int) -> Tensor:
    """Return the positions of x where the mask is true, as rows (positions, channels)."""
    return x.movedim(axis, -1)[mask]
