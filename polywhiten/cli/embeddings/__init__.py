"""The commands that fit whitenings to embeddings in files, apply them, and look into embeddings."""
