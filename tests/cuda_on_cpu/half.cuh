// float16, converted by the CPU.

struct half {
    _Float16 number;
};

inline float to_float(half value) { return value.number; }
inline half to_half(float value) { return {static_cast<_Float16>(value)}; }

inline unsigned short bits_of(half value) {
    unsigned short bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline half half_of(unsigned short bits) {
    half value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
