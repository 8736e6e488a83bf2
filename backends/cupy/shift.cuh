// The shift: values near each variable's mean. Include arrays.cuh, and products.cuh for THREADS, before this file.

constexpr int SHIFT_SAMPLES = 16;

// Moments are summed relative to a shift near the mean, because squares of a large mean would drown the variance. The
// shift is the mean of a few samples, spread evenly over the block and the same for each of its parts. For a constant
// variable it is exactly the constant.
template <typename T, int D>
__device__ void load_shift(accumulator<T>* shift, const Block<const T>& block, int d, int inner, int count) {
    using A = accumulator<T>;
    constexpr int lanes = THREADS / D < SHIFT_SAMPLES ? THREADS / D : SHIFT_SAMPLES;
    __shared__ A partial[lanes][D];
    const int v = threadIdx.x % D, lane = threadIdx.x / D;
    const A origin = v < d ? A(widen(block.at(0, v))) : A(0);
    if (lane < lanes) {
        A sum = 0;
        if (v < d)
            for (int i = lane; i < SHIFT_SAMPLES; i += lanes) {
                const Cursor sample((long long)count * i / SHIFT_SAMPLES, inner);
                sum += A(widen(block.at(block.offset(sample), v))) - origin;
            }
        partial[lane][v] = sum;
    }
    __syncthreads();
    if (lane == 0) {
        A sum = 0;
        for (int other = 0; other < lanes; ++other) sum += partial[other][v];
        shift[v] = origin + sum / SHIFT_SAMPLES;
    }
    __syncthreads();
}
