"""The kernels that Numba compiles for the processor, and what they are made of."""
