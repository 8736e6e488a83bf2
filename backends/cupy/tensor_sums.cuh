// Sums over the samples of products of two variables, on tensor cores. Each warp goes through samples of its own, and
// has all products of their variables in registers. The warps' totals are added up in the end, in a fixed order.
//
// Include products.cuh and tensor_cores.cuh before this file.

#include "warp_samples.cuh"

constexpr int WARPS = THREADS / 32;

// A lane's part of the sums of x - shift and of (x - shift) (x - shift)', where a and b are both x, if SYMMETRIC. Else
// those of dy and of dy (x - mean)', where a is dy and b is x. The shift or mean is called the centre.
template <typename T, int D, bool SYMMETRIC, bool ALONG_SAMPLES> struct TensorSum {
    // A lane loads as many samples ahead as the registers allow that the totals leave.
    static constexpr bool is_tight = D >= 32 && !SYMMETRIC;
    static constexpr int run = is_tight && sizeof(T) == 4 ? 2 : 4, vectors = is_tight || sizeof(T) == 4 ? 1 : 2;
    using Samples = WarpSamples<T, D, run, vectors, ALONG_SAMPLES>;
    static constexpr int rows = D / 8, pairs = rows / 2;
    static constexpr int step = sizeof(T) == 4 ? Samples::elements : 2;  // samples of a lane multiplied at a time

    // A chunk of samples, minus their centres if CENTRED.
    template <bool CENTRED> struct Chunk {
        Samples samples;
        const float* centres;

        __device__ float element(int row, int e) const {
            return samples.element(row, e) - (CENTRED ? centres[Samples::variable(row)] : 0.f);
        }
    };

    float products[pairs][rows][4] = {};  // in tiles of 16 x 8: two rows of a, and a row of b
    float sums[rows] = {};                // of the elements of a

    // Only tiles on and above the diagonal of x x' are computed.
    static __device__ constexpr bool is_computed(int pair, int row) { return !SYMMETRIC || row >= 2 * pair; }

    // Adds the products of a lane's samples from `first` on, as many as `step`.
    __device__ __forceinline__ void add_step(const Chunk<SYMMETRIC>& a, const Chunk<true>& b, int first) {
        Number<T> left[rows][step];
#pragma unroll
        for (int row = 0; row < rows; ++row)
#pragma unroll
            for (int e = 0; e < step; ++e) {
                const float element = a.element(row, first + e);
                sums[row] += element;
                left[row][e] = Number<T>(element);
            }
#pragma unroll
        for (int row = 0; row < rows; ++row) {
            Number<T> right[step];
#pragma unroll
            for (int e = 0; e < step; ++e) right[e] = SYMMETRIC ? left[row][e] : Number<T>(b.element(row, first + e));
#pragma unroll
            for (int i = 0; i < pairs; ++i)
                if (is_computed(i, row)) add_tile(products[i][row], left[2 * i], left[2 * i + 1], right);
        }
    }

    // Tensor cores cut off what they add up. Variances of float32, whose terms are all positive, would be too small by
    // 1e-4 after some thousand samples. So only a step is summed on them, and steps are added by rounding additions.
    static __device__ void add_tile(float (&total)[4], const Number<T> (&upper)[step], const Number<T> (&lower)[step],
                                    const Number<T> (&right)[step]) {
        float sum[4] = {};
        auto& sum_of_step = *(sizeof(T) == 4 ? &sum : &total);
#pragma unroll
        for (int e = 0; e < step; e += 2)
            multiply_add(sum_of_step, {upper[e], lower[e], upper[e + 1], lower[e + 1]}, {right[e], right[e + 1]});
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (sizeof(T) == 4) total[k] += sum[k];
    }

    // Adds the products of every WARPS-th chunk of samples `begin` to `end`. WIDE ones are whole, and each is loaded
    // while the one before is multiplied.
    template <bool WIDE>
    __device__ void add_chunks(const Block<const T>& a_block, const Block<const T>& b_block, const float* centres,
                               int d, int length, int begin, int end) {
        constexpr int between = WARPS * Samples::samples;
        const int first = begin + threadIdx.x / 32 * Samples::samples;
        int sample = first + threadIdx.x % 4 * run;
        Cursor cursor(sample, length);
        const Cursor between_chunks(between, length), between_vectors(4 * run, length);
        Samples next_a, next_b;
        const auto fetch = [&] {
            if (WIDE) {
                next_a.fetch_wide(a_block, d, length, cursor, between_vectors);
                if (!SYMMETRIC) next_b.fetch_wide(b_block, d, length, cursor, between_vectors);
            } else {
                // samples past the end add nothing: x is the shift there, or dy is 0
                next_a.fetch(a_block, d, length, cursor, between_vectors, end - sample, SYMMETRIC ? centres : nullptr);
                if (!SYMMETRIC) next_b.fetch(b_block, d, length, cursor, between_vectors, end - sample, nullptr);
            }
            sample += between;
            cursor.advance(between_chunks, length);
        };
        if (WIDE && first < end) fetch();
        for (int at = first; at < end; at += between) {
            if (!WIDE) fetch();
            const Chunk<SYMMETRIC> a{next_a, centres};
            const Chunk<true> b{next_b, centres};
            if (WIDE && at + between < end) fetch();
#pragma unroll
            for (int e = 0; e < Samples::elements; e += step) add_step(a, b, e);
        }
    }

    // Adds the products of samples `begin` to `end`.
    __device__ void add_samples(const Block<const T>& a, const Block<const T>& b, const float* centres, int d,
                                int length, int begin, int end) {
        const bool wide = Samples::is_wide(a, d, length) && (SYMMETRIC || Samples::is_wide(b, d, length));
        const int end_of_wide = wide ? end - (end - begin) % Samples::samples : begin;
        add_chunks<true>(a, b, centres, d, length, begin, end_of_wide);
        add_chunks<false>(a, b, centres, d, length, end_of_wide, end);
    }

    // Adds up the sums of all lanes and warps.
    __device__ void combine_sums(float* memory, float* result, int d) const {
        const int thread = threadIdx.x;
        __syncthreads();
#pragma unroll
        for (int row = 0; row < rows; ++row)
            memory[(thread / 32 * 4 + thread % 4) * D + Samples::variable(row)] = sums[row];
        __syncthreads();
        if (thread < d) {
            float sum = 0;
#pragma unroll 8
            for (int i = 0; i < 4 * WARPS; ++i) sum += memory[i * D + thread];
            result[thread] = sum;
        }
    }

    // Adds up the products of all warps, and calls write(row, column, sum), of x x' for elements of one triangle.
    template <typename Write> __device__ void combine_products(float* memory, const Write& write) const {
        constexpr int tile = 128;  // elements of 16 rows and 8 columns
#pragma unroll
        for (int i = 0; i < pairs; ++i) {
            const int thread = threadIdx.x;
            __syncthreads();
#pragma unroll
            for (int row = 0; row < rows; ++row)
                if (is_computed(i, row))
#pragma unroll
                    for (int k = 0; k < 4; ++k)
                        memory[(thread / 32 * rows + row) * tile + k * 32 + thread % 32] = products[i][row][k];
            __syncthreads();
            for (int slot = thread; slot < rows * tile; slot += THREADS) {
                const int column_row = slot / tile, k = slot / 32 % 4, lane = slot % 32;
                const int row = 2 * i + k / 2, group = lane / 4, column_group = lane % 4 * 2 + k % 2;
                const bool is_below = row > column_row || (row == column_row && group > column_group);
                if (SYMMETRIC && is_below) continue;
                float sum = 0;
#pragma unroll
                for (int warp = 0; warp < WARPS; ++warp) sum += memory[warp * rows * tile + slot];
                write(Samples::variable(group, row), Samples::variable(column_group, column_row), sum);
            }
        }
        __syncthreads();
    }
};

// Computes TensorSum's sums of products, (d, d), and of a, (d), over samples `begin` to `end`.
template <typename T, int D, bool SYMMETRIC>
__device__ void sum_products_on_tensor_cores(const Block<const T>& a, const Block<const T>& b, bool along_samples,
                                             const float* centres, int d, int length, int begin, int end,
                                             float* products, float* sums) {
    __shared__ float memory[WARPS * 16 * D];
    const auto compute = [&](auto sum) {
        sum.add_samples(a, b, centres, d, length, begin, end);
        sum.combine_sums(memory, sums, d);
        sum.combine_products(memory, [&](int row, int column, float element) {
            if (row >= d || column >= d) return;
            products[row * d + column] = element;
            if (SYMMETRIC) products[column * d + row] = element;
        });
    };
    if (along_samples)
        compute(TensorSum<T, D, SYMMETRIC, true>{});
    else
        compute(TensorSum<T, D, SYMMETRIC, false>{});
}
