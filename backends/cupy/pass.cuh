// The arguments that both kernels of a joined pass, forward or backward, have in common. passes.py fills them in and
// declares the same fields. Include arrays.cuh before this file.

// Strides in elements. `along_samples` tells whether neighbouring threads take neighbouring samples, not variables.
struct Strides {
    long long block, outer, variable, inner, along_samples;
};

// A variable has `channels` channels, with `positions` positions on the inner axis each. That is one channel, unless
// variables are groups of channels. Counts of parts are for each block.
struct Pass {
    Strides x, dy, result;
    long long blocks, d, outer, channels, positions;
    long long block_channels;  // channels from one block to the next, or 0 if all blocks have the same channels
    long long all_channels;
    long long num_parts, fan_in, num_counters;  // of the sums; see combine_parts.cuh
    long long channels_per_part, position_parts, samples_per_part;
    long long map_parts, parameter_thread_blocks;  // the latter complete the gradients of weight and bias
    long long gradient_rows;                       // of partial gradients of weight and bias

    __device__ int inner() const { return channels * positions; }
    __device__ int count() const { return outer * channels * positions; }
    __device__ int channel(int block, int v, int j) const { return block * block_channels + v * channels + j; }
};

template <typename T> __device__ Block<T> block_of(T* data, const Strides& strides, long long index) {
    return Block<T>(data, strides.block, strides.outer, strides.variable, strides.inner, index);
}

// How a backward pass uses the memory that it works in.
template <typename A> struct Workspace {
    A* b;                 // (dS + dS') / M of each block, where dS is the gradient of the covariance
    A* dy_means;          // mean of weight dy of each block
    A *dweight, *dbias;   // rows of partial gradients
    A* partial_sums;      // of the parts
    A* iterates;          // of Newton's iteration on tensor cores

    __device__ Workspace(A* memory, const Pass& pass)
        : b(memory),
          dy_means(b + pass.blocks * pass.d * pass.d),
          dweight(dy_means + pass.blocks * pass.d),
          dbias(dweight + pass.gradient_rows * pass.all_channels),
          partial_sums(dbias + pass.gradient_rows * pass.all_channels),
          iterates(partial_sums + pass.blocks * pass.num_parts * (pass.d * pass.d + pass.d)) {}
};

// Weight or bias of the channels, or null.
template <typename A> struct Parameter {
    const A* values;

    __device__ A factor(int channel) const { return values ? values[channel] : A(1); }
    __device__ A summand(int channel) const { return values ? values[channel] : A(0); }
};

// A transform of an array's elements: times the weight of their channel, plus its bias.
template <typename A> struct ChannelAffine {
    const Parameter<A> weight, bias;
    const Pass& pass;
    const int index;

    __device__ bool is_identity() const { return !weight.values && !bias.values; }

    // Returns whether packs of weight and bias that begin at multiples of their size are aligned.
    __device__ bool is_aligned() const {
        const auto addresses = reinterpret_cast<unsigned long long>(weight.values) |
                               reinterpret_cast<unsigned long long>(bias.values);
        return addresses % sizeof(Pack<A>) == 0;
    }

    __device__ A apply(A element, int channel) const {
        return element * weight.factor(channel) + bias.summand(channel);
    }

    __device__ A operator()(A element, int v, int inner) const {
        return is_identity() ? element : apply(element, pass.channel(index, v, inner / int(pass.positions)));
    }
};
