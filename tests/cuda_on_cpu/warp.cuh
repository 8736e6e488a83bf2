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

template <int COUNT> void store_words(unsigned* to, const unsigned (&words)[COUNT]) {
    assert(reinterpret_cast<std::size_t>(to) % sizeof words == 0);
    std::memcpy(to, words, sizeof words);
}

// What the lanes of each warp give to a product. Two products take turns, so that no lane overwrites what others read.
struct Operands {
    float a[4], b[2];
};
static Operands all_operands[2][1024];
static bool turns[1024];

// Returns the power of 2 that a normal number begins with.
inline double power_of_2(double x) {
    unsigned long long bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits &= 0x7ff0000000000000;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float cut_off_sum(const double (&addends)[5]) {
    constexpr double digits = 1 << 24;
    double largest = 0, sum = 0;
    for (double addend : addends) largest = std::max(largest, std::abs(addend));
    if (!std::isnormal(largest)) {  // or NaN, which std::max may have passed over
        for (double addend : addends) sum += addend;
        return sum;
    }
    const double unit = power_of_2(largest) / digits, per_unit = 1 / unit;
    for (double addend : addends) sum += std::isnan(addend) ? addend : (long long)(addend * per_unit) * unit;
    float result = sum;
    if (std::abs(result) > std::abs(sum)) result = float_of(bits_of(result) - 1);
    return result;
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
