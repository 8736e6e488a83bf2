"""PyTorch: modules, and the functions of `polywhiten` as differentiable operations."""

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
from polywhiten.torch.autograd import BACKEND
from polywhiten.torch.modules import GroupWhitening, IterNorm

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
    "whitening_stats",
]
