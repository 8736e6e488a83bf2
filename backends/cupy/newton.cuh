// Newton's iteration for (cov + eps I)^(-1/2), and its derivative, by the THREADS threads of a program: its matrices stay
// in shared memory for all steps. With batched products, a launch each, most of the time goes by between the launches.
//
// Pairs (value, tangent) are two matrices one after the other; polywhiten/solvers/iteration.py has the mathematics.
// It needs arrays.cuh, which is to be included before.

template <typename A, int D> struct Matrix {
    // A thread has a square of each product in registers. Few, large squares would leave threads idle, and few programs
    // iterate at a time, often fewer than there are multiprocessors: it is their speed that counts.
    static constexpr int side = D > 32 ? 4 : 2;
    static constexpr int sides = D / side;
    static constexpr int threads = sides * sides;  // a program may have more, which wait
    static constexpr int stride = D + Pack<A>::size;  // neighbouring rows lie in other banks
    static constexpr int size = D * stride;
};

// The smallest normal number.
template <typename A> __device__ constexpr A smallest() {
    return sizeof(A) == 8 ? 2.2250738585072014e-308 : 1.1754943508222875e-38;
}

// to = diagonal I + factor a b, both 0 beyond d; with TANGENT, the second matrix of `to` is its derivative by the product
// rule. `to` may be one of the others.
template <typename A, int D, int THREADS, bool TANGENT>
__device__ void multiply(A* to, const A* a, const A* b, A diagonal, A factor, int d) {
    using Shape = Matrix<A, D>;
    constexpr int side = Shape::side, stride = Shape::stride, size = Shape::size, width = Pack<A>::size;
    const bool busy = THREADS == Shape::threads || threadIdx.x < Shape::threads;
    const int row = threadIdx.x / Shape::sides, column = threadIdx.x % Shape::sides * side;
    A product[side][side] = {}, tangent[side][side] = {};
    for (int first = 0; busy && first < d; first += width) {
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

// z of y, both pairs; `e` is a pair's memory to work in.
template <typename A, int D, int THREADS, bool TANGENT> __device__ void iterate(A* z, A* y, A* e, int steps, int d) {
    using Shape = Matrix<A, D>;
    // the first step, where z is I: z = 3/2 I - y/2
    for (int place = threadIdx.x; place < D * D; place += THREADS) {
        const int r = place / D, c = place % D, at = r * Shape::stride + c;
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
template <typename A, int THREADS> __device__ A scale(const A* matrix, int d, A eps) {
    A diagonal = 0;
    for (int i = threadIdx.x; i < d; i += THREADS) diagonal += element(matrix, i, i, d, eps);
    const A trace = sum_of_all<A, THREADS>(diagonal);
    return trace < smallest<A>() ? smallest<A>() : trace;
}

// root = (matrix + eps I)^(-1/2). `memory` holds three matrices.
template <typename A, int D, int THREADS>
__device__ void find_root(const A* matrix, A* root, A eps, int steps, int d, unsigned char* memory) {
    using Shape = Matrix<A, D>;
    A* y = reinterpret_cast<A*>(memory);
    A *z = y + Shape::size, *e = z + Shape::size;
    const A t = scale<A, THREADS>(matrix, d, eps);
    for (int place = threadIdx.x; place < D * D; place += THREADS) {
        const int r = place / D, c = place % D;
        y[r * Shape::stride + c] = element<A>(matrix, r, c, d, eps) / t;
    }
    __syncthreads();
    iterate<A, D, THREADS, false>(z, y, e, steps, d);
    for (int place = threadIdx.x; place < d * d; place += THREADS)
        root[place] = z[place / d * Shape::stride + place % d] / sqrt(t);
}

// The gradient with respect to `matrix` of a loss whose gradient with respect to the root is `gradient`, handed over by
// write(place, element, transposed element). `memory` holds six matrices; nothing is written before all has been read.
template <typename A, int D, int THREADS, typename Write>
__device__ void find_adjoint(const A* matrix, const A* gradient, A eps, int steps, int d, unsigned char* memory,
                             const Write& write) {
    using Shape = Matrix<A, D>;
    A* y = reinterpret_cast<A*>(memory);
    A *z = y + 2 * Shape::size, *e = z + 2 * Shape::size;
    const auto symmetric = [&](int r, int c) {
        return (element<A>(gradient, r, c, d, 0) + element<A>(gradient, c, r, d, 0)) / 2;
    };

    const A t = scale<A, THREADS>(matrix, d, eps);
    for (int place = threadIdx.x; place < D * D; place += THREADS) {
        const int r = place / D, c = place % D, at = r * Shape::stride + c;
        y[at] = element<A>(matrix, r, c, d, eps) / t;
        y[Shape::size + at] = symmetric(r, c);
    }
    __syncthreads();
    iterate<A, D, THREADS, true>(z, y, e, steps, d);

    A along_scale = 0;
    for (int place = threadIdx.x; place < d * d; place += THREADS) {
        const int r = place / d, c = place % d, at = r * Shape::stride + c;
        along_scale += z[Shape::size + at] * (element<A>(matrix, r, c, d, eps) / t) + symmetric(r, c) * z[at] / 2;
    }
    along_scale = sum_of_all<A, THREADS>(along_scale);
    const auto result = [&](int r, int c) {
        return (z[Shape::size + r * Shape::stride + c] - (r == c ? along_scale : A(0))) / t / sqrt(t);
    };
    for (int place = threadIdx.x; place < d * d; place += THREADS) {
        const int r = place / d, c = place % d;
        write(place, result(r, c), result(c, r));
    }
}
