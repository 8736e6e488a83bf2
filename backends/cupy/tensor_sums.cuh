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

    // A chunk of samples, minus their centres if there are some.
    struct Chunk {
        Samples samples;
        const float* centres;

        __device__ float element(int row, int e) const {
            return samples.element(row, e) - (centres ? centres[Samples::variable(row)] : 0.f);
        }
    };

    float products[pairs][rows][4] = {};  // of two rows of a, and a row of b
    float sums[rows] = {};                // of the elements of a

    // Only tiles on and above the diagonal of x x' are computed.
    static __device__ constexpr bool is_computed(int pair, int row) { return !SYMMETRIC || row >= 2 * pair; }

    // Adds the products of samples e and e + 1 of each lane.
    __device__ __forceinline__ void add_two(const Chunk& a, const Chunk& b, int e) {
        Number<T> left[rows][2];
#pragma unroll
        for (int row = 0; row < rows; ++row)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float element = a.element(row, e + k);
                sums[row] += element;
                left[row][k] = Number<T>(element);
            }
#pragma unroll
        for (int row = 0; row < rows; ++row) {
            const Number<T> right[2] = {SYMMETRIC ? left[row][0] : Number<T>(b.element(row, e)),
                                        SYMMETRIC ? left[row][1] : Number<T>(b.element(row, e + 1))};
#pragma unroll
            for (int i = 0; i < pairs; ++i)
                if (is_computed(i, row))
                    multiply_add(products[i][row],
                                 {left[2 * i][0], left[2 * i + 1][0], left[2 * i][1], left[2 * i + 1][1]}, right);
        }
    }

    // Adds the products of every WARPS-th chunk of samples `begin` to `end`. WIDE ones are whole, and each is loaded
    // while the one before is multiplied.
    template <bool WIDE>
    __device__ void add_chunks(const Block<const T>& a_block, const Block<const T>& b_block, const float* centres,
                               int d, int length, int begin, int end) {
        constexpr int step = WARPS * Samples::samples;
        const int first = begin + threadIdx.x / 32 * Samples::samples;
        int sample = first + threadIdx.x % 4 * run;
        Cursor cursor(sample, length);
        const Cursor between_chunks(step, length), between_vectors(4 * run, length);
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
            sample += step;
            cursor.advance(between_chunks, length);
        };
        if (WIDE && first < end) fetch();
        for (int at = first; at < end; at += step) {
            if (!WIDE) fetch();
            const Chunk a{next_a, SYMMETRIC ? centres : nullptr}, b{next_b, centres};
            if (WIDE && at + step < end) fetch();
#pragma unroll
            for (int e = 0; e < Samples::elements; e += 2) add_two(a, b, e);
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
