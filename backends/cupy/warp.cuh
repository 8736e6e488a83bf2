// Instructions that C++ has no name for.

#if __CUDA_ARCH__ >= 800
constexpr bool TENSOR_CORES = true;
#else
constexpr bool TENSOR_CORES = false;
#endif

__device__ inline unsigned bits_of(float x) { return __float_as_uint(x); }
__device__ inline float float_of(unsigned bits) { return __uint_as_float(bits); }

// Adds the product of a 16 x 8 matrix a and an 8 x 8 matrix b to c. All lanes of the warp have to take part.
__device__ inline void multiply_add_tf32(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                         unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Stores adjacent words at an aligned address in global memory by one instruction. The compiler makes several of some
// assignments.
__device__ inline void store_words(unsigned* to, const unsigned (&words)[1]) { *to = words[0]; }
__device__ inline void store_words(unsigned* to, const unsigned (&words)[2]) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(to), "r"(words[0]), "r"(words[1]) : "memory");
}
__device__ inline void store_words(unsigned* to, const unsigned (&words)[4]) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}
