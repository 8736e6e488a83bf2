"""Measures whether whitening helps retrieval, similarity and classification on real embeddings."""
