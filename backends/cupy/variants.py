"""Which variants of the CUDA kernels there are, what memory they need, and how many programs of them run.

A program is a CUDA block. The sources' own numbers that a launch needs are here.
"""

from __future__ import annotations

from typing import Any, Protocol

from polywhiten._types import Array

TYPES = {"e": "half", "f": "float", "d": "double"}  # of float16, float32 and float64 by NumPy's letter, in CUDA
SIZES = (4, 16, 32, 64)  # variables that a variant is made for; it serves fewer too

PRODUCT_THREADS = 256
AFFINE_THREADS = AFFINE_TILE = 128
NEWTON_THREADS = {4: 4, 16: 64, 32: 256, 64: 256}
ROOT_MATRICES, ADJOINT_MATRICES = 3, 6  # that Newton's iteration works in, and its adjoint
STATIC = 4096  # bytes of shared memory that maps and Newton's iteration have at most beside what they are given
LIMIT = 2**30  # samples of a block, and programs: the kernels count both in 32 bits

_PACK = 16  # bytes


class Launcher(Protocol):
    """What runs a kernel: `CudaLauncher`, but for tests."""

    @property
    def processors(self) -> int: ...

    @property
    def shared_memory(self) -> int: ...

    def counters(self, count: int) -> Array:
        """So many counters of 32 bits or more, all 0, for launches on the current stream, which leave them so."""

    def __call__(
        self, file: str, name: str, programs: int, threads: int, arguments: tuple[Any, ...], shared: int = 0
    ) -> None: ...


def variant(d: int) -> int:
    """The size of the variant for d variables."""
    return next((size for size in SIZES if d <= size), SIZES[-1])


def is_sized(x: Array, block_axis: int) -> bool:
    """Whether an array (p, q, d, l) has something to be whitened, and no more than the kernels count."""
    p, q, d, l = x.shape
    blocks, count = (p, q * l) if block_axis == 0 else (q, p * l)
    return bool(0 < d <= SIZES[-1] and 0 < count < LIMIT and 0 < blocks * SIZES[-1] < LIMIT)


def newton_memory(size: int, itemsize: int, matrices: int) -> int:
    """Bytes of shared memory for Newton's iteration of statistics of so many bytes a number."""
    return matrices * size * (size * itemsize + _PACK)


def map_memory(size: int, itemsize: int, terms: int) -> int:
    """Bytes of shared memory for an affine map of so many terms."""
    pack = _PACK // itemsize
    return itemsize * size * (AFFINE_TILE + pack + terms * (size + pack))


def map_programs(processors: int, blocks: int, count: int) -> int:
    """Programs of an affine map for each block: three at a time, as far as registers allow."""
    return programs_each(processors, blocks, -(-count // AFFINE_TILE), 3)


def programs_each(processors: int, blocks: int, parts: int, at_once: int) -> int:
    """Programs for each block, which can be cut in `parts`, where a multiprocessor runs some at once.

    One round of programs where that fills the multiprocessors; else four, as the last may leave most of them idle.
    """
    places = processors * at_once
    rounds = 1 if 4 * blocks <= places else 4
    return max(1, min(parts, rounds * places // blocks))


def stretches(processors: int, blocks: int, count: int, tile: int, at_once: int = 2) -> tuple[int, int]:
    """Programs for each block, and the samples that each adds up: 8 tiles or more, for what is left of them."""
    return cut(count, tile, programs_each(processors, blocks, -(-count // (8 * tile)), at_once))


def cut(count: int, tile: int, parts: int) -> tuple[int, int]:
    """No more parts than asked for, and the samples of each, which are whole tiles."""
    stretch = -(-count // (parts * tile)) * tile
    return -(-count // stretch), stretch


def along_samples(shape: tuple[int, ...], between_samples: int, between_variables: int) -> int:
    """Whether neighbouring threads should take neighbouring samples rather than variables, of (p, q, d, l)."""
    return int(shape[2] == 1 or abs(between_samples) < abs(between_variables))
