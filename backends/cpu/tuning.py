"""Constants that were tuned, and what they were measured on.

"EPYC" is two cores of an AMD EPYC with AVX-512, "Xeon" two of an Intel Xeon with AVX-512, and "AVX2" is that EPYC
restricted to AVX2; all with float32.
`benchmarks/README.md` has more of these measurements.
"""

# Tiles, panels and memory

# Rows and columns of a tile; all padded sizes are multiples of it. EPYC, one core: 16 x 16 results in registers give
# 115 GFLOP/s, where MKL's product of matrices 2048 x 2048 gives 93. Other sizes were not measured.
TILE = 16

# Vectors of results in a row of a block, whose products share an element of A. Xeon, one core, blocks of 8 x 2 and not
# 16 x 1 vectors, with workspaces aligned to cache lines: 117 to 145 GFLOP/s became 146 to 180, by shape. AVX2, one
# core, blocks of 6 x 2 and 5 x 2 and not 4 x 2: 82 to 89 GFLOP/s became 105 to 112.
VECTORS_PER_ROW = 2

# Steps of a product between prefetches, a few lines each. Xeon: training steps in 0.86 to 1.05 of the time that bursts
# of prefetches between tiles take. Other intervals were not measured.
PREFETCH_INTERVAL = 16

# Samples in a panel. Xeon, two threads: 128 and 64, which fit the first cache, took 0.98 to 1.1 of the time.
PANEL_WIDTH = 256

# Elements by which lines of a packed panel are longer than their data. Not measured.
LD_PADDING = TILE

# Rows of an array that are read column by column, so that few pages are in use at a time. Not measured.
NEARBY_ROWS = 4 * TILE

# Elements of a run that vectors of a tile's size copy; LLVM's own loop copies longer runs faster. EPYC, (32, 256, 14,
# 14), 16 groups, channels last: loading took 0.13 ns an element with LLVM's loop for short runs, 0.08 with vectors.
MAX_VECTORIZED_RUN = 4 * TILE

# Bytes of a result from which it gets large pages. EPYC, two threads, PyTorch, (32, 256, 56, 56): 163 to 113 ms a
# training step. Results of 6 MB gained nothing or lost, as the allocator keeps their pages.
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
