"""JAX: the functions of `polywhiten` as differentiable operations, with statistics over mapped axes.

Gradients are polywhiten's own, registered by `jax.custom_vjp`: reverse mode can be nested, forward mode is missing.
"""

import polywhiten
from polywhiten import *  # noqa: F403
from polywhiten.jax.backend import BACKEND
from polywhiten.jax.functional import (
    apply_whitening,
    group_whiten,
    group_whiten_vjp,
    inverse_sqrt,
    iter_norm,
    iter_norm_vjp,
    psum,
    whitening_stats,
)

__all__ = [
    "BACKEND",
    "apply_whitening",
    "group_whiten",
    "group_whiten_vjp",
    "inverse_sqrt",
    "iter_norm",
    "iter_norm_vjp",
    "psum",
    "whitening_stats",
]
__all__ += polywhiten.__all__
