"""Whitening of activations in every Python array library: IterNorm and group whitening."""

from pathlib import Path
from typing import TYPE_CHECKING

from polywhiten._checkout import backends_beside
from polywhiten.embeddings.recipe import RankWarning
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

if TYPE_CHECKING:
    from polywhiten.embeddings.whitening import Whitening as Whitening

__version__ = "0.1.0"

__path__ += backends_beside(Path(__path__[0]))

# without Whitening: backends import all of these names, which would import scikit-learn too
__all__ = [
    "RankWarning",
    "WhiteningStats",
    "apply_whitening",
    "group_whiten",
    "group_whiten_vjp",
    "inverse_sqrt",
    "iter_norm",
    "iter_norm_vjp",
    "whitening_stats",
]


def __getattr__(name: str) -> type:
    """Import the estimator when it is first asked for: scikit-learn, whose base classes it takes, needs a second."""
    if name == "Whitening":
        from polywhiten.embeddings.whitening import Whitening

        return Whitening
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
