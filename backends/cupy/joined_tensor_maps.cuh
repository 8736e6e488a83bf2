// The maps of a joined pass on tensor cores. Include maps.cuh and pass.cuh before this file.

#include "tensor_cores.cuh"
#include "tensor_maps.cuh"

// Loads a number of each variable into shared memory; 0 past d.
template <int D> __device__ void load_numbers(float (&to)[D], const float* from, int d) {
    for (int v = threadIdx.x; v < D; v += THREADS) to[v] = v < d ? from[v] : 0.f;
}

// The weight and bias of every variable, if each is one channel, in shared memory; 0 past d. There may be too many
// channels for it otherwise, and `transform` looks them up.
template <int D> struct AffineOfVariables {
    float factors[D], summands[D];

    __device__ void load(const ChannelAffine<float>& affine, int d) {
        if (affine.pass.channels > 1) return;
        for (int v = threadIdx.x; v < D; v += THREADS) {
            const int channel = affine.pass.channel(affine.index, v, 0);
            factors[v] = v < d ? affine.weight.factor(channel) : 0.f;
            summands[v] = v < d ? affine.bias.summand(channel) : 0.f;
        }
    }
};

// Returns four numbers of a parameter that begin at a channel; all are `missing` if there is no parameter.
__device__ inline Pack<float> four_of(const Parameter<float>& parameter, int channel, float missing) {
    return parameter.values ? pack(parameter.values + channel) : Pack<float>{missing, missing, missing, missing};
}

// Does what `transform` does with four samples, whose first index is a multiple of four, by the weight and bias of
// channels in global memory. Mostly the samples have one channel, or adjacent ones.
template <int VARIABLES, typename Element, typename Variable>
__device__ __forceinline__ void transform_four(const ChannelAffine<float>& affine, Cursor sample,
                                               const Element& element, const Variable& variable) {
    const Pass& pass = affine.pass;
    const int length = pass.inner(), positions = pass.positions, channels = pass.channels, d = pass.d;
    const auto for_each_variable = [&](const auto& use) {  // all blocks have the same channels here
        const int place = sample.inner / positions;
#pragma unroll
        for (int i = 0; i < VARIABLES; ++i)
            if (variable(i) < d) use(i, variable(i) * channels + place);
    };
    if (positions % 4 == 0) {
        for_each_variable([&](int i, int channel) {
            const float factor = affine.weight.factor(channel), summand = affine.bias.summand(channel);
#pragma unroll
            for (int e = 0; e < 4; ++e) element(i, e) = element(i, e) * factor + summand;
        });
    } else if (positions == 1 && length % 4 == 0 && affine.is_aligned()) {
        for_each_variable([&](int i, int channel) {
            const Pack<float> factors = four_of(affine.weight, channel, 1.f);
            const Pack<float> summands = four_of(affine.bias, channel, 0.f);
#pragma unroll
            for (int e = 0; e < 4; ++e) element(i, e) = element(i, e) * factors.at[e] + summands.at[e];
        });
    } else {
#pragma unroll
        for (int e = 0; e < 4; ++e, sample.increase(length))
            for_each_variable([&](int i, int channel) { element(i, e) = affine.apply(element(i, e), channel); });
    }
}

// Applies an affine transform to adjacent samples of a lane's variables: element(i, e) is sample e of variable(i).
template <int VARIABLES, int COUNT, int D, typename Element, typename Variable>
__device__ __forceinline__ void transform(const ChannelAffine<float>& affine, const AffineOfVariables<D>& of_variables,
                                          Cursor cursor, const Element& element, const Variable& variable) {
    if (affine.is_identity()) return;
    const Pass& pass = affine.pass;
    if (pass.channels == 1) {
#pragma unroll
        for (int i = 0; i < VARIABLES; ++i)
#pragma unroll
            for (int e = 0; e < COUNT; ++e)
                element(i, e) =
                    element(i, e) * of_variables.factors[variable(i)] + of_variables.summands[variable(i)];
        return;
    }
    const Cursor four(4, pass.inner());
#pragma unroll
    for (int first = 0; first < COUNT; first += 4, cursor.advance(four, pass.inner()))
        transform_four<VARIABLES>(
            affine, cursor, [&](int i, int e) -> float& { return element(i, first + e); }, variable);
}

// Calls map(cursor of the 4 samples that a lane loads, how many of them exist, the same for the 8 that it stores) for
// every chunk of the warp. Part p of a block takes tiles p, p + map_parts, and so on.
template <typename Map> __device__ void for_each_chunk(const Pass& pass, unsigned part, const Map& map) {
    const int length = pass.inner(), count = pass.count(), lane = threadIdx.x % 32;
    const int first = part * SAMPLES + threadIdx.x / 32 * WARP_SAMPLES, step = pass.map_parts * SAMPLES;
    const Cursor between_tiles(step, length);
    Cursor load(first + lane / 4 * 4, length), store(first + lane % 4 * 8, length);
    for (int at = first; at < count; at += step) {
        map(load, count - at - lane / 4 * 4, store, count - at - lane % 4 * 8);
        load.advance(between_tiles, length);
        store.advance(between_tiles, length);
    }
}

// Does what `whiten` does.
template <typename T, int D>
__device__ void whiten_on_tensor_cores(const T* x, const float* mean, const float* whitener, const float* weight,
                                       const float* bias, const Pass& pass, T* y, unsigned char* memory) {
    using Shape = MapShape<D>;
    const int d = pass.d, length = pass.inner();
    const unsigned index = blockIdx.x / pass.map_parts, part = blockIdx.x % pass.map_parts;
    const auto in = block_of(x, pass.x, index);
    const auto out = block_of(y, pass.result, index);
    const Access in_access(in, pass.x.along_samples, d, length), out_access(out, pass.result.along_samples, d, length);
    const ChannelAffine<float> affine{{weight}, {bias}, pass, int(index)};
    const TensorMatrix<D> matrix{reinterpret_cast<Words<4>*>(memory)};
    __shared__ float centre[D];
    __shared__ AffineOfVariables<D> of_variables;
    matrix.load(whitener + (long long)index * d * d, d, 1, d);
    load_numbers(centre, mean + (long long)index * d, d);
    of_variables.load(affine, d);
    __syncthreads();
    for_each_chunk(pass, part, [&](const Cursor& load, int left, const Cursor& store, int left_to_store) {
        MapInput<T, D> input;
        MapOutput<D> output;
        input.fetch(in, in_access, d, length, load, left);
        input.unpack(in_access);
        input.subtract(centre);
        output.add(matrix, input);
        transform<Shape::rows, 8>(
            affine, of_variables, store, [&](int i, int e) -> float& { return output.element(i, e); },
            [](int i) { return Shape::row(i); });
        output.store(out, out_access, d, length, store, left_to_store);
    });
}

// Does what `input_gradient` does in the thread blocks that map samples.
template <typename T, int D>
__device__ void map_gradient_on_tensor_cores(const T* dy, const T* x, const float* mean, const float* whitener,
                                             const float* weight, const Pass& pass, const Workspace<float>& workspace,
                                             T* dx, unsigned char* memory) {
    using Shape = MapShape<D>;
    const int d = pass.d, length = pass.inner(), thread_block = blockIdx.x - pass.parameter_thread_blocks;
    const int index = thread_block / pass.map_parts, part = thread_block % pass.map_parts;
    const auto in1 = block_of(dy, pass.dy, index), in2 = block_of(x, pass.x, index);
    const auto out = block_of(dx, pass.result, index);
    const Access access1(in1, pass.dy.along_samples, d, length), access2(in2, pass.x.along_samples, d, length);
    const Access out_access(out, pass.result.along_samples, d, length);
    const ChannelAffine<float> scaled{{weight}, {nullptr}, pass, index};
    const TensorMatrix<D> matrix1{reinterpret_cast<Words<4>*>(memory)}, matrix2{matrix1.memory + matrix1.size};
    matrix1.load(whitener + (long long)index * d * d, 1, d, d);
    matrix2.load(workspace.b + (long long)index * d * d, d, 1, d);
    __shared__ float centre1[D], centre2[D];
    __shared__ AffineOfVariables<D> of_variables;
    load_numbers(centre1, workspace.dy_means + (long long)index * d, d);
    load_numbers(centre2, mean + (long long)index * d, d);
    of_variables.load(scaled, d);
    __syncthreads();
    for_each_chunk(pass, part, [&](const Cursor& load, int left, const Cursor& store, int left_to_store) {
        MapInput<T, D> input1, input2;
        MapOutput<D> output;
        input1.fetch(in1, access1, d, length, load, left);
        input2.fetch(in2, access2, d, length, load, left);
        input1.unpack(access1);
        transform<Shape::columns, 4>(
            scaled, of_variables, load, [&](int i, int e) -> float& { return input1.elements[i][e]; },
            [](int i) { return Shape::column(i); });
        input1.subtract(centre1);
        output.add(matrix1, input1);
        input2.unpack(access2);
        input2.subtract(centre2);
        output.add(matrix2, input2);
        output.store(out, out_access, d, length, store, left_to_store);
    });
}
