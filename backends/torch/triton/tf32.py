"""Products on tensor cores, in TF32 or, as three products in TF32, in the precision of float32."""

import triton
import triton.language as tl


@triton.jit
def split(x):
    # Return x as the sum of a TF32 number and a remainder. TF32 keeps 10 of the 23 binary digits of float32.
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def round_to_tf32(x):
    # Tensor cores truncate, which would make all variances too small. NaN stays NaN.
    nearest = ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    return tl.where(x == x, nearest, x)


@triton.jit
def multiply_add(a, b, total, PRECISION: tl.constexpr):
    # Return a b + total.
    if PRECISION == "tf32x3":
        a_high, a_low = split(a)
        b_high, b_low = split(b)
        total = tl.dot(a_low, b_high, total, input_precision="tf32")
        total = tl.dot(a_high, b_low, total, input_precision="tf32")
        a, b = a_high, b_high
    else:
        a, b = round_to_tf32(a), round_to_tf32(b)
    return tl.dot(a, b, total, input_precision="tf32")


@triton.jit
def multiply_split(a_high, a_low, b_high, b_low, SIZE: tl.constexpr):
    # Return a b of square matrices that are split already, in the precision of float32. b is symmetric but for
    # rounding: its transpose is the operand, because Hopper's tensor cores read it from shared memory in that order, as
    # it is stored.
    total = tl.dot(a_low, tl.trans(b_high), tl.zeros((SIZE, SIZE), tl.float32), input_precision="tf32")
    total = tl.dot(a_high, tl.trans(b_low), total, input_precision="tf32")
    return tl.dot(a_high, tl.trans(b_high), total, input_precision="tf32")


@triton.jit
def multiply_symmetric(a, b_high, b_low, SIZE: tl.constexpr):
    # Return a b, as `multiply_split`.
    a_high, a_low = split(a)
    return multiply_split(a_high, a_low, b_high, b_low, SIZE)
