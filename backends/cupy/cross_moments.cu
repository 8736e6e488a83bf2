// Cross moments of every block: s, the sum of dy, and K, the sum of dy (x - mean)'. The gradients need nothing else of
// the samples.

#include "products.cuh"

constexpr int LOADS = 4;  // of each of the two arrays

// Partial sums of every part. There is one thread block for each part.
template <typename TY, typename TX, int D>
__global__ void __launch_bounds__(THREADS, sizeof(accumulator<TX>) == 4 ? 2 : 1)
    partial_cross_moments(const TY* dy, long long dy_block, long long dy_outer, long long dy_variable,
                          long long dy_inner, long long dy_along_samples, const TX* x, long long x_block,
                          long long x_outer, long long x_variable, long long x_inner, long long x_along_samples,
                          const accumulator<TX>* mean, long long d, long long inner, long long count,
                          long long num_parts, long long samples_per_part, accumulator<TX>* products,
                          accumulator<TX>* sums) {
    using A = accumulator<TX>;
    __shared__ A zero[D], centre[D];
    const long long index = blockIdx.x / num_parts, part = blockIdx.x % num_parts;
    if (threadIdx.x < D) {
        zero[threadIdx.x] = 0;
        centre[threadIdx.x] = threadIdx.x < d ? mean[index * d + threadIdx.x] : A(0);
    }
    __syncthreads();

    const int begin = part * samples_per_part;
    const int end = count - begin < samples_per_part ? count : begin + samples_per_part;
    const Block<const TY> dy_block_of(dy, dy_block, dy_outer, dy_variable, dy_inner, index);
    const Block<const TX> x_block_of(x, x_block, x_outer, x_variable, x_inner, index);
    Loader<TY, D, LOADS> dy_loader(dy_block_of, dy_along_samples, d, zero);
    Loader<TX, D, LOADS> x_loader(x_block_of, x_along_samples, d, centre);
    sum_products<TY, TX, D, LOADS, false>(dy_loader, x_loader, inner, begin, end,
                                          products + (long long)blockIdx.x * d * d, sums + (long long)blockIdx.x * d);
}

// Adds up the partial sums. There is one thread block for each row of every K.
template <typename A, int D>
__global__ void __launch_bounds__(THREADS)
    combine_cross_moments(const A* products, const A* sums, long long num_parts, long long d, A* s, A* k) {
    const long long index = blockIdx.x / d;
    const int row = blockIdx.x % d, column = threadIdx.x;
    A product, sum;
    combine_row<A, D>(products + index * num_parts * d * d, sums + index * num_parts * d, num_parts, d, row, product,
                      sum);
    if (column >= d) return;
    k[(index * d + row) * d + column] = product;
    if (row == 0) s[index * d + column] = sum;
}
