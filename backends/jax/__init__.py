"""JAX: the functions of `polywhiten` as differentiable operations, with statistics over mapped axes.

Gradients are the core's own, by `jax.custom_vjp`: reverse mode, as often as wanted, and no forward mode.
"""

from polywhiten import WhiteningStats, apply_whitening, group_whiten, group_whiten_vjp, inverse_sqrt
from polywhiten.jax.functional import iter_norm, iter_norm_vjp, whitening_stats
from polywhiten.jax.gradients import BACKEND

__all__ = [
    "BACKEND",
    "WhiteningStats",
    "apply_whitening",
    "group_whiten",
    "group_whiten_vjp",
    "inverse_sqrt",
    "iter_norm",
    "iter_norm_vjp",
    "whitening_stats",
]
