"""How compiled kernels run: in parallel, from a cache of compiled code, writing to large pages of memory."""
