// Newton's iteration and its derivative. There is one thread block for each matrix.

#include "arrays.cuh"
#include "newton.cuh"

template <typename A, int D>
__global__ void __launch_bounds__(MatrixLayout<A, D>::threads, 1)
    newton(const A* matrices, double eps, long long steps, long long d, A* roots) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    const long long first = blockIdx.x * d * d;
    inverse_sqrt<A, D, MatrixLayout<A, D>::threads>(matrices + first, roots + first, eps, steps, d, shared_memory);
}

template <typename A, int D>
__global__ void __launch_bounds__(MatrixLayout<A, D>::threads, 1)
    newton_adjoint(const A* matrices, const A* gradients, double eps, long long steps, long long d, A* results) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    const long long first = blockIdx.x * d * d;
    inverse_sqrt_adjoint<A, D, MatrixLayout<A, D>::threads>(
        matrices + first, gradients + first, eps, steps, d, shared_memory,
        [&](int i, A element, A) { results[first + i] = element; });
}
