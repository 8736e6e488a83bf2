// Mean and covariance of every block.

#include "products.cuh"
#include "shift.cuh"

// Of every program's samples: sums of (x - shift) (x - shift)' and of x - shift.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, sizeof(accumulator<T>) == 4 ? 2 : 1)
    moments(const T* x, long long block_stride, long long outer_stride, long long variable_stride,
            long long inner_stride, long long along_samples, long long d, long long inner, long long count,
            long long programs, long long stretch, accumulator<T>* shifts, accumulator<T>* products, accumulator<T>* sums) {
    using A = accumulator<T>;
    constexpr int LOADS = D > 4 ? 8 : 4;
    __shared__ A shift[D];
    const long long index = blockIdx.x / programs, program = blockIdx.x % programs;
    const Block<const T> block(x, block_stride, outer_stride, variable_stride, inner_stride, index);
    find_shift<T, D>(shift, block, d, inner, count);
    if (program == 0 && threadIdx.x < d) shifts[index * d + threadIdx.x] = shift[threadIdx.x];

    const int first = program * stretch, last = count - first < stretch ? count : first + stretch;
    Loader<T, D, LOADS> loader(block, along_samples, d, shift);
    sum_products<T, T, D, LOADS, true>(loader, loader, inner, first, last, products + (long long)blockIdx.x * d * d,
                                sums + (long long)blockIdx.x * d);
}

// A program for every row of every covariance.
template <typename A, int D>
__global__ void __launch_bounds__(THREADS)
    finish_moments(const A* shifts, const A* products, const A* sums, long long programs, long long d, double count,
                   A* mean, A* covariance) {
    __shared__ A rest[D];  // of the mean, beside the shift
    const long long index = blockIdx.x / d;
    const int row = blockIdx.x % d, column = threadIdx.x;
    A product, sum;
    add_programs<A, D>(products + index * programs * d * d, sums + index * programs * d, programs, d, row, product,
                       sum);
    if (column < D) rest[column] = sum / A(count);
    __syncthreads();
    if (column >= d) return;
    covariance[(index * d + row) * d + column] = product / A(count) - rest[row] * rest[column];
    if (row == 0) mean[index * d + column] = shifts[index * d + column] + rest[column];
}
