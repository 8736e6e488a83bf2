"""The variants of the CUDA kernels, and the threads and shared memory that they need.

The constants here have to agree with those in the CUDA sources.
"""

from __future__ import annotations

from polywhiten._types import Shape

TYPES = {"e": "half", "f": "float", "d": "double"}  # CUDA's name of a dtype by NumPy's letter
SIZES = (4, 16, 32, 64)  # the numbers of variables for which there are variants; each serves fewer variables too

PRODUCT_THREADS = 256
MAP_THREADS = MAP_TILE = 128
NEWTON_THREADS = {4: 4, 16: 64, 32: 256, 64: 256}
ROOT_MATRICES, ADJOINT_MATRICES = 3, 6  # in shared memory during Newton's iteration and its adjoint
STATIC_BYTES = 4096  # bound of the static shared memory of maps and of Newton's iteration
MAX_COUNT = 2**30  # of samples in a block, and of thread blocks: the kernels count both in 32 bits

_PACK_BYTES = 16


def variant_size(d: int) -> int:
    """Return the size of the variant for d variables."""
    return next((size for size in SIZES if d <= size), SIZES[-1])


def fits_variants(shape: Shape, block_axis: int) -> bool:
    """Return whether an array (p, q, d, l) has elements, and no more variables, samples or blocks than kernels take."""
    p, q, d, l = shape
    blocks, count = (p, q * l) if block_axis == 0 else (q, p * l)
    return bool(0 < d <= SIZES[-1] and 0 < count < MAX_COUNT and 0 < blocks * SIZES[-1] < MAX_COUNT)


def newton_bytes(size: int, itemsize: int, matrices: int) -> int:
    """Return the dynamic shared memory of Newton's iteration on statistics of this item size."""
    return matrices * size * (size * itemsize + _PACK_BYTES)


def map_bytes(size: int, itemsize: int, terms: int) -> int:
    """Return the dynamic shared memory of an affine map whose matrices have this item size."""
    pack = _PACK_BYTES // itemsize
    return itemsize * size * (MAP_TILE + pack + terms * (size + pack))


def along_samples(shape: Shape, between_samples: int, between_variables: int) -> int:
    """Return whether neighbouring threads should take neighbouring samples, rather than variables, of (p, q, d, l)."""
    return int(shape[2] == 1 or abs(between_samples) < abs(between_variables))
