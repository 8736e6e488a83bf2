"""The joined kernels' sums over samples, which tensor cores multiply in bfloat16 or float16.

An array in float32 is cut into parts in bfloat16. One in half precision is multiplied as it is: the shift that is
subtracted from it is 0, or a number of the same dtype if the mean is large, and then the difference is exact too for
samples between half the shift and its double.
"""

import triton
import triton.language as tl

from polywhiten.torch.triton.addressing import load_samples, load_tile, load_vector, narrow, narrow_strides
from polywhiten.torch.triton.bfloat16_parts import add_square, multiply_parts

# In standard deviations. Below it, the samples' squares cost no more digits than their sums do; above it, few samples
# are so far from the shift that the difference is rounded.
_LARGE_MEAN = tl.constexpr(8.0)


@triton.jit
def rounded_shift(mean, variance, dtype: tl.constexpr):
    # Return the shift of samples of this dtype; NaN stays NaN.
    if dtype == tl.float32:
        return mean
    else:
        is_small = mean * mean < _LARGE_MEAN * _LARGE_MEAN * variance
        return tl.where(is_small, 0.0, mean.to(dtype).to(tl.float32))


@triton.jit
def cross_moments_shift(mean, variances, rows, d, dtype: tl.constexpr):
    # Return the shift of samples that are multiplied with a gradient; the variances are (pointer, stride). It is 0 for
    # bfloat16: a mean costs these sums as many digits as it is larger than the standard deviation, which is 256 times
    # at most if bfloat16 shall tell the samples apart. Variances lose twice as many.
    if dtype == tl.bfloat16:
        return tl.zeros_like(mean)
    else:
        return rounded_shift(mean, tl.load(variances[0] + rows * variances[1], mask=rows < d, other=0.0), dtype)


@triton.jit
def shift_back(values, shift):
    # Return samples minus `cross_moments_shift`, in their own dtype.
    if values.dtype == tl.bfloat16:
        return values
    else:
        return (values.to(tl.float32) - shift[:, None]).to(values.dtype)


@triton.jit
def _load_sample(x, rows, inner, samples, d, i, number):
    # Return the i-th of some samples from all over a block, whose distance is odd, to miss the same corner of every
    # picture. If the block has fewer, some come twice.
    m = i * (samples // number | 1) % samples
    pointer, stride_outer, stride_row, stride_inner = x
    pointer += (m // inner) * stride_outer + (m % inner) * stride_inner
    return tl.load(pointer + rows * stride_row, mask=rows < d, other=0.0).to(tl.float32)


@triton.jit
def _shift_near_mean(x, rows, inner, samples, d, NUMBER: tl.constexpr):
    # Return a shift near the mean of a block. One sample is loaded at a time: a tile of them would impose its layout
    # in registers, which is slow for the samples' sums, on these.
    first = _load_sample(x, rows, inner, samples, d, 0, NUMBER)
    deviation, square = tl.zeros_like(first), tl.zeros_like(first)
    for i in tl.static_range(1, NUMBER):
        value = _load_sample(x, rows, inner, samples, d, i, NUMBER) - first
        deviation += value / NUMBER
        square += value * value / NUMBER
    return rounded_shift(first + deviation, square - deviation * deviation, x[0].dtype.element_ty)


@triton.jit
def sum_shifted_moments(
    x, inner, samples, d, begin, end,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, SHIFT_SAMPLES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Return the shift of a block, and the sum and the products of x - shift over the samples from `begin` to `end`.
    x = narrow_strides(x)
    inner, samples, d, begin, end = narrow(inner), narrow(samples), narrow(d), narrow(begin), narrow(end)
    rows = tl.arange(0, HEIGHT)
    shift = _shift_near_mean(x, rows, inner, samples, d, SHIFT_SAMPLES)
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)  # added up at the end, as sums across threads take long
    square = tl.zeros((HEIGHT, HEIGHT), tl.float32)
    mixed = tl.zeros((HEIGHT, HEIGHT), tl.float32)
    for start in tl.range(begin, end, WIDTH, num_stages=STAGES):
        m = start + tl.arange(0, WIDTH)
        valid = (rows < d)[:, None] & (m < end)[None, :]
        shifted = tl.where(valid, load_tile(x, rows, m, inner, valid) - shift[:, None], 0.0)
        total += shifted
        square, mixed = add_square(shifted.to(x[0].dtype.element_ty), square, mixed, PRECISION)
    return shift, tl.sum(total, axis=1), square + mixed + tl.trans(mixed)


@triton.jit
def sum_shifted_cross_moments(
    dy, x, mean, variances, inner, d, begin, end,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Return the sums of dy and of dy (x - mean)' over the samples of a block from `begin` to `end`.
    dy, x = narrow_strides(dy), narrow_strides(x)
    inner, d, begin, end = narrow(inner), narrow(d), narrow(begin), narrow(end)
    rows = tl.arange(0, HEIGHT)
    centre = load_vector(mean, rows, d)
    shift = cross_moments_shift(centre, variances, rows, d, x[0].dtype.element_ty)
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)
    moment = tl.zeros((HEIGHT, HEIGHT), tl.float32)
    for start in tl.range(begin, end, WIDTH, num_stages=STAGES):
        m = start + tl.arange(0, WIDTH)
        valid = (rows < d)[:, None] & (m < end)[None, :]
        shifted = shift_back(load_samples(x, rows, m, inner, valid), shift)  # not always 0 outside, but dy is
        gradient = load_samples(dy, rows, m, inner, valid)
        total += gradient.to(tl.float32)
        moment = multiply_parts(gradient, tl.trans(shifted), moment, PRECISION)
    sums = tl.sum(total, axis=1)
    return sums, moment + sums[:, None] * (shift - centre)[None, :]
