// Newton's iteration for (cov + eps I)^(-1/2), and its derivative, by the THREADS threads of a thread block. The
// matrices stay in shared memory for all steps. Batched products, with one launch each, would wait for launches most of
// the time.
//
// A pair (value, tangent) is two matrices, one after the other. See polywhiten/solvers/iteration.py for the
// mathematics. Include arrays.cuh before this file.

// The layout of a matrix in shared memory, and how threads share its elements.

template <typename A, int D> struct MatrixLayout {
    // A thread computes one square of each product in registers. Squares are small to occupy many threads: often there
    // are fewer matrices than multiprocessors, so the time that one matrix takes is what counts.
    static constexpr int side = D > 32 ? 4 : 2;
    static constexpr int sides = D / side;
    static constexpr int threads = sides * sides;  // a thread block may have more, which wait
    static constexpr int stride = D + Pack<A>::size;  // padded, so that neighbouring rows lie in different banks
    static constexpr int size = D * stride;
};

// Returns the smallest normal number.
template <typename A> __device__ constexpr A smallest() {
    return sizeof(A) == 8 ? 2.2250738585072014e-308 : 1.1754943508222875e-38;
}

// Computes to = diagonal I + factor a b, which is 0 past d. With TANGENT, all three are pairs, and the tangent follows
// from the product rule. `to` may be one of the operands.
template <typename A, int D, int THREADS, bool TANGENT>
__device__ void multiply(A* to, const A* a, const A* b, A diagonal, A factor, int d) {
    using Shape = MatrixLayout<A, D>;
    constexpr int side = Shape::side, stride = Shape::stride, size = Shape::size, width = Pack<A>::size;
    const bool busy = THREADS == Shape::threads || threadIdx.x < Shape::threads;
    const int row = threadIdx.x / Shape::sides, column = threadIdx.x % Shape::sides * side;
    A product[side][side] = {}, tangent[side][side] = {};
    for (int first = 0; busy && first < d; first += width) {
        A left[side][width], left_tangent[side][width];
#pragma unroll
        for (int i = 0; i < side; ++i) {
            const int offset = (row + i * Shape::sides) * stride + first;
            read<width>(left[i], a + offset);
            if (TANGENT) read<width>(left_tangent[i], a + size + offset);
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
    if (busy) {
#pragma unroll
        for (int i = 0; i < side; ++i)
#pragma unroll
            for (int j = 0; j < side; ++j) {
                const int r = row + i * Shape::sides, c = column + j;
                to[r * stride + c] = (r == c && r < d ? diagonal : A(0)) + factor * product[i][j];
                if (TANGENT) to[size + r * stride + c] = factor * tangent[i][j];
            }
    }
    __syncthreads();
}

// Computes z = y^(-1/2). All three are pairs with TANGENT. y is overwritten, and `e` is memory to work in.
template <typename A, int D, int THREADS, bool TANGENT> __device__ void iterate(A* z, A* y, A* e, int steps, int d) {
    using Shape = MatrixLayout<A, D>;
    // In the first step z is I, so that the new z is 3/2 I - y/2.
    for (int i = threadIdx.x; i < D * D; i += THREADS) {
        const int r = i / D, c = i % D, at = r * Shape::stride + c;
        z[at] = (r == c && r < d ? A(1.5) : A(0)) - y[at] / 2;
        if (TANGENT) z[Shape::size + at] = -y[Shape::size + at] / 2;
    }
    __syncthreads();
    if (steps > 1) multiply<A, D, THREADS, TANGENT>(y, y, z, 0, 1, d);
    for (int step = 1; step < steps; ++step) {
        multiply<A, D, THREADS, TANGENT>(e, z, y, 1.5, -0.5, d);
        multiply<A, D, THREADS, TANGENT>(z, e, z, 0, 1, d);
        if (step + 1 < steps) multiply<A, D, THREADS, TANGENT>(y, y, e, 0, 1, d);
    }
}

// Returns the sum of all threads' values, in every thread.
template <typename A, int THREADS> __device__ A sum_over_threads(A value) {
    __shared__ A partial[THREADS];
    partial[threadIdx.x] = value;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    }
    __syncthreads();
    const A sum = partial[0];
    __syncthreads();
    return sum;
}

// Returns an element of matrix + eps I, or 0 past d.
template <typename A> __device__ A element(const A* matrix, int r, int c, int d, A eps) {
    return r < d && c < d ? matrix[r * d + c] + (r == c ? eps : A(0)) : A(0);
}

// Returns the trace, which bounds the eigenvalues, or NaN if it is NaN. The trace is 0 if eps is 0 and all channels are
// constant; infinity takes its place, so that the whitener is 0.
template <typename A, int THREADS> __device__ A bounded_trace(const A* matrix, int d, A eps) {
    A diagonal = 0;
    for (int i = threadIdx.x; i < d; i += THREADS) diagonal += element(matrix, i, i, d, eps);
    const A trace = sum_over_threads<A, THREADS>(diagonal);
    if (trace <= 0) return 1 / A(0);
    return trace < smallest<A>() ? smallest<A>() : trace;
}

// Computes root = (matrix + eps I)^(-1/2). `memory` holds three matrices.
template <typename A, int D, int THREADS>
__device__ void inverse_sqrt(const A* matrix, A* root, A eps, int steps, int d, unsigned char* memory) {
    using Shape = MatrixLayout<A, D>;
    A* y = reinterpret_cast<A*>(memory);
    A *z = y + Shape::size, *e = z + Shape::size;
    const A t = bounded_trace<A, THREADS>(matrix, d, eps);
    for (int i = threadIdx.x; i < D * D; i += THREADS) {
        const int r = i / D, c = i % D;
        y[r * Shape::stride + c] = element<A>(matrix, r, c, d, eps) / t;
    }
    __syncthreads();
    iterate<A, D, THREADS, false>(z, y, e, steps, d);
    for (int i = threadIdx.x; i < d * d; i += THREADS)
        root[i] = z[i / d * Shape::stride + i % d] / sqrt(t);
}

// Computes the gradient of a loss with respect to `matrix` from `gradient`, the one with respect to the root. For each
// element it calls write(index, element, element of the transpose). `memory` holds six matrices. Nothing is written
// before all inputs have been read.
template <typename A, int D, int THREADS, typename Write>
__device__ void inverse_sqrt_adjoint(const A* matrix, const A* gradient, A eps, int steps, int d, unsigned char* memory,
                             const Write& write) {
    using Shape = MatrixLayout<A, D>;
    A* y = reinterpret_cast<A*>(memory);
    A *z = y + 2 * Shape::size, *e = z + 2 * Shape::size;
    const auto symmetric = [&](int r, int c) {
        return (element<A>(gradient, r, c, d, 0) + element<A>(gradient, c, r, d, 0)) / 2;
    };

    const A t = bounded_trace<A, THREADS>(matrix, d, eps);
    for (int i = threadIdx.x; i < D * D; i += THREADS) {
        const int r = i / D, c = i % D, at = r * Shape::stride + c;
        y[at] = element<A>(matrix, r, c, d, eps) / t;
        y[Shape::size + at] = symmetric(r, c);
    }
    __syncthreads();
    iterate<A, D, THREADS, true>(z, y, e, steps, d);

    A scale_gradient = 0;
    for (int i = threadIdx.x; i < d * d; i += THREADS) {
        const int r = i / d, c = i % d, at = r * Shape::stride + c;
        scale_gradient += z[Shape::size + at] * (element<A>(matrix, r, c, d, eps) / t) + symmetric(r, c) * z[at] / 2;
    }
    scale_gradient = sum_over_threads<A, THREADS>(scale_gradient);
    const auto result = [&](int r, int c) {
        return (z[Shape::size + r * Shape::stride + c] - (r == c ? scale_gradient : A(0))) / t / sqrt(t);
    };
    for (int i = threadIdx.x; i < d * d; i += THREADS) {
        const int r = i / d, c = i % d;
        write(i, result(r, c), result(c, r));
    }
}
