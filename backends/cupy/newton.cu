// Newton's iteration for (cov + eps I)^(-1/2), and its derivative: a program for each matrix, which stays in shared
// memory for all steps. With batched products, a launch each, most of the time goes by between the launches.
//
// Pairs (value, tangent) are two matrices one after the other; polywhiten/solvers/iteration.py has the mathematics.

#include "arrays.cuh"

template <typename A, int D> struct Matrix {
    // A thread has a square of each product in registers. Few, large squares would leave threads idle, and this kernel
    // has few programs, often fewer than there are multiprocessors: it is their speed that counts.
    static constexpr int side = D > 32 ? 4 : 2;
    static constexpr int sides = D / side;
    static constexpr int threads = sides * sides;
    static constexpr int stride = D + Pack<A>::size;  // neighbouring rows lie in other banks
    static constexpr int size = D * stride;
};

// to = diagonal I + factor a b, both 0 beyond d; with TANGENT, the second matrix of `to` is its derivative by the product rule. `to` may
// be one of the others.
template <typename A, int D, bool TANGENT>
__device__ void multiply(A* to, const A* a, const A* b, A diagonal, A factor, int d) {
    using Shape = Matrix<A, D>;
    constexpr int side = Shape::side, stride = Shape::stride, size = Shape::size, width = Pack<A>::size;
    const int row = threadIdx.x / Shape::sides, column = threadIdx.x % Shape::sides * side;
    A product[side][side] = {}, tangent[side][side] = {};
    for (int first = 0; first < d; first += width) {
        A left[side][width], left_tangent[side][width];
#pragma unroll
        for (int i = 0; i < side; ++i) {
            const int place = (row + i * Shape::sides) * stride + first;
            read<width>(left[i], a + place);
            if (TANGENT) read<width>(left_tangent[i], a + size + place);
        }
#pragma unroll
        for (int k = 0; k < width; ++k) {
            A right[side], right_tangent[side];
            read<side>(right, b + (first + k) * stride + column);
            if (TANGENT) read<side>(right_tangent, b + size + (first + k) * stride + column);
#pragma unroll
            for (int i = 0; i < side; ++i)
#pragma unroll
                for (int j = 0; j < side; ++j) {
                    product[i][j] += left[i][k] * right[j];
                    if (TANGENT) tangent[i][j] += left_tangent[i][k] * right[j] + left[i][k] * right_tangent[j];
                }
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < side; ++i)
#pragma unroll
        for (int j = 0; j < side; ++j) {
            const int r = row + i * Shape::sides, c = column + j;
            to[r * stride + c] = (r == c && r < d ? diagonal : A(0)) + factor * product[i][j];
            if (TANGENT) to[size + r * stride + c] = factor * tangent[i][j];
        }
    __syncthreads();
}

// z of y, both pairs; `e` is a pair's memory to work in.
template <typename A, int D, bool TANGENT> __device__ void iterate(A* z, A* y, A* e, int steps, int d) {
    using Shape = Matrix<A, D>;
    // the first step, where z is I: z = 3/2 I - y/2
    for (int place = threadIdx.x; place < D * D; place += Shape::threads) {
        const int r = place / D, c = place % D, at = r * Shape::stride + c;
        z[at] = (r == c && r < d ? A(1.5) : A(0)) - y[at] / 2;
        if (TANGENT) z[Shape::size + at] = -y[Shape::size + at] / 2;
    }
    __syncthreads();
    if (steps > 1) multiply<A, D, TANGENT>(y, y, z, 0, 1, d);
    for (int step = 1; step < steps; ++step) {
        multiply<A, D, TANGENT>(e, z, y, 1.5, -0.5, d);
        multiply<A, D, TANGENT>(z, e, z, 0, 1, d);
        if (step + 1 < steps) multiply<A, D, TANGENT>(y, y, e, 0, 1, d);
    }
}

// The sum of the threads' numbers, in every thread.
template <typename A, int THREADS> __device__ A sum_of_all(A number) {
    __shared__ A partial[THREADS];
    partial[threadIdx.x] = number;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    }
    __syncthreads();
    const A sum = partial[0];
    __syncthreads();
    return sum;
}

template <typename A> __device__ A element(const A* matrix, int r, int c, int d, A eps) {
    return r < d && c < d ? matrix[r * d + c] + (r == c ? eps : A(0)) : A(0);
}

// The trace, which bounds the eigenvalues; NaN where it is NaN. It is 0 where eps is and all channels are constant.
template <typename A, int THREADS> __device__ A scale(const A* matrix, int d, A eps, A smallest) {
    A diagonal = 0;
    for (int i = threadIdx.x; i < d; i += THREADS) diagonal += element(matrix, i, i, d, eps);
    const A trace = sum_of_all<A, THREADS>(diagonal);
    return trace < smallest ? smallest : trace;
}

template <typename A, int D>
__global__ void __launch_bounds__(Matrix<A, D>::threads, 1)
    newton(const A* matrices, double eps, double smallest, long long steps, long long size, A* roots) {
    using Shape = Matrix<A, D>;
    constexpr int threads = Shape::threads;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    A* y = reinterpret_cast<A*>(shared_memory);
    A *z = y + Shape::size, *e = z + Shape::size;
    const int d = size;
    const A* matrix = matrices + (long long)blockIdx.x * d * d;

    const A t = scale<A, threads>(matrix, d, eps, smallest);
    for (int place = threadIdx.x; place < D * D; place += threads) {
        const int r = place / D, c = place % D;
        y[r * Shape::stride + c] = element<A>(matrix, r, c, d, eps) / t;
    }
    __syncthreads();
    iterate<A, D, false>(z, y, e, steps, d);
    for (int place = threadIdx.x; place < d * d; place += threads)
        roots[(long long)blockIdx.x * d * d + place] = z[place / d * Shape::stride + place % d] / sqrt(t);
}

template <typename A, int D>
__global__ void __launch_bounds__(Matrix<A, D>::threads, 1)
    newton_adjoint(const A* matrices, const A* gradients, double eps, double smallest, long long steps, long long size,
                   A* results) {
    using Shape = Matrix<A, D>;
    constexpr int threads = Shape::threads;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    A* y = reinterpret_cast<A*>(shared_memory);
    A *z = y + 2 * Shape::size, *e = z + 2 * Shape::size;
    const int d = size;
    const A* matrix = matrices + (long long)blockIdx.x * d * d;
    const A* gradient = gradients + (long long)blockIdx.x * d * d;
    const auto symmetric = [&](int r, int c) {
        return (element<A>(gradient, r, c, d, 0) + element<A>(gradient, c, r, d, 0)) / 2;
    };

    const A t = scale<A, threads>(matrix, d, eps, smallest);
    for (int place = threadIdx.x; place < D * D; place += threads) {
        const int r = place / D, c = place % D, at = r * Shape::stride + c;
        y[at] = element<A>(matrix, r, c, d, eps) / t;
        y[Shape::size + at] = symmetric(r, c);
    }
    __syncthreads();
    iterate<A, D, true>(z, y, e, steps, d);

    A along_scale = 0;
    for (int place = threadIdx.x; place < d * d; place += threads) {
        const int r = place / d, c = place % d, at = r * Shape::stride + c;
        along_scale += z[Shape::size + at] * (element<A>(matrix, r, c, d, eps) / t) + symmetric(r, c) * z[at] / 2;
    }
    along_scale = sum_of_all<A, threads>(along_scale);
    for (int place = threadIdx.x; place < d * d; place += threads) {
        const int r = place / d, c = place % d;
        const A tangent = z[Shape::size + r * Shape::stride + c];
        results[(long long)blockIdx.x * d * d + place] = (tangent - (r == c ? along_scale : A(0))) / t / sqrt(t);
    }
}
