"""The innermost loops, in LLVM's vectors: what all products are made of, and a transposition in registers.

Numba's own loops leave the choice of registers to LLVM's optimizer, which keeps no block of a product in them. Here
they are named: the block of results, the vectors of B beside it, and one number of A at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

UNIT = 16  # rows and columns of a tile, which all padded sizes are multiples of
WIDE = 2 * UNIT  # columns of two tiles side by side
CHUNK = 16  # steps of a product, between which memory is asked for
LINE = 64  # bytes of a line of the caches; no vector is larger

_INT = ir.IntType(64)


_FEATURES = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES  # "+sse2,+avx,..."
_BYTES = 64 if "+avx512f" in _FEATURES else 32 if "+avx2" in _FEATURES else 16  # of a vector
_MOST_VECTORS = 8 if "+sse" in _FEATURES and _BYTES < 64 else 16  # of results: half of the registers, or a few less
_ABREAST = 2  # vectors of a row of results: for so many products each number of A is read


@intrinsic
def pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """An address as a pointer to numbers of an array's dtype."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), generate


@intrinsic
def address(typingctx: Any, start: Any) -> Any:
    """Of a pointer's first number."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        return builder.ptrtoint(args[0], _INT)

    return types.int64(start), generate


@intrinsic
def integers(typingctx: Any, start: Any) -> Any:
    """The same memory as a place for numbers of int64."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(start), generate


@intrinsic
def doubles(typingctx: Any, start: Any) -> Any:
    """The same memory as a place for numbers of float64."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float64)(start), generate


@intrinsic
def is_null(typingctx: Any, start: Any) -> Any:
    """Whether a pointer's address is 0."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        return builder.icmp_unsigned("==", builder.ptrtoint(args[0], _INT), _INT(0))

    return types.boolean(start), generate


@intrinsic
def at(typingctx: Any, start: Any, index: Any) -> Any:
    """Pointer to a later number."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        return builder.gep(args[0], [args[1]])

    return start(start, types.int64), generate


@intrinsic
def get(typingctx: Any, start: Any, index: Any) -> Any:
    """A number."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        return builder.load(builder.gep(args[0], [args[1]]))

    return start.dtype(start, types.int64), generate


@intrinsic
def put(typingctx: Any, start: Any, index: Any, value: Any) -> Any:
    """Write a number, as one of the pointer's dtype."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        builder.store(args[2], builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(start, types.int64, start.dtype), generate


@intrinsic
def number(typingctx: Any, start: Any, value: Any) -> Any:
    """A number of the pointer's dtype, which Numba would compute with as float64."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        return args[1]

    return start.dtype(start, start.dtype), generate


@intrinsic
def fence(typingctx: Any) -> Any:
    """Other threads see what was written before as soon as what is written after."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def blocks_of_a_tile(typingctx: Any, like: Any) -> Any:
    """How many blocks a tile of UNIT columns is computed in, one after another."""
    count = _INT(UNIT * UNIT // (_MOST_VECTORS * _length(like.dtype)))

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        return count

    return types.int64(like), generate


@intrinsic
def tile(
    typingctx: Any,
    c: Any,
    ldc: Any,
    beta: Any,
    base: Any,
    ld_base: Any,
    alpha: Any,
    a: Any,
    row: Any,
    column: Any,
    b: Any,
    ldb: Any,
    k: Any,
    past: Any,
    columns: Any,
    lines: Any,
    begin: Any,
    end: Any,
    each: Any,
) -> Any:
    """C = beta base + alpha A B: UNIT rows of UNIT or WIDE columns; A has any strides, rows of others are contiguous.

    Where `past`, C is written past the caches: its rows begin at multiples of LINE then. Memory is asked for meanwhile:
    for `each` addresses from lines[begin] on before every CHUNK of the k steps of each block, none from `end` on.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        columns = args[13]
        vector = _Vector.of(context, builder, signature)
        if _ABREAST * vector.length <= UNIT:
            _products(builder, vector, _ABREAST, args)
        else:
            with builder.if_else(builder.icmp_signed("<", columns, _INT(WIDE))) as (narrow, wide):
                with narrow:
                    _products(builder, vector, UNIT // vector.length, args)
                with wide:
                    _products(builder, vector, _ABREAST, args)
        return context.get_dummy_value()

    integer = types.int64
    of_c, of_a, of_b = (c, integer, c.dtype, base, integer, c.dtype), (a, integer, integer), (b, integer)
    of_lines = lines, integer, integer, integer
    return types.void(*of_c, *of_a, *of_b, integer, types.boolean, integer, *of_lines), generate


def _phis(builder: ir.IRBuilder, values: Sequence[ir.Value], block: ir.Block) -> list[ir.PhiInstr]:
    """What the values are, coming from a block."""
    phis = [builder.phi(value.type) for value in values]
    for phi, value in zip(phis, values, strict=True):
        phi.add_incoming(value, block)
    return phis


def _prefetch(builder: ir.IRBuilder, place: ir.Value) -> None:
    """Ask for the cache line of an address."""
    byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(place, byte), flag(0), flag(2), flag(1)])


def _products(builder: ir.IRBuilder, vector: _Vector, width: int, args: Sequence[ir.Value]) -> None:
    """`tile` of these arguments, by blocks of so many vectors in each row of results."""
    c, ldc, beta, base, ld_base, alpha, a, row, column, b, ldb, k, past, columns, lines, begin, end, each = args
    height = min(UNIT, _MOST_VECTORS // width)
    fma = vector.function("llvm.fmuladd", 3)
    chunks = builder.udiv(builder.add(k, _INT(CHUNK - 1)), _INT(CHUNK))
    with (
        cgutils.for_range_slice(builder, _INT(0), columns, _INT(width * vector.length), _INT) as (left, across),
        cgutils.for_range_slice(builder, _INT(0), _INT(UNIT), _INT(height), _INT) as (first, down),
    ):
        block = builder.add(builder.mul(across, _INT(UNIT // height)), down)
        asked = builder.add(begin, builder.mul(builder.mul(block, chunks), each))

        def places(start: ir.Value, distance: ir.Value) -> list[ir.Value]:
            starts = [builder.mul(distance, builder.add(first, _INT(i))) for i in range(height)]
            rows = [builder.gep(start, [builder.add(left, place)]) for place in starts]
            return [builder.gep(row, [_INT(j * vector.length)]) for row in rows for j in range(width)]

        targets, bases = places(c, ldc), places(base, ld_base)
        starts = [builder.gep(a, [builder.mul(row, builder.add(first, _INT(i)))]) for i in range(height)]
        before = builder.block
        names = "chunk", "products", "chunk_end", "results"
        chunk, loop, chunk_end, after = (builder.append_basic_block(name) for name in names)
        zero = ir.Constant(vector.type, [0.0] * vector.length)
        given = [(_INT(0), asked), [zero] * len(targets), starts]
        builder.branch(chunk)
        builder.position_at_end(chunk)
        outer = [_phis(builder, values, before) for values in given]
        (begun, place), *_ = outer
        left_over = builder.sub(end, place)
        number = builder.select(builder.icmp_signed("<", left_over, each), left_over, each)
        with cgutils.for_range(builder, number) as asking:
            _prefetch(builder, builder.load(builder.gep(lines, [builder.add(place, asking.index)])))
        stop = builder.add(begun, _INT(CHUNK))
        stop = builder.select(builder.icmp_signed("<", stop, k), stop, k)
        inner = builder.block
        builder.branch(loop)
        builder.position_at_end(loop)
        (step,), carried, numbers = (_phis(builder, values, inner) for values in ([begun], *outer[1:]))
        start = builder.gep(b, [builder.add(left, builder.mul(step, ldb))])
        factors = [vector.load(builder.gep(start, [_INT(j * vector.length)])) for j in range(width)]
        results = []
        for i in range(height):
            number = vector.repeated(builder.load(numbers[i]))
            for j in range(width):
                results.append(builder.call(fma, [number, factors[j], carried[i * width + j]]))
        following = builder.add(step, _INT(1))
        moved = [builder.gep(number, [column]) for number in numbers]
        for phi, value in zip([step, *carried, *numbers], [following, *results, *moved], strict=True):
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, stop), loop, chunk_end)
        builder.position_at_end(chunk_end)
        reached = following, builder.add(place, each), *results, *moved
        for phi, value in zip([phi for phis in outer for phi in phis], reached, strict=True):
            phi.add_incoming(value, chunk_end)
        builder.cbranch(builder.icmp_signed("<", following, k), chunk, after)
        builder.position_at_end(after)
        factor, share = vector.repeated(alpha), vector.repeated(beta)
        sums = [
            builder.call(fma, [factor, value, builder.fmul(share, vector.load(own))])
            for value, own in zip(results, bases, strict=True)
        ]
        with builder.if_else(past) as branches:
            for branch, is_past in zip(branches, (True, False), strict=True):
                with branch:
                    for target, value in zip(targets, sums, strict=True):
                        vector.store(value, target, is_past)


@intrinsic
def transposed_tile(typingctx: Any, target: Any, ldt: Any, source: Any, lds: Any, centres: Any) -> Any:
    """UNIT x UNIT numbers, rows less their centres, as columns.

    Where there are two centres of a row, the rounding of a large first one costs nothing.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        target, ldt, source, lds, _ = args
        centres = cgutils.unpack_tuple(builder, args[4])
        vector = _Vector.of(context, builder, signature)
        n = vector.length
        with (
            cgutils.for_range_slice(builder, _INT(0), _INT(UNIT), _INT(n), _INT) as (top, _),
            cgutils.for_range_slice(builder, _INT(0), _INT(UNIT), _INT(n), _INT) as (left, _),
        ):
            rows = []
            for i in range(n):
                k = builder.add(top, _INT(i))
                row = vector.load(builder.gep(source, [builder.add(builder.mul(k, lds), left)]))
                for centre in centres:
                    row = builder.fsub(row, vector.repeated(builder.load(builder.gep(centre, [k]))))
                rows.append(row)
            distance = 1
            while distance < n:
                rows = vector.exchanged(rows, distance)
                distance *= 2
            for i, row in enumerate(rows):
                k = builder.add(left, _INT(i))
                vector.store(row, builder.gep(target, [builder.add(builder.mul(k, ldt), top)]))
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64, centres), generate


@intrinsic
def centred_rows(typingctx: Any, target: Any, ldt: Any, source: Any, lds: Any, n: Any, centre: Any, sums: Any) -> Any:
    """UNIT columns of n rows less their centre; what they add up to is added to `sums`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        target, ldt, source, lds, n, centre, sums = args
        vector = _Vector.of(context, builder, signature)
        places = [_INT(k) for k in range(0, UNIT, vector.length)]
        centres = [vector.load(builder.gep(centre, [place])) for place in places]
        totals = [cgutils.alloca_once_value(builder, ir.Constant(vector.type, [0.0] * vector.length)) for _ in places]
        with cgutils.for_range(builder, n) as loop:
            given, own = (builder.gep(a, [builder.mul(loop.index, ld)]) for a, ld in ((source, lds), (target, ldt)))
            for place, middle, total in zip(places, centres, totals, strict=True):
                value = builder.fsub(vector.load(builder.gep(given, [place])), middle)
                vector.store(value, builder.gep(own, [place]))
                builder.store(builder.fadd(builder.load(total), value), total)
        for place, total in zip(places, totals, strict=True):
            goal = builder.gep(sums, [place])
            vector.store(builder.fadd(vector.load(goal), builder.load(total)), goal)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(target, integer, source, integer, integer, centre, sums), generate


@intrinsic
def scaled(typingctx: Any, target: Any, source: Any, factor: Any, offset: Any) -> Any:
    """UNIT numbers times a factor plus an offset; either is a number, or a pointer to UNIT of them."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        target, source, *others = args
        vector = _Vector.of(context, builder, signature)
        fma = vector.function("llvm.fmuladd", 3)
        for k in range(0, UNIT, vector.length):
            given = [
                vector.load(builder.gep(other, [_INT(k)])) if of_each else vector.repeated(other)
                for other, of_each in zip(others, are_pointers, strict=True)
            ]
            value = vector.load(builder.gep(source, [_INT(k)]))
            vector.store(builder.call(fma, [value, *given]), builder.gep(target, [_INT(k)]))
        return context.get_dummy_value()

    are_pointers = [isinstance(other, types.CPointer) for other in (factor, offset)]
    own = [other if of_each else target.dtype for other, of_each in zip((factor, offset), are_pointers, strict=True)]
    return types.void(target, source, *own), generate


@intrinsic
def gathered(typingctx: Any, products: Any, sums: Any, values: Any, others: Any) -> Any:
    """Add UNIT values to as many sums, and their products with others to products."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        vector = _Vector.of(context, builder, signature)
        fma = vector.function("llvm.fmuladd", 3)
        for k in range(0, UNIT, vector.length):
            to_products, to_sums, *given = (builder.gep(arg, [_INT(k)]) for arg in args)
            value, other = map(vector.load, given)
            vector.store(builder.call(fma, [value, other, vector.load(to_products)]), to_products)
            vector.store(builder.fadd(value, vector.load(to_sums)), to_sums)
        return context.get_dummy_value()

    return types.void(products, sums, values, others), generate


def _length(dtype: Any) -> int:
    """Numbers of a vector."""
    return int(_BYTES * 8 // dtype.bitwidth)


class _Vector:
    """A vector of the processor's width."""

    def __init__(self, builder: ir.IRBuilder, number: ir.Type, dtype: Any) -> None:
        self._builder, self._number, self._alignment = builder, number, dtype.bitwidth // 8
        self.length = _length(dtype)
        self.type = ir.VectorType(number, self.length)
        self._suffix = f"v{self.length}f{dtype.bitwidth}"

    @classmethod
    def of(cls, context: Any, builder: ir.IRBuilder, signature: Any) -> _Vector:
        """Of an intrinsic's first argument, a pointer."""
        dtype = signature.args[0].dtype
        return cls(builder, context.get_value_type(dtype), dtype)

    def function(self, name: str, operands: int) -> ir.Function:
        kind = ir.FunctionType(self.type, [self.type] * operands)
        return cgutils.get_or_insert_function(self._builder.module, kind, f"{name}.{self._suffix}")

    def load(self, place: ir.Value) -> ir.Value:
        value = self._builder.load(self._builder.bitcast(place, self.type.as_pointer()))
        value.align = self._alignment
        return value

    def store(self, value: ir.Value, place: ir.Value, past: bool = False) -> None:
        """Past the caches, to a multiple of the vector's size, if `past`: other threads see that after a `fence`."""
        store = self._builder.store(value, self._builder.bitcast(place, self.type.as_pointer()))
        store.align = _BYTES if past else self._alignment
        if past:
            store.set_metadata("nontemporal", self._builder.module.add_metadata([ir.IntType(32)(1)]))

    def repeated(self, number: ir.Value) -> ir.Value:
        empty = ir.Constant(self.type, ir.Undefined)
        first = self._builder.insert_element(empty, number, ir.IntType(32)(0))
        return self._shuffled(first, empty, [0] * self.length)

    def exchanged(self, rows: list[ir.Value], distance: int) -> list[ir.Value]:
        """Blocks of `distance` numbers of rows that are so far apart, beside the diagonal, in each other's places."""
        n, result = self.length, list(rows)
        for i in range(n):
            if i & distance:
                continue
            upper, lower = rows[i], rows[i + distance]
            result[i] = self._shuffled(upper, lower, [n + k - distance if k & distance else k for k in range(n)])
            result[i + distance] = self._shuffled(
                upper, lower, [n + k if k & distance else k + distance for k in range(n)]
            )
        return result

    def _shuffled(self, a: ir.Value, b: ir.Value, order: list[int]) -> ir.Value:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), self.length), order)
        return self._builder.shuffle_vector(a, b, mask)
