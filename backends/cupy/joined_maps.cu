// The second launch of each pass: from x to y, and from dy and x to the gradient of x. Both apply weight and bias too,
// and the second one finishes their gradients.

#include "maps.cuh"
#include "pass.cuh"
#include "joined_tensor_maps.cuh"

// Computes y = weight W (x - mean) + bias. Part p of a block takes tiles p, p + map_parts, and so on. Weight and bias
// may be null.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, map_residency<T, D>)
    whiten(const T* x, const accumulator<T>* mean, const accumulator<T>* whitener, const accumulator<T>* weight,
           const accumulator<T>* bias, Pass pass, T* y) {
    using A = accumulator<T>;
    using Shape = Tile<A, D>;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    if constexpr (uses_tensor_cores<T, D>)
        return whiten_on_tensor_cores<T, D>(x, mean, whitener, weight, bias, pass, y, shared_memory);
    A* tile = reinterpret_cast<A*>(shared_memory);
    A* matrix = tile + D * Shape::stride;
    __shared__ A centre[D];
    __shared__ SampleOffsets offsets;

    const int d = pass.d, thread = threadIdx.x, count = pass.count();
    const unsigned num_parts = pass.map_parts, index = blockIdx.x / num_parts, part = blockIdx.x % num_parts;
    const auto in = block_of(x, pass.x, index);
    const auto out = block_of(y, pass.result, index);
    const ChannelAffine<A> affine{{weight}, {bias}, pass, int(index)};
    load_matrix<A, D>(matrix, whitener + (long long)index * d * d, d, 1, d);
    if (thread < D) centre[thread] = thread < d ? mean[index * d + thread] : A(0);

    const int tiles = (count + SAMPLES - 1) / SAMPLES;
    Cursor sample(part * SAMPLES + thread, pass.inner());
    const Cursor step(num_parts * SAMPLES, pass.inner());
    for (int tile_index = part; tile_index < tiles; tile_index += num_parts) {
        const bool in_range = tile_index * SAMPLES + thread < count;
        __syncthreads();
        load<T, D>(tile, offsets, in, sample, in_range, pass.x.along_samples, centre, d);
        __syncthreads();
        A total[Shape::rows][Shape::columns];
        initialize<A, D>(total);
        multiply<A, D>(total, matrix, tile, d);
        __syncthreads();
        write_tile<A, D>(tile, total);
        __syncthreads();
        store<T, D>(tile, offsets, out, sample, in_range, pass.result.along_samples, d, affine);
        sample.advance(step, pass.inner());
    }
}

// Adds up the partial gradients of weight or bias in a fixed order. Each thread block has some adjacent channels.
template <typename A>
__device__ void combine_parameter_gradient(const A* partial, const Pass& pass, A* gradient) {
    constexpr int across = 32, lanes = THREADS / across;
    __shared__ A sums[lanes][across];
    const int column = threadIdx.x % across, lane = threadIdx.x / across;
    const long long channel = blockIdx.x * across + column;
    A sum = 0;
    if (channel < pass.all_channels)
#pragma unroll 8
        for (int row = lane; row < pass.gradient_rows; row += lanes) sum += partial[row * pass.all_channels + channel];
    __syncthreads();
    sums[lane][column] = sum;
    __syncthreads();
    if (lane > 0 || channel >= pass.all_channels) return;
    for (int other = 1; other < lanes; ++other) sum += sums[other][column];
    gradient[channel] = sum;
}

// Computes dx = W' (weight dy - its mean) + B (x - mean), where B = (dS + dS') / M and dS is the gradient of the
// covariance. The first few thread blocks complete the gradients of weight and bias instead. `weight`, `dweight` and
// `dbias` may be null.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, map_residency<T, D>)
    input_gradient(const T* dy, const T* x, const accumulator<T>* mean, const accumulator<T>* whitener,
                   const accumulator<T>* weight, Pass pass, accumulator<T>* memory, T* dx, accumulator<T>* dweight,
                   accumulator<T>* dbias) {
    using A = accumulator<T>;
    using Shape = Tile<A, D>;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    A* tile = reinterpret_cast<A*>(shared_memory);
    A* first_matrix = tile + D * Shape::stride;
    A* second_matrix = first_matrix + D * Shape::matrix_stride;
    __shared__ A centres[2][D];
    __shared__ SampleOffsets offsets;

    const Workspace<A> workspace(memory, pass);
    if (blockIdx.x < pass.parameter_thread_blocks) {
        if (dweight) combine_parameter_gradient(workspace.dweight, pass, dweight);
        if (dbias) combine_parameter_gradient(workspace.dbias, pass, dbias);
        return;
    }
    if constexpr (uses_tensor_cores<T, D>)
        return map_gradient_on_tensor_cores<T, D>(dy, x, mean, whitener, weight, pass, workspace, dx, shared_memory);
    const int d = pass.d, thread = threadIdx.x, count = pass.count();
    const unsigned thread_block = blockIdx.x - pass.parameter_thread_blocks;
    const unsigned num_parts = pass.map_parts, index = thread_block / num_parts, part = thread_block % num_parts;
    const auto in1 = block_of(dy, pass.dy, index), in2 = block_of(x, pass.x, index);
    const auto out = block_of(dx, pass.result, index);
    const ChannelAffine<A> scaled{{weight}, {nullptr}, pass, int(index)};
    load_matrix<A, D>(first_matrix, whitener + (long long)index * d * d, 1, d, d);
    load_matrix<A, D>(second_matrix, workspace.b + (long long)index * d * d, d, 1, d);
    if (thread < D) {
        centres[0][thread] = thread < d ? workspace.dy_means[index * d + thread] : A(0);
        centres[1][thread] = thread < d ? mean[index * d + thread] : A(0);
    }

    const int tiles = (count + SAMPLES - 1) / SAMPLES;
    Cursor sample(part * SAMPLES + thread, pass.inner());
    const Cursor step(num_parts * SAMPLES, pass.inner());
    for (int tile_index = part; tile_index < tiles; tile_index += num_parts) {
        const bool in_range = tile_index * SAMPLES + thread < count;
        __syncthreads();
        load<T, D>(tile, offsets, in1, sample, in_range, pass.dy.along_samples, centres[0], d, scaled);
        __syncthreads();
        A total[Shape::rows][Shape::columns];
        initialize<A, D>(total);
        multiply<A, D>(total, first_matrix, tile, d);
        __syncthreads();
        load<T, D>(tile, offsets, in2, sample, in_range, pass.x.along_samples, centres[1], d);
        __syncthreads();
        multiply<A, D>(total, second_matrix, tile, d);
        __syncthreads();
        write_tile<A, D>(tile, total);
        __syncthreads();
        store<T, D>(tile, offsets, out, sample, in_range, pass.result.along_samples, d);
        sample.advance(step, pass.inner());
    }
}
