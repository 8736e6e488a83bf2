"""The arguments of the compiled kernels: one `NamedTuple` a kernel, packed by the host and unpacked by the kernel.

A kernel is called with the address of its packed arguments, eight bytes each in the order of the fields. `pack` and
`unpack` both read the types of the fields, so a field can be added or moved in its class alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from struct import Struct
from typing import Annotated, Any, NamedTuple, get_type_hints

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from polywhiten.cpu.device.channels import Channels
from polywhiten.cpu.device.panels import Layout

# the address of an array's first element, in the dtype that the kernel is compiled for; 0 if there is no array
Pointer = Annotated[Any, "pointer"]
# the address of an int64
IntPointer = Annotated[Any, "int64 pointer"]


class MomentsArgs(NamedTuple):
    """Arguments of `moments`."""

    num_chunks: int  # parts of a block's panels, whose products are summed separately
    as_rows: bool  # whether panels are (samples, d), else (d, samples)
    x: Pointer
    products: Pointer  # (blocks, chunks, d, d) with d padded
    panel_means: Pointer  # (blocks, panels, d) with d padded
    layout: Layout


class CombineMomentsArgs(NamedTuple):
    """Arguments of `combine_moments`."""

    parts: MomentsArgs
    mean: Pointer  # (blocks, d)
    cov: Pointer  # (blocks, d, d)


class CrossMomentsArgs(NamedTuple):
    """Arguments of `cross_moments`; without a whitener, those that belong to the channels are not read."""

    num_chunks: int
    as_rows: bool
    dy: Pointer
    x: Pointer
    mean: Pointer  # (blocks, d)
    sums: Pointer  # (blocks, chunks, d + 1, d) with d padded: the products, then the sums of dY
    whitener: Pointer  # (blocks, d, d), or 0
    weight: Pointer  # (channels,)
    parameter_sums: int  # where a part's sums for weight and bias begin in its workspace: (2, channels) of float64
    channels: Channels
    dy_layout: Layout
    x_layout: Layout


class CombineCrossMomentsArgs(NamedTuple):
    """Arguments of `combine_cross_moments`."""

    num_chunks: int
    blocks: int
    d: int
    sums: Pointer  # of `cross_moments`
    s: Pointer  # (blocks, d)
    k: Pointer  # (blocks, d, d)


class TermArgs(NamedTuple):
    """One term of an affine map, matrix (array - centre)."""

    array: Pointer
    matrix: Pointer  # (blocks, d, d)
    centre: Pointer  # (blocks, d)
    layout: Layout


class AffineMapArgs(NamedTuple):
    """Arguments of `pack_matrices` and `affine_map`."""

    num_terms: int  # 1 or 2; of one, `second` is not read
    as_rows: bool
    first: TermArgs
    second: TermArgs
    row_scale: Pointer  # (blocks, d), the factors of the rows of the first term's matrices, or 0
    packed_matrices: Pointer  # (blocks, terms, d, d) with d padded
    y: Pointer
    shift: Pointer  # (blocks, d), or 0
    input_weight: Pointer  # (channels,), the factors of the first term's array, or 0
    output_weight: Pointer  # (channels,), the factors of the result, or 0
    channel_bias: Pointer  # (channels,), added wherever a weight is applied
    channels: Channels
    panels_first: bool  # whether a panel's blocks follow each other, else a block's panels
    nontemporal: bool  # whether stores of rows bypass the caches
    y_layout: Layout


class ScaleWhitenerArgs(NamedTuple):
    """Arguments of `scale_whitener`."""

    blocks: int
    d: int
    whitener: Pointer  # (blocks, d, d)
    weight: Pointer  # (blocks, d)
    k: Pointer  # (blocks, d, d)
    scaled: Pointer  # (blocks, d, d)
    dweight: Pointer  # (blocks, d)


class GradientTermsArgs(NamedTuple):
    """Arguments of `gradient_terms`."""

    blocks: int
    d: int
    num_samples: int  # of a block
    ds: Pointer  # (blocks, d, d)
    s: Pointer  # (blocks, d)
    mean_dy: Pointer  # (blocks, d)


class InverseSqrtArgs(NamedTuple):
    """Arguments of `inverse_sqrt` and `inverse_sqrt_adjoint`; the former reads nothing after the whitener."""

    phase: int  # -1 for all of them, one after another
    kept: int  # where in a part's workspace all iterates are kept for the adjoint, in elements; -1 if they aren't
    blocks: int
    d: int
    steps: int
    eps: float
    smallest_normal: float
    matrices: Pointer  # memory that all parts share in a phase
    cov: Pointer  # (blocks, d, d)
    whitener: Pointer  # (blocks, d, d), or 0 for the adjoint
    grad: Pointer  # (blocks, d, d), with respect to the whitener
    row_scale: Pointer  # (blocks, d), the factors of the rows of the gradient, or 0
    dcov: Pointer  # (blocks, d, d)


class ValuesArgs(NamedTuple):
    """Adjacent values."""

    size: int
    values: Pointer


class AverageArgs(NamedTuple):
    """A running average and the batch's values."""

    size: int
    running: Pointer
    batch: Pointer


class UpdateAveragesArgs(NamedTuple):
    """Arguments of `update_averages`."""

    momentum: float  # negative for the plain average of all batches
    num_batches: IntPointer
    mean: AverageArgs
    matrices: AverageArgs
    checked: ValuesArgs  # other statistics that have to be finite


KERNEL_ARGS = (
    MomentsArgs,
    CombineMomentsArgs,
    CrossMomentsArgs,
    CombineCrossMomentsArgs,
    AffineMapArgs,
    ScaleWhitenerArgs,
    GradientTermsArgs,
    InverseSqrtArgs,
    UpdateAveragesArgs,
)


def pack(cls: type, values: Iterable[Any]) -> bytes:
    """Return the arguments of a kernel's class, as `flattened` yields them, in the form that `unpack` reads."""
    return _struct(cls).pack(*values)


def flattened(args: Iterable[Any]) -> Iterator[Any]:
    """Yield the values of nested tuples."""
    for value in args:
        if isinstance(value, tuple):
            yield from flattened(value)
        else:
            yield value


def leaf_types(cls: type) -> Iterator[Any]:
    """Yield the types of the fields, and of the fields of nested tuples, in the order of `flattened`."""
    for kind in _field_types(cls):
        if _is_tuple(kind):
            yield from leaf_types(kind)
        else:
            yield kind


def _field_types(cls: Any) -> Iterable[Any]:
    return get_type_hints(cls, include_extras=True).values()


def _is_tuple(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple)


@cache
def _struct(cls: type) -> Struct:
    return Struct("=" + "".join("d" if kind is float else "q" for kind in leaf_types(cls)))


@intrinsic
def unpack(typingctx: Any, cls: Any, packed: Any, like: Any) -> Any:
    """Return the arguments of a class that are packed at a pointer; `like` is a pointer of the kernel's dtype."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _, packed, _ = args
        value, _ = _load_tuple(context, builder, signature.return_type, packed, 0)
        return value

    return _numba_type(cls.instance_class, like)(cls, packed, like), generate


def _numba_type(kind: Any, like: Any) -> Any:
    """Return the type that a field has in compiled code."""
    if _is_tuple(kind):
        fields = [_numba_type(field, like) for field in _field_types(kind)]
        return types.BaseTuple.from_types(fields, kind)
    return {
        int: types.int64,
        float: types.float64,
        bool: types.boolean,
        Pointer: like,
        IntPointer: types.CPointer(types.int64),
    }[kind]


def _load_tuple(context: Any, builder: ir.IRBuilder, kind: Any, packed: ir.Value, index: int) -> tuple[ir.Value, int]:
    """Load a tuple whose first field is at an index, and return the index after its last one too."""
    values = []
    for field in kind:
        if isinstance(field, types.BaseTuple):
            value, index = _load_tuple(context, builder, field, packed, index)
        else:
            value, index = _load(context, builder, field, packed, index), index + 1
        values.append(value)
    return context.make_tuple(builder, kind, values), index


def _load(context: Any, builder: ir.IRBuilder, kind: Any, packed: ir.Value, index: int) -> ir.Value:
    place = builder.gep(packed, [ir.IntType(64)(index)])
    if kind == types.float64:
        return builder.load(builder.bitcast(place, ir.DoubleType().as_pointer()))
    value = builder.load(place)
    if kind == types.boolean:
        return builder.icmp_signed("!=", value, ir.IntType(64)(0))
    if isinstance(kind, types.CPointer):
        return builder.inttoptr(value, context.get_value_type(kind))
    return value
