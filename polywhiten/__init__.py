"""Whitening of activations in every Python array library: IterNorm and group whitening."""

from pathlib import Path

from polywhiten._checkout import backends_beside
from polywhiten.functional import (
    apply_whitening,
    group_whiten,
    group_whiten_vjp,
    inverse_sqrt,
    iter_norm,
    iter_norm_vjp,
    whitening_stats,
)
from polywhiten.statistics import WhiteningStats

__version__ = "0.1.0"

__path__ += backends_beside(Path(__path__[0]))

__all__ = [
    "WhiteningStats",
    "apply_whitening",
    "group_whiten",
    "group_whiten_vjp",
    "inverse_sqrt",
    "iter_norm",
    "iter_norm_vjp",
    "whitening_stats",
]
