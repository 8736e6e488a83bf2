// Tensor cores, by the CPU: sums of four products of TF32 numbers. Each addend is cut off one digit behind the last one
// that float32 has of the largest, and the sum at its own last digit. Studies of devices have found about this much.

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

inline float cut_off_sum(const double (&addends)[5]) {
    double largest = 0, sum = 0;
    for (double addend : addends) largest = std::max(largest, std::abs(addend));
    const double unit = std::ldexp(1., std::ilogb(largest) - 24);
    for (double addend : addends)
        sum += std::isnormal(largest) && std::isfinite(addend) ? std::trunc(addend / unit) * unit : addend;
    const float result = sum;
    return std::abs(result) > std::abs(sum) ? std::nextafter(result, 0.f) : result;
}

inline void multiply_add_tf32(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                              unsigned b1) {
    const auto tf32 = [](unsigned bits) { return float_of(bits & 0xffffe000); };
    const unsigned thread = threadIdx.x, lane = thread % emulator::WARP, group = lane / 4, member = lane % 4;
    Operands* operands = all_operands[turns[thread] = !turns[thread]];
    operands[thread] = {{tf32(a0), tf32(a1), tf32(a2), tf32(a3)}, {tf32(b0), tf32(b1)}};
    __syncwarp();
    operands += thread - lane;
    for (unsigned i = 0; i < 4; ++i)
        for (unsigned half = 0; half < 2; ++half) {
            double addends[5] = {c[i]};
            for (unsigned k = 0; k < 4; ++k)
                addends[k + 1] = double(operands[group * 4 + k].a[i / 2 + half * 2]) *
                                 operands[(2 * member + i % 2) * 4 + k].b[half];
            c[i] = cut_off_sum(addends);
        }
}
