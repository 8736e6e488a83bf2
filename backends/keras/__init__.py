"""Keras 3: layers for its TensorFlow, JAX and PyTorch backends."""

from polywhiten.keras.layers import GroupWhitening, IterNorm

__all__ = ["GroupWhitening", "IterNorm"]
