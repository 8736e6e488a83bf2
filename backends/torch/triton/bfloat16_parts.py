"""The joined kernels' products on tensor cores, for which float32 can be cut into parts, each a number in bfloat16.

Tensor cores multiply bfloat16 twice as fast as TF32, and Hopper's read it from shared memory in either order, where a
tile in TF32 may have to be transposed. The product of two parts is exact in float32. The precision "bf16x6" is that of
float32, with six products of parts; "bf16x3" has three, which are more exact than TF32.
"""

import triton
import triton.language as tl

from polywhiten.torch.triton.tf32 import multiply_add, round_to_tf32, split


@triton.jit
def cut(x):
    # Return the first part of x and what is left of it. The part is truncated, not rounded, so that three parts have
    # the 24 binary digits of float32. An array in bfloat16 is its own only part.
    if x.dtype == tl.bfloat16:
        return x, x
    else:
        x = x.to(tl.float32)
        part = (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return part, x - part.to(tl.float32)


@triton.jit
def multiply_parts(a, b, total, PRECISION: tl.constexpr):
    # Return a b + total. Arrays of the same half precision are multiplied as they are.
    if a.dtype == tl.float32:
        return _multiply_in_float32(a, b, total, PRECISION)
    elif a.dtype == b.dtype:
        return tl.dot(a, b, total)
    else:
        return _multiply_in_float32(a, b, total, PRECISION)


@triton.jit
def _multiply_in_float32(a, b, total, PRECISION: tl.constexpr):
    # Return a b + total. Of two arrays in float32, three or six products of parts are added.
    PARTS: tl.constexpr = 3 if PRECISION == "bf16x6" else 2
    if PRECISION == "tf32" or PRECISION == "tf32x3":
        return multiply_add(a.to(tl.float32), b.to(tl.float32), total, PRECISION)
    else:
        a_rest = a
        for i in tl.static_range(1 if a.dtype == tl.bfloat16 else PARTS):
            a_part, a_rest = cut(a_rest)
            b_rest = b
            for _ in tl.static_range(1 if b.dtype == tl.bfloat16 else PARTS - i):
                b_part, b_rest = cut(b_rest)
                total = tl.dot(a_part, b_part, total)
        return total


@triton.jit
def add_square(x, square, mixed, PRECISION: tl.constexpr):
    # Add x x' to square + mixed + mixed', and return these two.
    if x.dtype != tl.float32:
        square = tl.dot(x, tl.trans(x), square)
    elif PRECISION == "tf32":
        x = round_to_tf32(x)
        square = tl.dot(x, tl.trans(x), square, input_precision="tf32")
    elif PRECISION == "tf32x3":
        high, low = split(x)
        square = tl.dot(high, tl.trans(high), square, input_precision="tf32")
        mixed = tl.dot(high, tl.trans(low), mixed, input_precision="tf32")
    else:
        high, rest = cut(x)
        square = tl.dot(high, tl.trans(high), square)
        middle, rest = cut(rest)
        mixed = tl.dot(high, tl.trans(middle), mixed)
        if PRECISION == "bf16x6":
            low, rest = cut(rest)
            mixed = tl.dot(high, tl.trans(low), mixed)
            square = tl.dot(middle, tl.trans(middle), square)
    return square, mixed
