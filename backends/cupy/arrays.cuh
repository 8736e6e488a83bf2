// Arrays (p, q, d, l) as the kernels see them: blocks of d variables and M samples, a sample being a position on the
// outer one of two axes and on the inner one (l).

// Kernels' numbers are long long and double, as CuPy passes Python's.

#include "half.cuh"

// What values of a type are added up in.
template <typename T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
template <typename T> using accumulator = typename Accumulator<T>::type;

__device__ inline float value(half x) { return to_float(x); }
__device__ inline float value(float x) { return x; }
__device__ inline double value(double x) { return x; }

__device__ inline void assign(half& to, float x) { to = to_half(x); }
__device__ inline void assign(float& to, float x) { to = x; }
__device__ inline void assign(double& to, double x) { to = x; }

// 16 bytes, the most that a thread moves at once between shared memory and registers.
template <typename T> struct alignas(16) Pack {
    static constexpr int size = 16 / sizeof(T);
    T at[size];
};

template <typename T> __device__ inline Pack<T>& pack(T* place) { return *reinterpret_cast<Pack<T>*>(place); }
template <typename T> __device__ inline const Pack<T>& pack(const T* place) {
    return *reinterpret_cast<const Pack<T>*>(place);
}

// Consecutive numbers to registers, as packs where they fill some.
template <int COUNT, typename A> __device__ inline void read(A* numbers, const A* from) {
    constexpr int size = Pack<A>::size;
    if constexpr (COUNT % size == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += size) {
            const Pack<A> values = pack(from + i);
#pragma unroll
            for (int k = 0; k < size; ++k) numbers[i + k] = values.at[k];
        }
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) numbers[i] = from[i];
    }
}

// A sample's position on the outer and the inner axis. In 32 bits, as they cost registers; offsets have 64.
struct Cursor {
    int outer, inner;

    __device__ Cursor(int sample, int length) : outer(sample / length), inner(sample % length) {}

    // By the samples between the first one and `step`: a thread divides once, where it begins.
    __device__ void advance(const Cursor& step, int length) {
        outer += step.outer;
        inner += step.inner;
        if (inner >= length) {
            inner -= length;
            ++outer;
        }
    }
};

// One block of an array; strides count elements.
template <typename T> struct Block {
    T* data;
    long long outer, variable, inner;

    __device__ Block(T* data, long long block, long long outer, long long variable, long long inner, long long index)
        : data(data + index * block), outer(outer), variable(variable), inner(inner) {}

    __device__ long long offset(const Cursor& sample) const { return sample.outer * outer + sample.inner * inner; }

    __device__ T& at(long long offset, int v) const { return data[offset + v * variable]; }
};
