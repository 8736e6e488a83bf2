// Everything that the gradients need of all samples: the sums of dy and of dy (x - mean)', and what follows from them,
// in one launch. Each channel has its own weight and bias, so channels are summed one by one. The last thread block to
// finish a block combines the parts and computes the adjoint of Newton's iteration.

#include "products.cuh"
#include "tensor_cores.cuh"
#include "tensor_sums.cuh"
#include "newton.cuh"
#include "tensor_newton.cuh"
#include "pass.cuh"
#include "combine_parts.cuh"

constexpr int LOADS = 4;  // of each of the two arrays

// Adds one channel of every variable to the part's totals, times its weight, and stores the partial gradients of its
// weight and bias. If K is the sum of dy (x - mean)' over this channel's dy, the gradient of the weight of variable v
// is row v of W times row v of K.
template <typename A>
__device__ void add_channel(const A* k, const A* s, const A* w, const Parameter<A>& weight, const Pass& pass,
                            unsigned index, int channel, unsigned row, A* memory, A* products, A* sums) {
    const int d = pass.d, thread = threadIdx.x;
    for (int i = thread; i < d * d; i += THREADS)
        products[i] += weight.factor(pass.channel(index, i / d, channel)) * k[i];
    if (thread >= d) return;
    const int column = pass.channel(index, thread, channel);
    sums[thread] += weight.factor(column) * s[thread];
    if (!pass.gradient_rows) return;
    const Workspace<A> workspace(memory, pass);
    workspace.dbias[row * pass.all_channels + column] = s[thread];
    if (!weight.values) return;
    A sum = 0;
    for (int i = 0; i < d; ++i) {
        const int element = thread * d + (thread + i) % d;  // neighbouring threads read from different banks
        sum += w[element] * k[element];
    }
    workspace.dweight[row * pass.all_channels + column] = sum;
}

// What a part sums: some of the channels of each variable, and some of their positions. A last part without channels
// computes the iterates of Newton's iteration meanwhile.
struct GradientPart {
    int begin, end, first_channel, end_channel;
    unsigned row;  // of the partial gradients of weight and bias

    __device__ GradientPart(const Pass& pass, unsigned index, int part) {
        const int count = pass.outer * pass.positions, position_part = part % pass.position_parts;
        begin = position_part * pass.samples_per_part;
        end = count - begin < pass.samples_per_part ? count : begin + pass.samples_per_part;
        const int chunk = pass.channels_per_part;
        first_channel = part / pass.position_parts * chunk;
        end_channel = pass.channels - first_channel < chunk ? pass.channels : first_channel + chunk;
        row = (pass.block_channels ? 0 : index * pass.position_parts) + position_part;
    }

    static __device__ bool computes_iterates(const Pass& pass, int part) {
        return part / pass.position_parts * pass.channels_per_part >= pass.channels;
    }
};

// Sums the products of one channel of every variable.
template <typename T, int D>
__device__ void sum_channel(const T* dy, const T* x, const Pass& pass, unsigned index, int channel,
                            const GradientPart& part, accumulator<T>* zero, accumulator<T>* centre, accumulator<T>* k,
                            accumulator<T>* s) {
    const long long position = channel * pass.positions;
    const auto dy_block = block_of(dy + position * pass.dy.inner, pass.dy, index);
    const auto x_block = block_of(x + position * pass.x.inner, pass.x, index);
    const int d = pass.d;
    if constexpr (uses_tensor_cores<T, D>) {
        const bool along_samples = pass.dy.along_samples && pass.x.along_samples;
        sum_products_on_tensor_cores<T, D, false>(dy_block, x_block, along_samples, centre, d, pass.positions,
                                                  part.begin, part.end, k, s);
    } else {
        Loader<T, D, LOADS> dy_loader(dy_block, pass.dy.along_samples, d, zero);
        Loader<T, D, LOADS> x_loader(x_block, pass.x.along_samples, d, centre);
        sum_products<T, T, D, LOADS, false>(dy_loader, x_loader, pass.positions, part.begin, part.end, k, s);
    }
}

// Replaces `b`, the gradient of the whitener, by (dS + dS') / M.
template <typename T, int D>
__device__ void replace_by_gradient(accumulator<T>* b, const accumulator<T>* covariance, const Pass& pass, double eps,
                                    long long steps, accumulator<T>* iterates, unsigned char* shared_memory) {
    using A = accumulator<T>;
    const int d = pass.d, samples = pass.count();
    const auto write = [&](int i, A element, A transposed) { b[i] = (element + transposed) / samples; };
    if constexpr (iterates_on_tensor_cores<T, D>) {
        if (!GradientPart::computes_iterates(pass, pass.num_parts - 1))
            store_iterates<D, THREADS>(covariance, eps, steps, d, iterates, shared_memory);
        inverse_sqrt_adjoint_on_tensor_cores<D, THREADS>(covariance, b, eps, steps, d, iterates, shared_memory, write);
    } else {
        inverse_sqrt_adjoint<A, D, THREADS>(covariance, b, eps, steps, d, shared_memory, write);
    }
}

// Fills `memory`, which is laid out like Workspace. The weight may be null.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, sum_residency<T, D>)
    joined_gradient(const T* dy, const T* x, const accumulator<T>* covariance, const accumulator<T>* mean,
                    const accumulator<T>* whitener, const accumulator<T>* weight_values, Pass pass, double eps,
                    long long steps, accumulator<T>* memory, unsigned* counters) {
    using A = accumulator<T>;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    A* k = reinterpret_cast<A*>(shared_memory);
    A *products = k + D * D, *w = products + D * D;
    A *s = w + D * D, *sums = s + D, *centre = sums + D, *zero = centre + D;
    const int d = pass.d, thread = threadIdx.x, length = d * d + d;
    const unsigned num_parts = pass.num_parts, index = blockIdx.x / num_parts, part_index = blockIdx.x % num_parts;
    const Workspace<A> workspace(memory, pass);
    A* iterates = workspace.iterates + (long long)index * 2 * steps * D * D;
    covariance += (long long)index * d * d;
    if constexpr (iterates_on_tensor_cores<T, D>)
        if (GradientPart::computes_iterates(pass, part_index))
            store_iterates<D, THREADS>(covariance, eps, steps, d, iterates, shared_memory);
    __syncthreads();

    if (thread < D) {
        zero[thread] = sums[thread] = 0;
        centre[thread] = thread < d ? mean[(long long)index * d + thread] : A(0);
    }
    for (int i = thread; i < d * d; i += THREADS) {
        products[i] = 0;
        w[i] = whitener[(long long)index * d * d + i];
    }
    __syncthreads();

    const GradientPart part(pass, index, part_index);
    const Parameter<A> weight{weight_values};
    for (int channel = part.first_channel; channel < part.end_channel; ++channel) {
        sum_channel<T, D>(dy, x, pass, index, channel, part, zero, centre, k, s);
        __syncthreads();
        add_channel<A>(k, s, w, weight, pass, index, channel, part.row, memory, products, sums);
        __syncthreads();
    }

    A* partial_sums = workspace.partial_sums + (long long)index * num_parts * length;
    for (int i = thread; i < length; i += THREADS)
        partial_sums[(long long)part_index * length + i] = i < d * d ? products[i] : sums[i - d * d];
    unsigned* block_counters = counters + index * pass.num_counters;
    if (!combine_parts(partial_sums, length, part_index, num_parts, pass.fan_in, block_counters)) return;

    A* b = workspace.b + (long long)index * d * d;
    for (int i = thread; i < d * d; i += THREADS) b[i] = __ldcg(partial_sums + i);
    if (thread < d)
        workspace.dy_means[(long long)index * d + thread] = __ldcg(partial_sums + d * d + thread) / A(pass.count());
    __syncthreads();
    replace_by_gradient<T, D>(b, covariance, pass, eps, steps, iterates, shared_memory);
}
