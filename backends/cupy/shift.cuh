// A value near each variable's mean. It needs arrays.cuh and THREADS, which products.cuh has.

constexpr int SAMPLED = 16;

// Values are taken relative to a shift near the mean, so that their squares don't drown the spread: the mean of a few
// samples, spread evenly over the block and the same in every program. Of a constant variable it is the very value.
template <typename T, int D>
__device__ void find_shift(accumulator<T>* shift, const Block<const T>& block, int d, int inner, int count) {
    using A = accumulator<T>;
    constexpr int lanes = THREADS / D < SAMPLED ? THREADS / D : SAMPLED;
    __shared__ A partial[lanes][D];
    const int v = threadIdx.x % D, lane = threadIdx.x / D;
    const A origin = v < d ? A(value(block.at(0, v))) : A(0);
    if (lane < lanes) {
        A sum = 0;
        if (v < d)
            for (int i = lane; i < SAMPLED; i += lanes) {
                const Cursor sample((long long)count * i / SAMPLED, inner);
                sum += A(value(block.at(block.offset(sample), v))) - origin;
            }
        partial[lane][v] = sum;
    }
    __syncthreads();
    if (lane == 0) {
        A sum = 0;
        for (int other = 0; other < lanes; ++other) sum += partial[other][v];
        shift[v] = origin + sum / SAMPLED;
    }
    __syncthreads();
}
