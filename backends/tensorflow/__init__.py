"""TensorFlow: the functions of `polywhiten` as differentiable operations, eagerly, in graphs and under XLA."""

import polywhiten
from polywhiten import *  # noqa: F403
from polywhiten.tensorflow.backend import BACKEND
from polywhiten.tensorflow.functional import (
    apply_whitening,
    group_whiten,
    group_whiten_vjp,
    inverse_sqrt,
    iter_norm,
    iter_norm_vjp,
    whitening_stats,
)
from polywhiten.tensorflow.replicas import sum_over_replicas

__all__ = [
    "BACKEND",
    "apply_whitening",
    "group_whiten",
    "group_whiten_vjp",
    "inverse_sqrt",
    "iter_norm",
    "iter_norm_vjp",
    "sum_over_replicas",
    "whitening_stats",
]
__all__ += polywhiten.__all__
