// Newton's iteration for 64 variables in float32, on tensor cores, and its adjoint. The recurrence is that of
// polywhiten/solvers/newton.py with r = R / 3, whose matrices are symmetric and commute. The adjoint goes backwards
// through the steps: one takes four products, where a derivative forwards takes nine.
//
// Include newton.cuh and tensor_cores.cuh before this file.

template <typename T, int D> constexpr bool iterates_on_tensor_cores = uses_tensor_cores<T, D> && D == 64;

// A product of two matrices in shared memory, which are laid out as MatrixLayout says. Each warp has 16 rows and some
// columns. The right one mustn't be read as its transpose, though only rounding makes it differ: the matrices would no
// longer commute, and 12 steps would whiten data of few dimensions with a hundred times the error.
template <int D, int THREADS> struct TensorProduct {
    static constexpr int stride = MatrixLayout<float, D>::stride;
    static constexpr int tiles = D * D / 128 / (THREADS / 32);  // of 16 rows and 8 columns, for each warp

    float total[tiles][4] = {};

    static __device__ int first_row() { return threadIdx.x / 32 * tiles / (D / 8) * 16; }
    static __device__ int first_column() { return threadIdx.x / 32 * tiles % (D / 8) * 8; }

    __device__ void add(const float* left, const float* right) {
        // The columns of `left` and rows of `right` that a lane takes may be any two, if they are the same for both.
        // With these, no two lanes read `right` from one bank, and no two numbers are loaded together, which would have
        // to be moved to other registers.
        const int group = threadIdx.x % 32 / 4, first = threadIdx.x % 4 * 2, second = (first + 3) % 8;
        left += (first_row() + group) * stride;
        right += first_column() + group;
#pragma unroll 4
        for (int k = 0; k < D; k += 8) {
            const float *left1 = left + k + first, *left2 = left + k + second;
            const Parts<2> a[4] = {Parts<2>(left1[0]), Parts<2>(left1[8 * stride]), Parts<2>(left2[0]),
                                   Parts<2>(left2[8 * stride])};
#pragma unroll
            for (int j = 0; j < tiles; ++j) {
                const float* columns = right + k * stride + j * 8;
                const Parts<2> b[2] = {Parts<2>(columns[first * stride]), Parts<2>(columns[second * stride])};
                add_rounded_product(total[j], a, b);
            }
        }
    }

    // Calls use(index in a matrix, element) for every element.
    template <typename Use> __device__ void for_each(const Use& use) const {
        const int row = first_row() + threadIdx.x % 32 / 4, column = first_column() + threadIdx.x % 4 * 2;
#pragma unroll
        for (int j = 0; j < tiles; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) use((row + i / 2 * 8) * stride + column + j * 8 + i % 2, total[j][i]);
    }
};

// Calls write(index, element of left right) for every element, after all threads have read the operands.
template <int D, int THREADS, typename Write>
__device__ void multiply_on_tensor_cores(const float* left, const float* right, const Write& write) {
    TensorProduct<D, THREADS> product;
    product.add(left, right);
    __syncthreads();
    product.for_each(write);
    __syncthreads();
}

// Calls use(index, index in the transpose, row, column) for every element, which threads share.
template <int D, int THREADS, typename Use> __device__ void for_each_element(const Use& use) {
    constexpr int stride = MatrixLayout<float, D>::stride;
    for (int i = threadIdx.x; i < D * D; i += THREADS) {
        const int row = i / D, column = i % D;
        use(row * stride + column, column * stride + row, row, column);
    }
    __syncthreads();
}

// Does all steps, and calls keep(r, z) after each. Returns the trace by which the matrix was divided. `memory` holds
// three matrices.
template <int D, int THREADS, typename Keep>
__device__ float take_steps(const float* matrix, float eps, int steps, int d, unsigned char* memory, const Keep& keep) {
    constexpr int size = MatrixLayout<float, D>::size;
    float* r = reinterpret_cast<float*>(memory);
    float *z = r + size, *v = z + size;
    const float trace = bounded_trace<float, THREADS>(matrix, d, eps);
    for_each_element<D, THREADS>([&](int at, int, int row, int column) {
        r[at] = element(matrix, row, column, d, eps) / trace / 3;
        z[at] = 1.5f * ((row == column && row < d) - r[at]);
    });
    keep(r, z);
    for (int step = 1; step < steps; ++step) {
        multiply_on_tensor_cores<D, THREADS>(r, r, [&](int at, float product) { v[at] = r[at] - product; });
        multiply_on_tensor_cores<D, THREADS>(v, r, [&](int at, float product) { r[at] = 2.25f * (v[at] - product); });
        multiply_on_tensor_cores<D, THREADS>(z, r, [&](int at, float product) { z[at] = 1.5f * (z[at] - product); });
        keep(r, z);
    }
    return trace;
}

// Does what inverse_sqrt does. `memory` holds three matrices.
template <int D, int THREADS>
__device__ void inverse_sqrt_on_tensor_cores(const float* matrix, float* root, float eps, int steps, int d,
                                             unsigned char* memory) {
    constexpr int stride = MatrixLayout<float, D>::stride;
    const float* last = nullptr;
    const float trace = take_steps<D, THREADS>(matrix, eps, steps, d, memory, [&](auto, const float* z) { last = z; });
    for (int i = threadIdx.x; i < d * d; i += THREADS) root[i] = last[i / d * stride + i % d] / sqrt(trace);
}

// Makes p such that p + p' is the gradient of the r before, 9/4 (dr - 2 (r dr + dr r) + r r dr + r dr r + dr r r).
template <int D, int THREADS> __device__ void take_step_back(const float* dr, const float* r, float* p, float* q) {
    multiply_on_tensor_cores<D, THREADS>(dr, r, [&](int at, float product) { p[at] = product; });
    for_each_element<D, THREADS>([&](int at, int t, int, int) { q[at] = dr[at] - p[at] - (p[at] + p[t]); });
    multiply_on_tensor_cores<D, THREADS>(q, r, [&](int at, float product) { p[at] = 1.125f * (q[at] - product); });
}

// Stores r and then Z of every step in `iterates`, which has room for 2 steps D D numbers. `memory` holds three
// matrices.
template <int D, int THREADS>
__device__ void store_iterates(const float* matrix, float eps, int steps, int d, float* iterates,
                               unsigned char* memory) {
    take_steps<D, THREADS>(matrix, eps, steps, d, memory, [&](const float* r, const float* z) {
        for_each_element<D, THREADS>([&](int at, int, int row, int column) {
            iterates[row * D + column] = r[at];
            iterates[D * D + row * D + column] = z[at];
        });
        iterates += 2 * D * D;
    });
}

// Loads what this thread block or another one has stored.
template <int D, int THREADS> __device__ void load_iterate(float* to, const float* iterate) {
    for_each_element<D, THREADS>(
        [&](int at, int, int row, int column) { to[at] = __ldcg(iterate + row * D + column); });
}

// Does what inverse_sqrt_adjoint does, with the stored iterates. `memory` holds six matrices.
template <int D, int THREADS, typename Write>
__device__ void inverse_sqrt_adjoint_on_tensor_cores(const float* matrix, const float* gradient, float eps, int steps,
                                                     int d, const float* iterates, unsigned char* memory,
                                                     const Write& write) {
    constexpr int size = MatrixLayout<float, D>::size, stride = MatrixLayout<float, D>::stride;
    float* r = reinterpret_cast<float*>(memory);
    float *z = r + size, *dr = z + size, *dz = dr + size, *p = dz + size, *q = p + size;
    const float trace = bounded_trace<float, THREADS>(matrix, d, eps);
    load_iterate<D, THREADS>(z, iterates + (2 * steps - 1) * D * D);
    float along_scale = 0;
    for_each_element<D, THREADS>([&](int at, int, int row, int column) {
        dz[at] = (element(gradient, row, column, d, 0.f) + element(gradient, column, row, d, 0.f)) / 2;
        along_scale += dz[at] * z[at] / 2;
        p[at] = 0;
    });
    for (int step = steps - 1; step > 0; --step) {
        load_iterate<D, THREADS>(r, iterates + 2 * step * D * D);
        load_iterate<D, THREADS>(z, iterates + (2 * step - 1) * D * D);  // of the step before
        if (step < steps - 1) take_step_back<D, THREADS>(dr, r, p, q);
        multiply_on_tensor_cores<D, THREADS>(dz, z, [&](int at, float product) { p[at] -= 0.75f * product; });
        for_each_element<D, THREADS>([&](int at, int t, int, int) { dr[at] = p[at] + p[t]; });
        multiply_on_tensor_cores<D, THREADS>(dz, r, [&](int at, float product) { p[at] = product; });
        for_each_element<D, THREADS>([&](int at, int t, int, int) { dz[at] = 1.5f * dz[at] - 0.75f * (p[at] + p[t]); });
    }
    load_iterate<D, THREADS>(r, iterates);
    if (steps > 1) take_step_back<D, THREADS>(dr, r, p, q);
    for_each_element<D, THREADS>([&](int at, int t, int row, int column) {
        q[at] = (p[at] + p[t] - 1.5f * dz[at]) / 3;
        along_scale += q[at] * (element(matrix, row, column, d, eps) / trace);
    });
    along_scale = sum_over_threads<float, THREADS>(along_scale);
    for (int i = threadIdx.x; i < d * d; i += THREADS) {
        const float ds = q[i / d * stride + i % d] - (i / d == i % d ? along_scale : 0.f);
        write(i, ds / trace / sqrt(trace), ds / trace / sqrt(trace));
    }
}
