// What the joined kernels know of a pass, forward or backward; made in passes.py, which has the same fields.
// It needs arrays.cuh, which is to be included before.

struct Strides {
    long long block, outer, variable, inner, along_samples;
};

// A block's variable has `channels`, each at `positions` of the inner axis: one channel, unless variables are groups of
// them. Programs and the sums' other numbers are for each block.
struct Pass {
    Strides x, dy, result;
    long long blocks, d, outer, channels, positions;
    long long block_channels, all_channels;  // from a block to the next, which has the same ones where this is 0; in all
    long long programs, cluster, counters, channel_chunk, position_parts, stretch;  // of the sums
    long long maps, gradients;  // programs of the maps, and in all beside these, for the gradients of weight and bias
    long long rows;  // of such gradients' parts
    long long half_weight, half_bias;  // whether they are float16

    __device__ int inner() const { return channels * positions; }
    __device__ int count() const { return outer * channels * positions; }
    __device__ int channel(int block, int v, int j) const { return block * block_channels + v * channels + j; }
};

template <typename T> __device__ Block<T> block_of(T* data, const Strides& strides, long long index) {
    return Block<T>(data, strides.block, strides.outer, strides.variable, strides.inner, index);
}

// Memory that a pass backward works in: of every block the gradient of its covariance, B, and the mean of weight dy;
// then the parts of the gradients of weight and of bias, a row after the other; then what programs have added up.
template <typename A> struct Scratch {
    A *matrices, *means, *of_weight, *of_bias, *parts;

    __device__ Scratch(A* memory, const Pass& pass)
        : matrices(memory),
          means(matrices + pass.blocks * pass.d * pass.d),
          of_weight(means + pass.blocks * pass.d),
          of_bias(of_weight + pass.rows * pass.all_channels),
          parts(of_bias + pass.rows * pass.all_channels) {}
};

// Weight or bias, which may be missing: float16 or in the dtype of statistics.
template <typename A> struct Parameter {
    const void* values;
    bool is_half;

    __device__ A at(int channel) const {
        return is_half ? A(value(static_cast<const half*>(values)[channel])) : static_cast<const A*>(values)[channel];
    }
    __device__ A factor(int channel) const { return values ? at(channel) : A(1); }
    __device__ A term(int channel) const { return values ? at(channel) : A(0); }
};
