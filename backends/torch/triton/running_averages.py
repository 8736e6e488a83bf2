"""How joined kernels update the running averages of a layer, unless an average would not be finite any more.

The kernel that computes the statistics decides this for its block. The next kernel updates the averages if all blocks
agree.
"""

import triton
import triton.language as tl

from polywhiten.torch.triton.addressing import load_matrix

_BLOCKS_AT_ONCE = tl.constexpr(128)  # whose decisions are read together


@triton.jit
def _next_average(running, offsets, mask, batch, factor):
    # Return what torch.lerp does, in the dtype of the average.
    old = tl.load(running + offsets, mask=mask, other=0.0).to(tl.float32)
    near_old, near_batch = old + factor * (batch - old), batch - (batch - old) * (1.0 - factor)
    return tl.where(factor < 0.5, near_old, near_batch).to(running.dtype.element_ty)


@triton.jit
def _count_nonfinite(values):
    values = values.to(tl.float32)
    return tl.sum((tl.abs(values) < float("inf")).to(tl.int32) ^ 1)


@triton.jit
def averaging_factor(
    running_mean, running_matrices, num_batches, momentum, mean, cov, w, block, d, block_d,
    TRACKS_COVARIANCE: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    # Return the factor of the newest batch in the averages, or NaN if an average of this block would not be finite.
    rows = tl.arange(0, HEIGHT)
    offsets = rows[:, None] * d + rows[None, :]
    in_matrix = (rows < d)[:, None] & (rows < d)[None, :]
    if momentum is None:
        factor = tl.full([], 0.0, tl.float32)
        if num_batches is not None:
            factor = 1.0 / (tl.load(num_batches) + 1).to(tl.float32)
    else:
        factor = tl.cast(momentum, tl.float32)
    nonfinite = _count_nonfinite(_next_average(running_mean + block * d, rows, rows < block_d, mean, factor))
    matrix = w
    if TRACKS_COVARIANCE:
        nonfinite += _count_nonfinite(w)
        matrix = cov
    newest = _next_average(running_matrices + block * d * d, offsets, in_matrix, matrix, factor)
    nonfinite += _count_nonfinite(tl.where(in_matrix, newest.to(tl.float32), 0.0))
    return tl.where(nonfinite == 0, factor, float("nan"))


@triton.jit
def update_averages(
    running_mean, running_matrices, num_batches, averaging_factors, mean, matrices,
    block, num_blocks, d, block_d, HEIGHT: tl.constexpr,
):  # fmt: skip
    # Update the averages of one block, unless the factor of any block is NaN.
    refusals = 0
    for start in range(0, num_blocks, _BLOCKS_AT_ONCE):
        others = start + tl.arange(0, _BLOCKS_AT_ONCE)
        factors = tl.load(averaging_factors + others, mask=others < num_blocks, other=0.0)
        refusals += tl.sum((factors != factors).to(tl.int32))
    if refusals == 0:
        factor = tl.load(averaging_factors + block)
        rows = tl.arange(0, HEIGHT)
        batch = tl.load(mean + block * d + rows, mask=rows < block_d, other=0.0)
        newest = _next_average(running_mean + block * d, rows, rows < block_d, batch, factor)
        tl.store(running_mean + block * d + rows, newest, mask=rows < block_d)
        offsets = rows[:, None] * d + rows[None, :]
        in_matrix = (rows < d)[:, None] & (rows < d)[None, :]
        batch = load_matrix((matrices + block * d * d, d, 1), rows, rows, d)
        newest = _next_average(running_matrices + block * d * d, offsets, in_matrix, batch, factor)
        tl.store(running_matrices + block * d * d + offsets, newest, mask=in_matrix)
        if num_batches is not None:  # noqa: SIM102  # known when the kernel is compiled, unlike the other condition
            if block == 0:
                tl.store(num_batches, tl.load(num_batches) + 1)
