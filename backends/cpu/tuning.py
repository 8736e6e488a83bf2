"""Constants that were tuned, and what they were measured on."""

# Memory

# Bytes of a result from which it gets large pages. PyTorch, two threads, (32, 256, 56, 56) float32: 163 to 113 ms a
# step. Results of 6 MB gained nothing or lost, as the allocator keeps their pages.
MIN_LARGE_PAGES_BYTES = 1 << 23

# Schedules

# Multiply-adds of d x d matrices that are worth another thread. Not measured by itself: 2 ** 18 take a core some 10 us,
# about as long as waking a thread.
MIN_OPS_PER_THREAD = 1 << 18

# Size d from which threads share the phases of each matrix, if there are fewer matrices than threads. Not recorded.
MIN_SHARED_SIZE = 160

# Bytes of a block of channels up to which all steps of a block follow each other in one thread. Blocks of samples have
# no limit: they are read in their order in memory anyway. Not recorded.
MAX_CACHED_BLOCK_BYTES = 1 << 19

# Bytes of a result from which rows of it bypass the caches. Its next reader is no slower then: it has to fetch the
# result from memory anyway.
STREAMING_STORE_BYTES = 1 << 22

# Bytes of workspace that a thread keeps for its next call: new memory costs more than a small kernel.
MAX_KEPT_BYTES = 1 << 27

# Plans that are kept, each for a spec, shapes and strides. Making one takes several times as long as looking it up.
MAX_KEPT_PLANS = 512

# Elements of dY, and as many of X, in a panel of rows with few channels: the first cache has room for both beside their
# products.
ROW_PANEL_SIZE = 1 << 12
