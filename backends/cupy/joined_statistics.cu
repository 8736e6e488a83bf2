// Mean, covariance and whitener of every block: sums over parts of the samples, and the last program that is done with
// a block adds up its parts and takes Newton's steps.

#include "products.cuh"
#include "shift.cuh"
#include "newton.cuh"
#include "pass.cuh"
#include "last.cuh"

// From the sums of x - shift and of their products, which add_parts has left.
template <typename A, int D>
__device__ void find_moments(const A* products, const A* sums, const A* shift, int count, int d, A* mean, A* covariance) {
    __shared__ A rest[D];  // of the mean, beside the shift
    const int thread = threadIdx.x;
    if (thread < d) {
        rest[thread] = __ldcg(sums + thread) / A(count);
        mean[thread] = shift[thread] + rest[thread];
    }
    __syncthreads();
    for (int place = thread; place < d * d; place += THREADS)
        covariance[place] = __ldcg(products + place) / A(count) - rest[place / d] * rest[place % d];
    __syncthreads();
}

// Of all blocks, one after the other.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, sizeof(accumulator<T>) == 4 ? 2 : 1)
    find_statistics(const T* x, Pass pass, double eps, long long steps, accumulator<T>* parts, unsigned* counters,
                    accumulator<T>* means, accumulator<T>* covariances, accumulator<T>* whiteners) {
    using A = accumulator<T>;
    constexpr int LOADS = D > 4 ? 8 : 4;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    __shared__ A shift[D];
    const int d = pass.d, inner = pass.inner(), count = pass.count(), length = d * d + d;
    const unsigned programs = pass.programs, index = blockIdx.x / programs, program = blockIdx.x % programs;
    const auto block = block_of(x, pass.x, index);
    find_shift<T, D>(shift, block, d, inner, count);

    const int first = program * pass.stretch, last = count - first < pass.stretch ? count : first + pass.stretch;
    A* part = parts + (long long)blockIdx.x * length;
    Loader<T, D, LOADS> loader(block, pass.x.along_samples, d, shift);
    sum_products<T, T, D, LOADS, true>(loader, loader, inner, first, last, part, part + d * d);
    parts += (long long)index * programs * length;
    if (!add_parts(parts, length, program, programs, pass.cluster, counters + index * pass.counters)) return;

    const long long place = (long long)index * d * d;
    find_moments<A, D>(parts, parts + d * d, shift, count, d, means + (long long)index * d, covariances + place);
    find_root<A, D, THREADS>(covariances + place, whiteners + place, eps, steps, d, shared_memory);
}
