// Tensor cores, by the CPU: products of TF32 numbers, whose sum is cut off to float32, as devices do.

constexpr bool TENSOR_CORES = true;

inline unsigned bits_of(float x) {
    if (x != x) return 0x7fffffff;  // the only NaN that devices compute
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// What the lanes of each warp give to a product. Two products take turns, so that no lane overwrites what others read.
struct Operands {
    float a[4], b[2];
};
static Operands all_operands[2][1024];
static bool turns[1024];

inline void multiply_add_tf32(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                              unsigned b1) {
    const auto tf32 = [](unsigned bits) { return float_of(bits & 0xffffe000); };
    const unsigned thread = threadIdx.x, lane = thread % emulator::WARP, group = lane / 4, member = lane % 4;
    Operands* operands = all_operands[turns[thread] = !turns[thread]];
    operands[thread] = {{tf32(a0), tf32(a1), tf32(a2), tf32(a3)}, {tf32(b0), tf32(b1)}};
    __syncwarp();
    operands += thread - lane;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned lower = i / 2, column = 2 * member + i % 2;
        double sum = c[i];
        for (unsigned k = 0; k < 8; ++k)
            sum += double(operands[group * 4 + k % 4].a[lower + k / 4 * 2]) * operands[column * 4 + k % 4].b[k / 4];
        c[i] = sum;
        if (std::abs(c[i]) > std::abs(sum)) c[i] = std::nextafter(c[i], 0.f);
    }
}
