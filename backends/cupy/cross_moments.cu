// Sums of dy and of dy (x - mean)' of every block: all that its gradients need of the samples.

#include "products.cuh"

constexpr int LOADS = 4;  // of each of two arrays

// Of every program's samples.
template <typename TY, typename TX, int D>
__global__ void __launch_bounds__(THREADS, sizeof(accumulator<TX>) == 4 ? 2 : 1)
    cross_moments(const TY* dy, long long dy_block, long long dy_outer, long long dy_variable, long long dy_inner,
                  long long dy_along_samples, const TX* x, long long x_block, long long x_outer, long long x_variable,
                  long long x_inner, long long x_along_samples, const accumulator<TX>* mean, long long d,
                  long long inner, long long count, long long programs, long long stretch, accumulator<TX>* products, accumulator<TX>* sums) {
    using A = accumulator<TX>;
    __shared__ A zero[D], centre[D];
    const long long index = blockIdx.x / programs, program = blockIdx.x % programs;
    if (threadIdx.x < D) {
        zero[threadIdx.x] = 0;
        centre[threadIdx.x] = threadIdx.x < d ? mean[index * d + threadIdx.x] : A(0);
    }
    __syncthreads();

    const int first = program * stretch, last = count - first < stretch ? count : first + stretch;
    Loader<TY, D, LOADS> left(Block<const TY>(dy, dy_block, dy_outer, dy_variable, dy_inner, index), dy_along_samples, d, zero);
    Loader<TX, D, LOADS> right(Block<const TX>(x, x_block, x_outer, x_variable, x_inner, index), x_along_samples, d, centre);
    sum_products<TY, TX, D, LOADS, false>(left, right, inner, first, last, products + (long long)blockIdx.x * d * d,
                                   sums + (long long)blockIdx.x * d);
}

// A program for every row of every block's products.
template <typename A, int D>
__global__ void __launch_bounds__(THREADS)
    finish_cross_moments(const A* products, const A* sums, long long programs, long long d, A* s, A* k) {
    const long long index = blockIdx.x / d;
    const int row = blockIdx.x % d, column = threadIdx.x;
    A product, sum;
    add_programs<A, D>(products + index * programs * d * d, sums + index * programs * d, programs, d, row, product,
                       sum);
    if (column >= d) return;
    k[(index * d + row) * d + column] = product;
    if (row == 0) s[index * d + column] = sum;
}
