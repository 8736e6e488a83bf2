"""How kernels address arrays and matrices.

The samples of a block are a tuple `(pointer, stride_outer, stride_row, stride_inner)`: each row is a variable, and
sample m lies at index `m // inner` of the outer axis and `m % inner` of the inner axis. A matrix is a tuple
`(pointer, stride_row, stride_column)`. These are plain tuples because torch.compile copies the source of a kernel
without the classes that it uses. They have no None in them, as Triton 3.3 can't unpack that.
"""

import triton
import triton.language as tl


@triton.jit
def narrow(number):
    # torch.compile passes 64 bits where shapes are dynamic. Offsets of 32 bits take half as many registers.
    return tl.cast(number, tl.int32)


@triton.jit
def narrow_multiple(number, DIVISOR: tl.constexpr):
    # Return a multiple of DIVISOR in 32 bits, in a way that shows the compiler that it is one.
    if DIVISOR == 1:
        return narrow(number)
    else:
        return narrow(number) // DIVISOR * DIVISOR


@triton.jit
def rows_of_block(block, d, total_rows, HAS_SMALLER_BLOCK: tl.constexpr):
    # Return the number of a block's rows. If all have d, the compiler knows that masks of rows are the same for many.
    if HAS_SMALLER_BLOCK:
        return tl.minimum(d, total_rows - block * d).to(tl.int32)
    else:
        return d


@triton.jit
def narrow_strides(array):
    # Return the same array with strides of 32 bits, whichever its axes are.
    pointer, first, second, third = array
    return pointer, narrow(first), narrow(second), narrow(third)


@triton.jit
def tile_pointers(array, rows, m, inner):
    # Return pointers to the samples m of some rows.
    pointer, stride_outer, stride_row, stride_inner = array
    columns = (m // inner) * stride_outer + (m % inner) * stride_inner
    return pointer + (rows[:, None] * stride_row + columns[None, :])


@triton.jit
def load_samples(array, rows, m, inner, valid):
    # Return the samples m of some rows; 0 where they are not valid.
    return tl.load(tile_pointers(array, rows, m, inner), mask=valid, other=0.0)


@triton.jit
def load_tile(array, rows, m, inner, valid):
    # Return the samples m of some rows in float32; 0 where they are not valid.
    return load_samples(array, rows, m, inner, valid).to(tl.float32)


@triton.jit
def load_matrix(matrix, rows, columns, d):
    # Return some rows and columns of a (d, d) matrix; 0 outside of it.
    pointer, stride_row, stride_column = matrix
    inside = (rows < d)[:, None] & (columns < d)[None, :]
    return tl.load(pointer + rows[:, None] * stride_row + columns[None, :] * stride_column, mask=inside, other=0.0)


@triton.jit
def load_vector(vector, rows, d):
    # Return some elements of a vector of d elements in float32; 0 outside of it.
    return tl.load(vector + rows, mask=rows < d, other=0.0).to(tl.float32)


@triton.jit
def store_matrix(pointer, values, rows, d):
    # Store the (d, d) matrix in the upper left corner of a tile, row by row.
    inside = (rows < d)[:, None] & (rows < d)[None, :]
    tl.store(pointer + rows[:, None] * d + rows[None, :], values, mask=inside)
