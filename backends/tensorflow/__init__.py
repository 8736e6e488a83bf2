"""TensorFlow: the functions of `polywhiten` as differentiable operations, eagerly, in graphs and under XLA."""

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
from polywhiten.tensorflow.gradient import BACKEND
from polywhiten.tensorflow.replicas import sum_over_replicas

__all__ = [
    "BACKEND",
    "WhiteningStats",
    "apply_whitening",
    "group_whiten",
    "group_whiten_vjp",
    "inverse_sqrt",
    "iter_norm",
    "iter_norm_vjp",
    "sum_over_replicas",
    "whitening_stats",
]
