"""Pointers in compiled kernels: their elements, their addresses and their dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from polywhiten.cpu.device.device_function import device_function

_INT = ir.IntType(64)


@intrinsic
def address(typingctx: Any, start: Any) -> Any:
    """Return a pointer's address."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        return builder.ptrtoint(args[0], _INT)

    return types.int64(start), generate


@intrinsic
def as_int64(typingctx: Any, start: Any) -> Any:
    """Return a pointer to the same memory as int64."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(start), generate


@intrinsic
def as_float64(typingctx: Any, start: Any) -> Any:
    """Return a pointer to the same memory as float64."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float64)(start), generate


@intrinsic
def is_null(typingctx: Any, start: Any) -> Any:
    """Return whether a pointer's address is 0."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        return builder.icmp_unsigned("==", builder.ptrtoint(args[0], _INT), _INT(0))

    return types.boolean(start), generate


@intrinsic
def at(typingctx: Any, start: Any, index: Any) -> Any:
    """Return a pointer to the element at an index."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        return builder.gep(args[0], [args[1]])

    return start(start, types.int64), generate


@intrinsic
def get(typingctx: Any, start: Any, index: Any) -> Any:
    """Return the element at an index."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        return builder.load(builder.gep(args[0], [args[1]]))

    return start.dtype(start, types.int64), generate


@intrinsic
def put(typingctx: Any, start: Any, index: Any, value: Any) -> Any:
    """Write an element at an index, converted to the pointer's dtype."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        builder.store(args[2], builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(start, types.int64, start.dtype), generate


@intrinsic
def cast(typingctx: Any, start: Any, value: Any) -> Any:
    """Return the value in the pointer's dtype: Numba would compute with a float constant in float64."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        return args[1]

    return start.dtype(start, start.dtype), generate


@intrinsic
def fence(typingctx: Any) -> Any:
    """Make all stores before it visible to other threads before any store after it."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@device_function
def clear(target, ld, m, n):
    """Set m rows of n elements to 0."""
    for i in range(m):
        row = at(target, i * ld)
        for j in range(n):
            put(row, j, 0.0)
