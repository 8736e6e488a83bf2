"""ONNX: a fitted whitening of embeddings as a model for any ONNX runtime."""

from polywhiten.onnx.graph import model

__all__ = ["model"]
