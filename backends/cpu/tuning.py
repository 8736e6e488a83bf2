"""Constants that were tuned, and what they were measured on."""

# Memory

# Bytes of a result from which it gets large pages. PyTorch, two threads, (32, 256, 56, 56) float32: 163 to 113 ms a
# step. Results of 6 MB gained nothing or lost, as the allocator keeps their pages.
MIN_LARGE_PAGES_BYTES = 1 << 23
