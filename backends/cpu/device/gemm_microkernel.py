"""The innermost loop of all products, in LLVM's vectors: a tile of results, computed in blocks that registers hold.

LLVM's optimizer keeps no block of a product in registers when it compiles Numba's own loops. Here the registers are
named: the block of results, the vectors of B beside it, and one element of A at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from polywhiten.cpu.device.prefetch import PrefetchList
from polywhiten.cpu.device.simd import FEATURES, VECTOR_BYTES, Vector, vector_length
from polywhiten.cpu.tuning import PREFETCH_INTERVAL, TILE, VECTORS_PER_ROW

TILE_PAIR = 2 * TILE  # columns of two tiles side by side

# Vectors of results in a block, beside which two vectors of B and an element of A are in registers: x86 has 32 with
# AVX-512, and 16 without.
_MAX_RESULT_VECTORS = 12 if "+sse" in FEATURES and VECTOR_BYTES < 64 else 16
# Rows of A whose addresses are computed from one pointer: x86 adds a register times 1 or 2 within an instruction.
_ROWS_PER_POINTER = 3
_INT = ir.IntType(64)


class Matrix(NamedTuple):
    """Rows of adjacent elements."""

    data: Any  # pointer to the first element
    ld: int  # elements from one row to the next one


class StridedMatrix(NamedTuple):
    """A matrix with any strides, in elements."""

    data: Any
    row_stride: int
    column_stride: int


@intrinsic
def blocks_per_tile(typingctx: Any, like: Any) -> Any:
    """Return how many blocks a tile of TILE columns has, which are computed one after another."""
    length = vector_length(like.dtype)
    width = min(VECTORS_PER_ROW, TILE // length)
    count = _INT(sum(count for _, count in _block_heights(width)) * TILE // (width * length))

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        return count

    return types.int64(like), generate


@intrinsic
def gemm_microkernel(
    typingctx: Any,
    c: Any,
    beta: Any,
    base: Any,
    alpha: Any,
    a: Any,
    b: Any,
    k: Any,
    columns: Any,
    nontemporal: Any,
    prefetch: Any,
) -> Any:
    """Compute C = beta base + alpha A B for TILE rows of TILE or TILE_PAIR columns.

    C, base and B are `Matrix`, A is a `StridedMatrix`; k is the number of A's columns. Non-temporal stores need rows
    of C that begin at multiples of CACHE_LINE. Each block of the tile prefetches `per_interval` addresses of the
    `PrefetchList` before every PREFETCH_INTERVAL of its k steps.
    """
    dtype = c.types[0].dtype

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        operands = _Operands.unpacked(builder, args)
        vector = Vector.of_dtype(context, builder, dtype)
        if VECTORS_PER_ROW * vector.length <= TILE:
            _multiply(builder, vector, VECTORS_PER_ROW, operands)
        else:
            is_narrow = builder.icmp_signed("<", operands.columns, _INT(TILE_PAIR))
            with builder.if_else(is_narrow) as (narrow, wide):
                with narrow:
                    _multiply(builder, vector, TILE // vector.length, operands)
                with wide:
                    _multiply(builder, vector, VECTORS_PER_ROW, operands)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(c, dtype, base, dtype, a, b, integer, integer, types.boolean, prefetch), generate


class _Operands(NamedTuple):
    """The arguments of `gemm_microkernel` in LLVM."""

    c: Matrix
    beta: ir.Value
    base: Matrix
    alpha: ir.Value
    a: StridedMatrix
    b: Matrix
    k: ir.Value
    columns: ir.Value
    nontemporal: ir.Value
    prefetch: PrefetchList

    @classmethod
    def unpacked(cls, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> _Operands:
        plain = cls(*args)
        return plain._replace(
            c=Matrix(*cgutils.unpack_tuple(builder, plain.c)),
            base=Matrix(*cgutils.unpack_tuple(builder, plain.base)),
            a=StridedMatrix(*cgutils.unpack_tuple(builder, plain.a)),
            b=Matrix(*cgutils.unpack_tuple(builder, plain.b)),
            prefetch=PrefetchList(*cgutils.unpack_tuple(builder, plain.prefetch)),
        )


class _Block(NamedTuple):
    """The part of a tile whose results are in registers at the same time."""

    top: ir.Value
    left: ir.Value
    height: int  # rows
    width: int  # vectors in each row
    prefetch_begin: ir.Value

    def row_pointers(self, builder: ir.IRBuilder, a: StridedMatrix) -> list[ir.Value]:
        """Return pointers to the first elements of every _ROWS_PER_POINTER-th of the block's rows."""
        tops = [builder.add(self.top, _INT(i)) for i in range(0, self.height, _ROWS_PER_POINTER)]
        return [builder.gep(a.data, [builder.mul(a.row_stride, top)]) for top in tops]

    def vector_pointers(self, builder: ir.IRBuilder, matrix: Matrix, length: int) -> list[ir.Value]:
        """Return pointers to the block's vectors, row by row."""
        starts = [builder.mul(matrix.ld, builder.add(self.top, _INT(i))) for i in range(self.height)]
        rows = [builder.gep(matrix.data, [builder.add(self.left, start)]) for start in starts]
        return [builder.gep(row, [_INT(j * length)]) for row in rows for j in range(self.width)]


def _block_heights(width: int) -> list[tuple[int, int]]:
    """Return heights of blocks, and how many there are of each, that cut TILE rows as evenly as possible."""
    number = -(-TILE * width // _MAX_RESULT_VECTORS)
    height, higher = divmod(TILE, number)
    return [(height + 1, higher), (height, number - higher)] if higher else [(height, number)]


def _multiply(builder: ir.IRBuilder, vector: Vector, width: int, x: _Operands) -> None:
    """Emit `gemm_microkernel` in blocks with that number of vectors in each row."""
    heights = _block_heights(width)
    number = sum(count for _, count in heights)
    with cgutils.for_range_slice(builder, _INT(0), x.columns, _INT(width * vector.length), _INT) as (left, across):
        index, top = builder.mul(across, _INT(number)), 0
        for height, count in heights:
            end = top + height * count
            with cgutils.for_range_slice(builder, _INT(top), _INT(end), _INT(height), _INT) as (row, down):
                _multiply_block(builder, vector, x, (row, left, height, width), builder.add(index, down))
            index, top = builder.add(index, _INT(count)), end


def _multiply_block(
    builder: ir.IRBuilder, vector: Vector, x: _Operands, place: tuple[ir.Value, ir.Value, int, int], index: ir.Value
) -> None:
    """Emit the computation of one block, before which `index` others of the tile are computed."""
    intervals = builder.udiv(builder.add(x.k, _INT(PREFETCH_INTERVAL - 1)), _INT(PREFETCH_INTERVAL))
    prefetched = builder.mul(builder.mul(index, intervals), x.prefetch.per_interval)
    block = _Block(*place, builder.add(x.prefetch.begin, prefetched))
    targets = block.vector_pointers(builder, x.c, vector.length)
    bases = block.vector_pointers(builder, x.base, vector.length)
    sums = _accumulate(builder, vector, block, x)
    factor, base_factor = vector.broadcast(x.alpha), vector.broadcast(x.beta)
    results = [
        vector.multiply_add(factor, value, builder.fmul(base_factor, vector.load(base)))
        for value, base in zip(sums, bases, strict=True)
    ]
    with builder.if_else(x.nontemporal) as branches:
        for branch, is_nontemporal in zip(branches, (True, False), strict=True):
            with branch:
                for target, value in zip(targets, results, strict=True):
                    vector.store(value, target, is_nontemporal)


def _accumulate(builder: ir.IRBuilder, vector: Vector, block: _Block, x: _Operands) -> list[ir.Value]:
    """Emit the loop over k, in intervals that begin with prefetches; return the block of A B."""
    sums = [vector.zero] * (block.height * block.width)
    pointers = [*block.row_pointers(builder, x.a), builder.gep(x.b.data, [block.left])]
    before = builder.block
    names = "interval", "products", "interval_end", "results"
    interval, loop, interval_end, after = (builder.append_basic_block(name) for name in names)
    builder.branch(interval)

    builder.position_at_end(interval)
    state = [_phis(builder, values, before) for values in ([_INT(0), block.prefetch_begin], sums, pointers)]
    (begin, prefetch_index), sums, pointers = state
    _prefetch_some(builder, x.prefetch, prefetch_index)
    stop = _minimum(builder, builder.add(begin, _INT(PREFETCH_INTERVAL)), x.k)
    inner = builder.block
    builder.branch(loop)

    builder.position_at_end(loop)
    (step,), sums, pointers = (_phis(builder, values, inner) for values in ([begin], sums, pointers))
    new_sums = _add_products(builder, vector, block, x.a.row_stride, sums, pointers)
    next_step = builder.add(step, _INT(1))
    moved = [builder.gep(pointer, [x.a.column_stride]) for pointer in pointers[:-1]]
    moved.append(builder.gep(pointers[-1], [x.b.ld]))
    _continue(loop, [step, *sums, *pointers], [next_step, *new_sums, *moved])
    _not_unrolled(builder, builder.cbranch(builder.icmp_signed("<", next_step, stop), loop, interval_end))

    builder.position_at_end(interval_end)
    next_index = builder.add(prefetch_index, x.prefetch.per_interval)
    _continue(interval_end, [phi for phis in state for phi in phis], [next_step, next_index, *new_sums, *moved])
    builder.cbranch(builder.icmp_signed("<", next_step, x.k), interval, after)

    builder.position_at_end(after)
    return new_sums


def _add_products(
    builder: ir.IRBuilder,
    vector: Vector,
    block: _Block,
    row_stride: ir.Value,
    sums: Sequence[ir.Value],
    pointers: Sequence[ir.Value],
) -> list[ir.Value]:
    """Return the sums plus the products of a column of A and a row of B; the last pointer is to this row."""
    *a_pointers, b_row = pointers
    b_vectors = [vector.load(builder.gep(b_row, [_INT(j * vector.length)])) for j in range(block.width)]
    result = []
    for i in range(block.height):
        near, distance = divmod(i, _ROWS_PER_POINTER)
        pointer = builder.gep(a_pointers[near], [builder.mul(row_stride, _INT(distance))])
        element = vector.broadcast(builder.load(pointer))
        for j, b_vector in enumerate(b_vectors):
            result.append(vector.multiply_add(element, b_vector, sums[i * block.width + j]))
    return result


def _not_unrolled(builder: ir.IRBuilder, branch: ir.Instruction) -> None:
    """Leave a loop as it is: unrolled, it would need more addresses than there are registers."""
    disable = builder.module.add_metadata([ir.MetaDataString(builder.module, "llvm.loop.unroll.disable")])
    loop = builder.module.add_metadata([disable])
    loop.operands = (loop, disable)  # the first operand of a loop's metadata is itself
    branch.set_metadata("llvm.loop", loop)


def _prefetch_some(builder: ir.IRBuilder, prefetch: PrefetchList, index: ir.Value) -> None:
    """Prefetch the next addresses of the list, as many as are due and left."""
    left = builder.sub(prefetch.end, index)
    number = _minimum(builder, left, prefetch.per_interval)
    with cgutils.for_range(builder, number) as loop:
        _prefetch(builder, builder.load(builder.gep(prefetch.addresses, [builder.add(index, loop.index)])))


def _prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Ask for the cache line of an address, to be read and kept in the second cache."""
    byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, locality, data_cache = flag(0), flag(2), flag(1)
    builder.call(function, [builder.inttoptr(address, byte), read, locality, data_cache])


def _minimum(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def _phis(builder: ir.IRBuilder, values: Sequence[ir.Value], block: ir.Block) -> list[ir.PhiInstr]:
    """Return the phi nodes of a loop's variables, whose first values come from a block."""
    phis = [builder.phi(value.type) for value in values]
    _continue(block, phis, values)
    return phis


def _continue(block: ir.Block, phis: Sequence[ir.PhiInstr], values: Sequence[ir.Value]) -> None:
    """Say which values the phi nodes take when control comes from the block."""
    for phi, value in zip(phis, values, strict=True):
        phi.add_incoming(value, block)
