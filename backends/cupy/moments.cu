// Mean and covariance of every block.

#include "products.cuh"
#include "shift.cuh"

// Partial sums of x - shift and of (x - shift) (x - shift)' of every part. There is one thread block for each part.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, sizeof(accumulator<T>) == 4 ? 2 : 1)
    partial_moments(const T* x, long long block_stride, long long outer_stride, long long variable_stride,
                    long long inner_stride, long long along_samples, long long d, long long inner, long long count,
                    long long num_parts, long long samples_per_part, accumulator<T>* shifts, accumulator<T>* products,
                    accumulator<T>* sums) {
    using A = accumulator<T>;
    constexpr int LOADS = D > 4 ? 8 : 4;
    __shared__ A shift[D];
    const long long index = blockIdx.x / num_parts, part = blockIdx.x % num_parts;
    const Block<const T> block(x, block_stride, outer_stride, variable_stride, inner_stride, index);
    load_shift<T, D>(shift, block, d, inner, count);
    if (part == 0 && threadIdx.x < d) shifts[index * d + threadIdx.x] = shift[threadIdx.x];

    const int begin = part * samples_per_part;
    const int end = count - begin < samples_per_part ? count : begin + samples_per_part;
    Loader<T, D, LOADS> loader(block, along_samples, d, shift);
    sum_products<T, T, D, LOADS, true>(loader, loader, inner, begin, end, products + (long long)blockIdx.x * d * d,
                                       sums + (long long)blockIdx.x * d);
}

// Mean and covariance from the partial sums. There is one thread block for each row of every covariance.
template <typename A, int D>
__global__ void __launch_bounds__(THREADS)
    combine_moments(const A* shifts, const A* products, const A* sums, long long num_parts, long long d, double count,
                    A* mean, A* covariance) {
    __shared__ A offset[D];  // of the mean from the shift
    const long long index = blockIdx.x / d;
    const int row = blockIdx.x % d, column = threadIdx.x;
    A product, sum;
    combine_row<A, D>(products + index * num_parts * d * d, sums + index * num_parts * d, num_parts, d, row, product,
                      sum);
    if (column < D) offset[column] = sum / A(count);
    __syncthreads();
    if (column >= d) return;
    covariance[(index * d + row) * d + column] = product / A(count) - offset[row] * offset[column];
    if (row == 0) mean[index * d + column] = shifts[index * d + column] + offset[column];
}
