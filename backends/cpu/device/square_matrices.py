"""Operations on padded square matrices, which several workers share by columns of tiles."""

from polywhiten.cpu.device.device_function import device_function
from polywhiten.cpu.device.gemm_microkernel import TILE_PAIR, Matrix, StridedMatrix, gemm_microkernel
from polywhiten.cpu.device.pointers import as_int64, at, cast, get, put
from polywhiten.cpu.device.prefetch import PrefetchList
from polywhiten.cpu.device.simd import add_transposed_tile, transpose_tile
from polywhiten.cpu.tuning import TILE


@device_function
def product(target, beta, base, alpha, a, b, n, ld, upper, mirrors, zeros, part, num_parts):
    """Compute target = beta base + alpha A B; the target may be the base, but not A or B.

    If `upper`, only the tiles on and above the diagonal are computed. If `mirrors`, they are copied below it.
    """
    step = TILE_PAIR if n >= 2 * TILE_PAIR * num_parts else TILE
    strips = (n + step - 1) // step
    for turn in range((strips + num_parts - 1) // num_parts):
        place = turn * num_parts + (part if turn % 2 == 0 else num_parts - 1 - part)
        # the longest strips come first, so that those that some workers wait for in the end are short
        left = step * (strips - 1 - place)
        rows = 0 if left < 0 else min(n, left + step) if upper else n
        for i in range(0, rows, TILE):
            j = left + TILE if upper and i > left else left
            columns = min(n, left + step) - j
            gemm_microkernel(
                Matrix(at(target, i * ld + j), ld),
                beta,
                Matrix(at(base, i * ld + j), ld),
                alpha,
                StridedMatrix(at(a, i * ld), ld, 1),
                Matrix(at(b, j), ld),
                n,
                columns,
                False,
                PrefetchList(as_int64(zeros), 0, 0, 0),
            )
            for k in range(j, j + columns, TILE):
                if mirrors and i < k:
                    transpose_tile(at(target, k * ld + i), ld, at(target, i * ld + k), ld, ())


@device_function
def add_transposed(target, m, factor, n, ld, part, num_parts):
    """Compute target = M + factor M'."""
    for j in range(part * TILE, n, num_parts * TILE):
        for i in range(0, n, TILE):
            add_transposed_tile(at(target, i * ld + j), at(m, i * ld + j), at(m, j * ld + i), factor, ld)


@device_function
def add_scaled(target, alpha, a, beta, b, n, ld, part, num_parts):
    """Compute target = alpha A + beta B."""
    for j in range(part * TILE, n, num_parts * TILE):
        for i in range(n):
            row, a_row, b_row = at(target, i * ld + j), at(a, i * ld + j), at(b, i * ld + j)
            for l in range(TILE):
                put(row, l, cast(row, alpha) * get(a_row, l) + cast(row, beta) * get(b_row, l))
