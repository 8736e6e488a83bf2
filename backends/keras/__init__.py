"""Keras 3: layers, and a callback that tracks them, for its TensorFlow, JAX and PyTorch backends."""

from polywhiten.keras.layers import GroupWhitening, IterNorm
from polywhiten.keras.tracking import WhiteningTracker

__all__ = ["GroupWhitening", "IterNorm", "WhiteningTracker"]
