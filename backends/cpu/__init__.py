"""Kernels for NumPy's and PyTorch's arrays in the CPU's memory, compiled by Numba for the processor that runs them."""

from functools import cache

import polywhiten.cpu.runtime.fork  # noqa: F401  # registers itself before the process may fork


@cache
def is_available() -> bool:
    """Return whether Numba can be imported, with the installed version of NumPy."""
    try:
        import numba  # noqa: F401
    except Exception:  # a broken installation raises anything, and the plain kernels don't need Numba
        return False
    return True
