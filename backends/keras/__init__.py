"""Keras 3 on TensorFlow, JAX and PyTorch: layers, functions that change models or track them, whitened embeddings."""

from polywhiten.keras.dense_export import dense
from polywhiten.keras.layers import GroupWhitening, IterNorm
from polywhiten.keras.networks.convert import convert
from polywhiten.keras.networks.fold import fold
from polywhiten.keras.tracking import WhiteningTracker

__all__ = ["GroupWhitening", "IterNorm", "WhiteningTracker", "convert", "dense", "fold"]
