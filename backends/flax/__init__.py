"""Flax: layers of its NNX API, which compute with JAX's backend."""

from polywhiten.flax.group_whitening import GroupWhitening
from polywhiten.flax.iter_norm import IterNorm

__all__ = ["GroupWhitening", "IterNorm"]
