"""PyTorch: modules, their tracking, and the functions of `polywhiten` as differentiable operations."""

from polywhiten import (
    WhiteningStats,
    apply_whitening,
    group_whiten,
    group_whiten_vjp,
    inverse_sqrt,
    iter_norm,
    iter_norm_vjp,
    whitening_stats,
)
from polywhiten.torch.backend import BACKEND
from polywhiten.torch.modules import GroupWhitening, IterNorm
from polywhiten.torch.tracking import track

__all__ = [
    "BACKEND",
    "GroupWhitening",
    "IterNorm",
    "WhiteningStats",
    "apply_whitening",
    "group_whiten",
    "group_whiten_vjp",
    "inverse_sqrt",
    "iter_norm",
    "iter_norm_vjp",
    "track",
    "whitening_stats",
]
