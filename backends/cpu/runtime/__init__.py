"""How compiled kernels are run: in parallel, from a cache of compiled code, in large pages of memory."""
