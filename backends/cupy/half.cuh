// float16 by the hardware's two conversions. cuda_fp16.h isn't used because not every machine with a driver and CuPy
// has it.

struct half {
    unsigned short bits;
};

__device__ inline float to_float(half value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

__device__ inline half to_half(float value) {
    half result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

__device__ inline unsigned short bits_of(half value) { return value.bits; }
__device__ inline half half_of(unsigned short bits) { return {bits}; }
