"""Keras 3: layers, what converts and folds models, and a callback that tracks them, for TensorFlow, JAX and PyTorch."""

from polywhiten.keras.layers import GroupWhitening, IterNorm
from polywhiten.keras.networks.convert import convert
from polywhiten.keras.networks.fold import fold
from polywhiten.keras.tracking import WhiteningTracker

__all__ = ["GroupWhitening", "IterNorm", "WhiteningTracker", "convert", "fold"]
