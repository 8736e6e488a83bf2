"""Vectors of the processor's width, and loops over a tile of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from polywhiten.cpu.tuning import TILE

CACHE_LINE = 64  # bytes; no vector is larger
FEATURES = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES  # "+sse2,+avx,..."
VECTOR_BYTES = 64 if "+avx512f" in FEATURES else 32 if "+avx2" in FEATURES else 16

_INT = ir.IntType(64)


@intrinsic
def transpose_tile(typingctx: Any, target: Any, ldt: Any, source: Any, lds: Any, centres: Any) -> Any:
    """Write TILE rows of TILE elements as columns, less up to two centres of each row.

    Two centres, subtracted one after another, preserve the accuracy that rounding their large sum would lose.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        target, ldt, source, lds, _ = args
        centres = cgutils.unpack_tuple(builder, args[4])
        vector = Vector.of(context, builder, signature)

        def load(row: ir.Value, k: ir.Value) -> ir.Value:
            value = vector.load(row)
            for centre in centres:
                value = builder.fsub(value, vector.broadcast(builder.load(builder.gep(centre, [k]))))
            return value

        for row, k, left in _transposed_rows(builder, vector, source, lds, load):
            vector.store(row, builder.gep(target, [builder.add(builder.mul(k, ldt), left)]))
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64, centres), generate


@intrinsic
def add_transposed_tile(typingctx: Any, target: Any, given: Any, source: Any, factor: Any, ld: Any) -> Any:
    """Write a tile plus a factor times the columns of another one as rows; all have lines of the same length."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        target, given, source, factor, ld = args
        vector = Vector.of(context, builder, signature)
        factors = vector.broadcast(factor)
        for row, k, left in _transposed_rows(builder, vector, source, ld, lambda row, _: vector.load(row)):
            place = [builder.add(builder.mul(k, ld), left)]
            value = vector.multiply_add(row, factors, vector.load(builder.gep(given, place)))
            vector.store(value, builder.gep(target, place))
        return context.get_dummy_value()

    return types.void(target, given, source, target.dtype, types.int64), generate


def _transposed_rows(
    builder: ir.IRBuilder,
    vector: Vector,
    source: ir.Value,
    ld: ir.Value,
    load: Callable[[ir.Value, ir.Value], ir.Value],
) -> Iterator[tuple[ir.Value, ir.Value, ir.Value]]:
    """Emit loops over the transposition of a tile; yield vectors of its rows, with their row and first column.

    `load` returns a vector of the source at a pointer, which is in the given row of it.
    """
    n = vector.length
    with (
        cgutils.for_range_slice(builder, _INT(0), _INT(TILE), _INT(n), _INT) as (top, _),
        cgutils.for_range_slice(builder, _INT(0), _INT(TILE), _INT(n), _INT) as (left, _),
    ):
        rows = []
        for i in range(n):
            k = builder.add(top, _INT(i))
            rows.append(load(builder.gep(source, [builder.add(builder.mul(k, ld), left)]), k))
        for i, row in enumerate(vector.transposed(rows)):
            yield row, builder.add(left, _INT(i)), top


@intrinsic
def centre_rows(typingctx: Any, target: Any, ldt: Any, source: Any, lds: Any, n: Any, centre: Any, sums: Any) -> Any:
    """Write n rows of TILE elements less their centre, and add the differences up in `sums`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        target, ldt, source, lds, n, centre, sums = args
        vector = Vector.of(context, builder, signature)
        offsets = [_INT(k) for k in range(0, TILE, vector.length)]
        centres = [vector.load(builder.gep(centre, [offset])) for offset in offsets]
        totals = [cgutils.alloca_once_value(builder, vector.zero) for _ in offsets]
        with cgutils.for_range(builder, n) as loop:
            source_row = builder.gep(source, [builder.mul(loop.index, lds)])
            target_row = builder.gep(target, [builder.mul(loop.index, ldt)])
            for offset, middle, total in zip(offsets, centres, totals, strict=True):
                value = builder.fsub(vector.load(builder.gep(source_row, [offset])), middle)
                vector.store(value, builder.gep(target_row, [offset]))
                builder.store(builder.fadd(builder.load(total), value), total)
        for offset, total in zip(offsets, totals, strict=True):
            position = builder.gep(sums, [offset])
            vector.store(builder.fadd(vector.load(position), builder.load(total)), position)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(target, integer, source, integer, integer, centre, sums), generate


@intrinsic
def scale_and_shift(typingctx: Any, target: Any, source: Any, factor: Any, offset: Any) -> Any:
    """Write TILE elements times a factor plus an offset, each of which is a number or a pointer to TILE numbers."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        target, source, *others = args
        vector = Vector.of(context, builder, signature)
        for k in range(0, TILE, vector.length):
            factor, offset = (
                vector.load(builder.gep(other, [_INT(k)])) if is_pointer else vector.broadcast(other)
                for other, is_pointer in zip(others, are_pointers, strict=True)
            )
            value = vector.load(builder.gep(source, [_INT(k)]))
            vector.store(vector.multiply_add(value, factor, offset), builder.gep(target, [_INT(k)]))
        return context.get_dummy_value()

    are_pointers = [isinstance(other, types.CPointer) for other in (factor, offset)]
    others = [
        other if is_pointer else target.dtype for other, is_pointer in zip((factor, offset), are_pointers, strict=True)
    ]
    return types.void(target, source, *others), generate


@intrinsic
def accumulate(typingctx: Any, products: Any, sums: Any, values: Any, factors: Any) -> Any:
    """Add TILE values to as many sums, and the values times their factors to as many products."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        vector = Vector.of(context, builder, signature)
        for k in range(0, TILE, vector.length):
            products, sums, *operands = (builder.gep(arg, [_INT(k)]) for arg in args)
            value, factor = map(vector.load, operands)
            vector.store(vector.multiply_add(value, factor, vector.load(products)), products)
            vector.store(builder.fadd(value, vector.load(sums)), sums)
        return context.get_dummy_value()

    return types.void(products, sums, values, factors), generate


def vector_length(dtype: Any) -> int:
    """Return the number of elements in a vector."""
    return int(VECTOR_BYTES * 8 // dtype.bitwidth)


class Vector:
    """LLVM's instructions for vectors of the processor's width."""

    def __init__(self, builder: ir.IRBuilder, element: ir.Type, dtype: Any) -> None:
        self._builder, self._alignment = builder, dtype.bitwidth // 8
        self.length = vector_length(dtype)
        self.type = ir.VectorType(element, self.length)
        self.zero = ir.Constant(self.type, [0.0] * self.length)
        self._suffix = f"v{self.length}f{dtype.bitwidth}"

    @classmethod
    def of(cls, context: Any, builder: ir.IRBuilder, signature: Any) -> Vector:
        """Return the vectors that an intrinsic's first argument, a pointer, points to."""
        return cls.of_dtype(context, builder, signature.args[0].dtype)

    @classmethod
    def of_dtype(cls, context: Any, builder: ir.IRBuilder, dtype: Any) -> Vector:
        return cls(builder, context.get_value_type(dtype), dtype)

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """Return a b + c, fused if the processor can do that."""
        function = ir.FunctionType(self.type, [self.type] * 3)
        name = f"llvm.fmuladd.{self._suffix}"
        return self._builder.call(cgutils.get_or_insert_function(self._builder.module, function, name), [a, b, c])

    def load(self, source: ir.Value) -> ir.Value:
        value = self._builder.load(self._builder.bitcast(source, self.type.as_pointer()))
        value.align = self._alignment
        return value

    def store(self, value: ir.Value, target: ir.Value, nontemporal: bool = False) -> None:
        """Store a vector; a non-temporal store bypasses the caches.

        Non-temporal stores need targets aligned to the vector's size, and a `fence` before other threads read them.
        """
        store = self._builder.store(value, self._builder.bitcast(target, self.type.as_pointer()))
        store.align = VECTOR_BYTES if nontemporal else self._alignment
        if nontemporal:
            store.set_metadata("nontemporal", self._builder.module.add_metadata([ir.IntType(32)(1)]))

    def broadcast(self, element: ir.Value) -> ir.Value:
        """Return a vector of equal elements."""
        undefined = ir.Constant(self.type, ir.Undefined)
        first = self._builder.insert_element(undefined, element, ir.IntType(32)(0))
        return self._shuffle(first, undefined, [0] * self.length)

    def transposed(self, rows: list[ir.Value]) -> list[ir.Value]:
        """Return the columns of as many rows as a vector has elements."""
        distance = 1
        while distance < self.length:
            rows = self._exchanged(rows, distance)
            distance *= 2
        return rows

    def _exchanged(self, rows: list[ir.Value], distance: int) -> list[ir.Value]:
        """Exchange the off-diagonal blocks of distance x distance elements within each block of twice that size."""
        n, result = self.length, list(rows)
        for i in range(n):
            if i & distance:
                continue
            upper, lower = rows[i], rows[i + distance]
            result[i] = self._shuffle(upper, lower, [n + k - distance if k & distance else k for k in range(n)])
            result[i + distance] = self._shuffle(
                upper, lower, [n + k if k & distance else k + distance for k in range(n)]
            )
        return result

    def _shuffle(self, a: ir.Value, b: ir.Value, order: list[int]) -> ir.Value:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), self.length), order)
        return self._builder.shuffle_vector(a, b, mask)
