// float16, converted by the CPU.

struct half {
    _Float16 number;
};

inline float to_float(half value) { return value.number; }
inline half to_half(float value) { return {static_cast<_Float16>(value)}; }
