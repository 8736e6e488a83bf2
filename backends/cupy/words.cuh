// Elements of arrays in words of 32 bits, as they are loaded and stored: one float, or two halves.
//
// Include arrays.cuh and warp.cuh before this file.

// What one instruction loads or stores.
template <int WORDS> struct alignas(4 * WORDS) Words {
    unsigned at[WORDS];
};

template <typename T> constexpr int per_word = 4 / sizeof(T);

__device__ inline unsigned word_of(const float* values) { return bits_of(values[0]); }
__device__ inline unsigned word_of(const half* values) {
    return bits_of(values[0]) | (unsigned)bits_of(values[1]) << 16;
}

template <typename T> __device__ inline float element_of(const unsigned* words, int i) {
    if constexpr (sizeof(T) == 4)
        return float_of(words[i]);
    else
        return widen(half_of((unsigned short)(words[i / 2] >> i % 2 * 16)));
}

// Returns whether runs of BYTES bytes are aligned if they begin at multiples of this stride and of the outer one.
template <int BYTES, typename T> __device__ inline bool is_aligned(const Block<T>& block, long long stride) {
    const long long bytes = (block.outer | stride) * (long long)sizeof(T);
    return (reinterpret_cast<unsigned long long>(block.data) | bytes) % BYTES == 0;
}

// Returns whether a stride may be multiplied as an int, which takes one instruction.
__device__ inline bool fits_32_bits(long long stride) { return stride == (int)stride; }
