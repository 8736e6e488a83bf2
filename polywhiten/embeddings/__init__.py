"""Whitening of embeddings: rows of a table that is read once, in batches, and may be larger than memory."""
