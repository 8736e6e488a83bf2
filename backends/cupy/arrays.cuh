// How the kernels see an array (p, q, d, l): as blocks of d variables and M samples each. A sample is a position on the
// outer axis (p or q, whichever doesn't count the blocks) and one on the inner axis (l).
//
// "Block" always means such a block. The blocks of CUDA are called thread blocks. Where several thread blocks share the
// samples of one block, each has a "part" of them.

// Scalar arguments are long long and double because CuPy passes Python's int and float as these.

#include "half.cuh"

// The type that values of a type are accumulated in.
template <typename T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
template <typename T> using accumulator = typename Accumulator<T>::type;

__device__ inline float widen(half x) { return to_float(x); }
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }

__device__ inline void assign(half& to, float x) { to = to_half(x); }
__device__ inline void assign(float& to, float x) { to = x; }
__device__ inline void assign(double& to, double x) { to = x; }

// Returns the number of type T that is nearest to x.
template <typename T> __device__ accumulator<T> rounded_to(accumulator<T> x) {
    T result;
    assign(result, x);
    return widen(result);
}

// 16 bytes, the most that a thread moves between shared memory and registers in one instruction.
template <typename T> struct alignas(16) Pack {
    static constexpr int size = 16 / sizeof(T);
    T at[size];
};

template <typename T> __device__ inline Pack<T>& pack(T* pointer) { return *reinterpret_cast<Pack<T>*>(pointer); }
template <typename T> __device__ inline const Pack<T>& pack(const T* pointer) {
    return *reinterpret_cast<const Pack<T>*>(pointer);
}

// Loads COUNT consecutive values into registers, as packs if COUNT is a multiple of a pack.
template <int COUNT, typename A> __device__ inline void read(A* values, const A* from) {
    constexpr int size = Pack<A>::size;
    if constexpr (COUNT % size == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += size) {
            const Pack<A> loaded = pack(from + i);
#pragma unroll
            for (int k = 0; k < size; ++k) values[i + k] = loaded.at[k];
        }
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) values[i] = from[i];
    }
}

// A sample's positions on the outer and the inner axis. They have 32 bits to save registers; offsets have 64.
struct Cursor {
    int outer, inner;

    __device__ Cursor(int sample, int length) : outer(sample / length), inner(sample % length) {}

    // Moves on to the next sample.
    __device__ void increase(int length) {
        if (++inner == length) {
            inner = 0;
            ++outer;
        }
    }

    // Moves on by as many samples as `step` is from the first one. So a thread divides only once, where it begins.
    __device__ void advance(const Cursor& step, int length) {
        outer += step.outer;
        inner += step.inner;
        if (inner >= length) {
            inner -= length;
            ++outer;
        }
    }
};

// One block of an array. Strides count elements.
template <typename T> struct Block {
    T* data;
    long long outer, variable, inner;

    __device__ Block(T* data, long long block, long long outer, long long variable, long long inner, long long index)
        : data(data + index * block), outer(outer), variable(variable), inner(inner) {}

    __device__ long long offset(const Cursor& sample) const { return sample.outer * outer + sample.inner * inner; }

    __device__ T& at(long long offset, int v) const { return data[offset + v * variable]; }
};
