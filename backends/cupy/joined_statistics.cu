// Mean, covariance and whitener of every block in one launch. Each thread block sums one part of a block's samples. The
// last one to finish a block combines the parts and does Newton's iteration.

#include "products.cuh"
#include "tensor_cores.cuh"
#include "tensor_sums.cuh"
#include "shift.cuh"
#include "newton.cuh"
#include "tensor_newton.cuh"
#include "pass.cuh"
#include "combine_parts.cuh"

// Computes mean and covariance from the sums of x - shift and of its products, as combine_parts has left them.
template <typename A, int D>
__device__ void combine_moments(const A* products, const A* sums, const A* shift, int count, int d, A* mean,
                               A* covariance) {
    __shared__ A offset[D];  // of the mean from the shift
    const int thread = threadIdx.x;
    if (thread < d) {
        offset[thread] = __ldcg(sums + thread) / A(count);
        mean[thread] = shift[thread] + offset[thread];
    }
    __syncthreads();
    for (int i = thread; i < d * d; i += THREADS)
        covariance[i] = __ldcg(products + i) / A(count) - offset[i / d] * offset[i % d];
    __syncthreads();
}

// The outputs hold one mean or matrix for each block.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, sum_residency<T, D>)
    joined_statistics(const T* x, Pass pass, double eps, long long steps, accumulator<T>* partial_sums,
                      unsigned* counters, accumulator<T>* means, accumulator<T>* covariances,
                      accumulator<T>* whiteners) {
    using A = accumulator<T>;
    constexpr int LOADS = D > 4 ? 8 : 4;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    __shared__ A shift[D];
    const int d = pass.d, inner = pass.inner(), count = pass.count(), length = d * d + d, thread = threadIdx.x;
    const unsigned num_parts = pass.num_parts, index = blockIdx.x / num_parts, part = blockIdx.x % num_parts;
    const auto block = block_of(x, pass.x, index);
    load_shift<T, D>(shift, block, d, inner, count);

    const int begin = part * pass.samples_per_part;
    const int end = count - begin < pass.samples_per_part ? count : begin + pass.samples_per_part;
    A* products = partial_sums + (long long)blockIdx.x * length;
    if constexpr (uses_tensor_cores<T, D>) {
        if (thread < D) shift[thread] = rounded_to<T>(shift[thread]);  // it takes the place of samples past the end
        __syncthreads();
        sum_products_on_tensor_cores<T, D, true>(block, block, pass.x.along_samples, shift, d, inner, begin, end,
                                                 products, products + d * d);
    } else {
        Loader<T, D, LOADS> loader(block, pass.x.along_samples, d, shift);
        sum_products<T, T, D, LOADS, true>(loader, loader, inner, begin, end, products, products + d * d);
    }
    partial_sums += (long long)index * num_parts * length;
    unsigned* block_counters = counters + index * pass.num_counters;
    if (!combine_parts(partial_sums, length, part, num_parts, pass.fan_in, block_counters)) return;

    const long long first = (long long)index * d * d;
    A* covariance = covariances + first;
    A* mean = means + (long long)index * d;
    combine_moments<A, D>(partial_sums, partial_sums + d * d, shift, count, d, mean, covariance);
    if constexpr (iterates_on_tensor_cores<T, D>)
        inverse_sqrt_on_tensor_cores<D, THREADS>(covariance, whiteners + first, eps, steps, d, shared_memory);
    else
        inverse_sqrt<A, D, THREADS>(covariance, whiteners + first, eps, steps, d, shared_memory);
}
