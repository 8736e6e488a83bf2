"""FAISS: a fitted whitening of embeddings as a transform of vectors, and indexes that apply it."""

from polywhiten.faiss.transforms import linear_transform, whitened_index

__all__ = ["linear_transform", "whitened_index"]
