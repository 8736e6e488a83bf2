"""Kernels for arrays in the memory of the CPU, compiled by Numba for the processor at hand: NumPy's and PyTorch's."""

from functools import cache


@cache
def is_available() -> bool:
    """Whether Numba is there, for this version of NumPy."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True
