"""Kernels for arrays in the memory of the CPU, compiled by Numba for the processor at hand: NumPy's and PyTorch's."""

import os
from functools import cache

FORKED: list[bool] = []  # not empty in a forked process, which can't use the threads that its parent may have had
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: FORKED.append(True))


@cache
def is_available() -> bool:
    """Whether Numba is there, for this version of NumPy."""
    try:
        import numba  # noqa: F401
    except Exception:  # a broken one raises what it will, and plain kernels need none of it
        return False
    return True
