"""Rows of embeddings in `.npy`, `.npz` and Parquet files, read and written in bounded memory."""

from polywhiten.embeddings.files.errors import FileError
from polywhiten.embeddings.files.source import FileRows, Piece, Source, open_source, pieces

__all__ = ["FileError", "FileRows", "Piece", "Source", "open_source", "pieces"]
