// Products on tensor cores, which 8.0 and later devices have for float32. A warp multiplies a matrix of 16 x 8 with one
// of 8 x 8. Which of their elements a lane holds is written down in PTX's documentation, at mma.m16n8k8 for .tf32: with
// group = lane / 4 and member = lane % 4,
//   a: rows group, group + 8 in column member, then the same rows in column member + 4,
//   b: rows member, member + 4 in column group,
//   c: columns 2 member, 2 member + 1 in row group, then the same columns in row group + 8.
//
// Include arrays.cuh before this file.

#include "warp.cuh"

// Whether kernels for arrays of T with variants of size D use tensor cores. Four variables are too few.
template <typename T, int D> constexpr bool uses_tensor_cores = TENSOR_CORES && sizeof(T) <= 4 && D >= 16;

// Whether the sums of a variant take most registers.
template <typename T, int D> constexpr bool is_large = uses_tensor_cores<T, D> && D == 64;

// How many thread blocks of a kernel for sums, and of one for maps, fit a multiprocessor.
template <typename T, int D> constexpr int sum_residency = sizeof(T) == 8 || is_large<T, D> ? 1 : 2;
template <typename T, int D> constexpr int map_residency = sizeof(T) == 8 ? 1 : is_large<T, D> ? 2 : 3;

// A number as tensor cores take it. TF32 keeps 10 of the 23 binary digits of float32, as many as float16 has; tensor
// cores ignore the others. float32 is the sum of two parts, and the product of two second parts is too small to matter.
template <int PARTS> struct Parts {
    unsigned at[PARTS];

    __device__ Parts() {}
    __device__ explicit Parts(float x) {
        if (PARTS == 1) {
            const float scaled = 8193 * x;  // by 2^13 + 1, which leaves the digits that TF32 keeps, rounded to even
            at[0] = bits_of(__fsub_rn(scaled, __fsub_rn(scaled, x)));
        } else {
            at[0] = bits_of(x) & 0xffffe000;
            at[PARTS - 1] = bits_of(x - float_of(at[0])) + 0x1000;  // rounded, but makes 0 of NaN, which at[0] keeps
        }
    }
};

// An element of an array of T.
template <typename T> using Number = Parts<sizeof(T) == 4 ? 2 : 1>;

// Adds the product of a and b to c.
template <int A, int B>
__device__ void multiply_add(float (&c)[4], const Parts<A> (&a)[4], const Parts<B> (&b)[2]) {
#pragma unroll
    for (int i = A - 1; i >= 0; --i)
#pragma unroll
        for (int j = B - 1; j >= 0; --j)
            if (i + j < 2)
                multiply_add_tf32(c, a[0].at[i], a[1].at[i], a[2].at[i], a[3].at[i], b[0].at[j], b[1].at[j]);
}

// The same with a rounding addition to c. Tensor cores cut off what they add up, so the errors of their additions don't
// cancel.
template <int A, int B>
__device__ void add_rounded_product(float (&c)[4], const Parts<A> (&a)[4], const Parts<B> (&b)[2]) {
    float product[4] = {};
    multiply_add(product, a, b);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += product[i];
}
