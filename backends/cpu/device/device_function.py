"""The decorator of the functions that kernels call."""

from functools import partial

from numba import njit

# Numba adds two functions to each compiled one, for callers in Python and in C, and compiles them too: a tenth of the
# time that the first use takes. Kernels don't need them. Python would crash if it called such a function: `geometry`
# has those that it needs.
device_function = partial(njit, no_cpython_wrapper=True, no_cfunc_wrapper=True)
