// The maps that finish a pass: of x to y, and of dy and x to the gradient of x. Weight and bias, and their gradients, are
// taken care of on the way.

#include "maps.cuh"
#include "pass.cuh"

// Weight and bias of a block's channels, for the elements of an array.
template <typename A> struct ByChannel {
    const Parameter<A> weight, bias;
    const Pass& pass;
    const int index;

    __device__ A operator()(A element, int v, int inner) const {
        if (!weight.values && !bias.values) return element;
        const int channel = pass.channel(index, v, inner / int(pass.positions));
        return element * weight.factor(channel) + bias.term(channel);
    }
};

// y = weight W (x - mean) + bias. A program takes every so many of a block's tiles. Weight and bias may be null.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, sizeof(accumulator<T>) == 4 ? 3 : 1)
    whiten(const T* x, const accumulator<T>* mean, const accumulator<T>* whitener, const void* weight, const void* bias, Pass pass, T* y) {
    using A = accumulator<T>;
    using Shape = Tile<A, D>;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    A* tile = reinterpret_cast<A*>(shared_memory);
    A* matrix = tile + D * Shape::stride;
    __shared__ A centre[D];
    __shared__ Places places;

    const int d = pass.d, thread = threadIdx.x, count = pass.count();
    const unsigned programs = pass.maps, index = blockIdx.x / programs, program = blockIdx.x % programs;
    const auto in = block_of(x, pass.x, index);
    const auto out = block_of(y, pass.result, index);
    const ByChannel<A> affine{{weight, bool(pass.half_weight)}, {bias, bool(pass.half_bias)}, pass, int(index)};
    load_matrix<A, D>(matrix, whitener + (long long)index * d * d, d, 1, d);
    if (thread < D) centre[thread] = thread < d ? mean[index * d + thread] : A(0);

    const int tiles = (count + SAMPLES - 1) / SAMPLES;
    Cursor sample(program * SAMPLES + thread, pass.inner());
    const Cursor step(programs * SAMPLES, pass.inner());
    for (int number = program; number < tiles; number += programs) {
        const bool there = number * SAMPLES + thread < count;
        __syncthreads();
        load<T, D>(tile, places, in, sample, there, pass.x.along_samples, centre, d);
        __syncthreads();
        A total[Shape::rows][Shape::columns];
        begin<A, D>(total);
        multiply<A, D>(total, matrix, tile, d);
        __syncthreads();
        put<A, D>(tile, total);
        __syncthreads();
        store<T, D>(tile, places, out, sample, there, pass.result.along_samples, d, affine);
        sample.advance(step, pass.inner());
    }
}

template <typename A> __device__ void assign_parameter(void* to, long long channel, bool is_half, A element) {
    if (is_half)
        assign(static_cast<half*>(to)[channel], element);
    else
        assign(static_cast<A*>(to)[channel], element);
}

// Adds up the rows of the gradient of weight or bias, in a fixed order: a program has some neighbouring channels.
template <typename A> __device__ void add_rows(const A* rows, const Pass& pass, void* gradient, bool is_half) {
    constexpr int across = 32, lanes = THREADS / across;
    __shared__ A partial[lanes][across];
    const int place = threadIdx.x % across, lane = threadIdx.x / across;
    const long long channel = blockIdx.x * across + place;
    A sum = 0;
    if (channel < pass.all_channels)
#pragma unroll 8
        for (int row = lane; row < pass.rows; row += lanes) sum += rows[row * pass.all_channels + channel];
    __syncthreads();
    partial[lane][place] = sum;
    __syncthreads();
    if (lane > 0 || channel >= pass.all_channels) return;
    for (int other = 1; other < lanes; ++other) sum += partial[other][place];
    assign_parameter(gradient, channel, is_half, sum);
}

// dx = W' (weight dy - its mean) + B (x - mean), by all programs but the first few, which finish the gradients of weight
// and bias. `weight`, `of_weight` and `of_bias` may be null; the latter two have the dtypes of weight and bias.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, sizeof(accumulator<T>) == 4 ? 3 : 1)
    pull_back(const T* dy, const T* x, const accumulator<T>* mean, const accumulator<T>* whitener, const void* weight,
              Pass pass, accumulator<T>* memory, T* dx, void* of_weight, void* of_bias) {
    using A = accumulator<T>;
    using Shape = Tile<A, D>;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    A* tile = reinterpret_cast<A*>(shared_memory);
    A* first_matrix = tile + D * Shape::stride;
    A* second_matrix = first_matrix + D * Shape::matrix_stride;
    __shared__ A centres[2][D];
    __shared__ Places places;

    const Scratch<A> scratch(memory, pass);
    if (blockIdx.x < pass.gradients) {
        if (of_weight) add_rows(scratch.of_weight, pass, of_weight, pass.half_weight);
        if (of_bias) add_rows(scratch.of_bias, pass, of_bias, pass.half_bias);
        return;
    }
    const int d = pass.d, thread = threadIdx.x, count = pass.count();
    const unsigned own = blockIdx.x - pass.gradients;
    const unsigned programs = pass.maps, index = own / programs, program = own % programs;
    const auto in1 = block_of(dy, pass.dy, index), in2 = block_of(x, pass.x, index);
    const auto out = block_of(dx, pass.result, index);
    const ByChannel<A> scaled{{weight, bool(pass.half_weight)}, {nullptr, false}, pass, int(index)};
    load_matrix<A, D>(first_matrix, whitener + (long long)index * d * d, 1, d, d);
    load_matrix<A, D>(second_matrix, scratch.matrices + (long long)index * d * d, d, 1, d);
    if (thread < D) {
        centres[0][thread] = thread < d ? scratch.means[index * d + thread] : A(0);
        centres[1][thread] = thread < d ? mean[index * d + thread] : A(0);
    }

    const int tiles = (count + SAMPLES - 1) / SAMPLES;
    Cursor sample(program * SAMPLES + thread, pass.inner());
    const Cursor step(programs * SAMPLES, pass.inner());
    for (int number = program; number < tiles; number += programs) {
        const bool there = number * SAMPLES + thread < count;
        __syncthreads();
        load<T, D>(tile, places, in1, sample, there, pass.dy.along_samples, centres[0], d, scaled);
        __syncthreads();
        A total[Shape::rows][Shape::columns];
        begin<A, D>(total);
        multiply<A, D>(total, first_matrix, tile, d);
        __syncthreads();
        load<T, D>(tile, places, in2, sample, there, pass.x.along_samples, centres[1], d);
        __syncthreads();
        multiply<A, D>(total, second_matrix, tile, d);
        __syncthreads();
        put<A, D>(tile, total);
        __syncthreads();
        store<T, D>(tile, places, out, sample, there, pass.result.along_samples, d);
        sample.advance(step, pass.inner());
    }
}
