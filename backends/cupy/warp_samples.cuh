// Samples in the registers of a warp, as tensor cores take them: each lane loads its own elements straight from global
// memory, so that no lane waits for another warp, or for shared memory.
//
// Include tensor_cores.cuh before this file.

#include "words.cuh"

// A chunk of samples. The 4 lanes of a group have the same variables, one for each of the `rows`, and each lane has RUN
// adjacent samples VECTORS times. ALONG_SAMPLES tells whether adjacent samples, rather than variables, are neighbours
// in memory; words are in the same order.
template <typename T, int D, int RUN, int VECTORS, bool ALONG_SAMPLES> struct WarpSamples {
    using Source = Block<const T>;
    static constexpr int rows = D / 8, elements = RUN * VECTORS, samples = 4 * elements;
    static constexpr int width = rows < 4 * per_word<T> ? rows : 4 * per_word<T>;  // variables loaded at a time

    unsigned words[VECTORS][rows * RUN / per_word<T>];

    // Returns the variable that this lane's group has in a row.
    static __device__ int variable(int row) { return variable(threadIdx.x % 32 / 4, row); }
    static __device__ int variable(int group, int row) { return group * width + from_first(row); }

    // Returns whether one instruction may load a run of samples, or `width` variables.
    static __device__ bool is_wide(const Source& block, int d, int length) {
        if (ALONG_SAMPLES)
            return block.inner == 1 && length % RUN == 0 && fits_32_bits(block.variable) &&
                   is_aligned<RUN * sizeof(T)>(block, block.variable);
        return block.variable == 1 && d % width == 0 && is_aligned<width * sizeof(T)>(block, block.inner);
    }

    __device__ float element(int row, int e) const { return element_of<T>(words[e / RUN], place(row, e % RUN)); }

    // Loads the chunk, from this lane's first sample on, if is_wide().
    __device__ void fetch_wide(const Source& block, int d, int length, Cursor cursor, const Cursor& between_vectors) {
        constexpr int size = (ALONG_SAMPLES ? RUN : width) / per_word<T>, pieces = ALONG_SAMPLES ? rows : rows / width;
        const int stride = block.variable, left = d - variable(0);
#pragma unroll
        for (int vector = 0; vector < VECTORS; ++vector, cursor.advance(between_vectors, length)) {
            Cursor sample = cursor;
#pragma unroll
            for (int e = 0; e < (ALONG_SAMPLES ? 1 : RUN); ++e, sample.increase(length)) {
                const T* source = &block.at(block.offset(sample), variable(0));
#pragma unroll
                for (int i = 0; i < pieces; ++i) {
                    const int row = from_first(ALONG_SAMPLES ? i : i * width);
                    const long long offset = ALONG_SAMPLES ? (long long)row * stride : row;
                    Words<size> loaded = {};
                    if (row < left) loaded = *reinterpret_cast<const Words<size>*>(source + offset);
#pragma unroll
                    for (int k = 0; k < size; ++k) words[vector][(e * pieces + i) * size + k] = loaded.at[k];
                }
            }
        }
    }

    // The same by an instruction for each element, for any strides and length. `left` samples exist from this lane's
    // first one on. Others, and variables past d, are replaced by their centre, or by 0 if `centres` is null.
    __device__ void fetch(const Source& block, int d, int length, Cursor cursor, const Cursor& between_vectors,
                          int left, const float* centres) {
#pragma unroll
        for (int vector = 0; vector < VECTORS; ++vector, cursor.advance(between_vectors, length), left -= 4 * RUN) {
            T values[rows * RUN];
            Cursor sample = cursor;
#pragma unroll
            for (int e = 0; e < RUN; ++e, sample.increase(length)) {
                const T* source = &block.at(block.offset(sample), variable(0));
#pragma unroll
                for (int row = 0; row < rows; ++row)
                    if (e < left && variable(row) < d)
                        values[place(row, e)] = source[from_first(row) * block.variable];
                    else
                        assign(values[place(row, e)], centres ? centres[variable(row)] : 0.f);
            }
#pragma unroll
            for (int i = 0; i < rows * RUN; i += per_word<T>) words[vector][i / per_word<T>] = word_of(values + i);
        }
    }

  private:
    static __device__ constexpr int from_first(int row) { return row / width * (8 * width) + row % width; }

    static __device__ constexpr int place(int row, int e) { return ALONG_SAMPLES ? row * RUN + e : e * rows + row; }
};
