// What the gradients need of all samples: sums of dy and of dy (x - mean)', and what follows from them. They are summed
// channel by channel, as each channel has a weight and a bias of its own. The last program that is done with a block adds
// up its parts and takes the steps of Newton's adjoint.

#include "products.cuh"
#include "newton.cuh"
#include "pass.cuh"
#include "last.cuh"

constexpr int LOADS = 4;  // of each of two arrays

// A channel's share of the gradients: of weight and bias, to their places, and of the whitener, to the program's totals.
// With K = dy (x - mean)' of the channel alone, row v being its variable's, the gradient of its weight is row v of W
// times row v of K.
template <typename A>
__device__ void add_channel(const A* k, const A* s, const A* w, const Parameter<A>& weight, const Pass& pass,
                            unsigned index, int channel, unsigned row, A* memory, A* products, A* sums) {
    const int d = pass.d, thread = threadIdx.x;
    for (int place = thread; place < d * d; place += THREADS)
        products[place] += weight.factor(pass.channel(index, place / d, channel)) * k[place];
    if (thread >= d) return;
    const int at = pass.channel(index, thread, channel);
    sums[thread] += weight.factor(at) * s[thread];
    if (!pass.rows) return;
    const Scratch<A> scratch(memory, pass);
    scratch.of_bias[row * pass.all_channels + at] = s[thread];
    if (!weight.values) return;
    A sum = 0;
    for (int i = 0; i < d; ++i) {
        const int place = thread * d + (thread + i) % d;  // neighbouring threads read from other banks
        sum += w[place] * k[place];
    }
    scratch.of_weight[row * pass.all_channels + at] = sum;
}

// To `memory`, which is laid out as Scratch is. The weight may be null.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, sizeof(accumulator<T>) == 4 ? 2 : 1)
    find_gradient(const T* dy, const T* x, const accumulator<T>* covariance, const accumulator<T>* mean,
                  const accumulator<T>* whitener, const void* weight_values, Pass pass, double eps, long long steps,
                  accumulator<T>* memory, unsigned* counters) {
    using A = accumulator<T>;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    A* k = reinterpret_cast<A*>(shared_memory);
    A *products = k + D * D, *w = products + D * D, *s = w + D * D, *sums = s + D, *centre = sums + D, *zero = centre + D;
    const int d = pass.d, thread = threadIdx.x, length = d * d + d;
    const unsigned programs = pass.programs, index = blockIdx.x / programs, program = blockIdx.x % programs;
    const Parameter<A> weight{weight_values, bool(pass.half_weight)};
    if (thread < D) {
        zero[thread] = sums[thread] = 0;
        centre[thread] = thread < d ? mean[(long long)index * d + thread] : A(0);
    }
    for (int place = thread; place < d * d; place += THREADS) {
        products[place] = 0;
        w[place] = whitener[(long long)index * d * d + place];
    }
    __syncthreads();

    const int count = pass.outer * pass.positions, part = program % pass.position_parts;
    const int first = part * pass.stretch, last = count - first < pass.stretch ? count : first + pass.stretch;
    const int chunk = pass.channel_chunk, from = program / pass.position_parts * chunk;
    const int to = pass.channels - from < chunk ? pass.channels : from + chunk;
    const unsigned row = (pass.block_channels ? 0 : index * pass.position_parts) + part;
    for (int channel = from; channel < to; ++channel) {
        const long long ahead = channel * pass.positions;
        const auto left = block_of(dy + ahead * pass.dy.inner, pass.dy, index);
        const auto right = block_of(x + ahead * pass.x.inner, pass.x, index);
        Loader<T, D, LOADS> of_dy(left, pass.dy.along_samples, d, zero), of_x(right, pass.x.along_samples, d, centre);
        sum_products<T, T, D, LOADS, false>(of_dy, of_x, pass.positions, first, last, k, s);
        __syncthreads();
        add_channel<A>(k, s, w, weight, pass, index, channel, row, memory, products, sums);
        __syncthreads();
    }

    const Scratch<A> scratch(memory, pass);
    A* parts = scratch.parts + (long long)index * programs * length;
    for (int place = thread; place < length; place += THREADS)
        parts[(long long)program * length + place] = place < d * d ? products[place] : sums[place - d * d];
    if (!add_parts(parts, length, program, programs, pass.cluster, counters + index * pass.counters)) return;

    A* matrix = scratch.matrices + (long long)index * d * d;
    const int samples = pass.count();
    for (int place = thread; place < d * d; place += THREADS) matrix[place] = __ldcg(parts + place);
    if (thread < d) scratch.means[(long long)index * d + thread] = __ldcg(parts + d * d + thread) / samples;
    __syncthreads();
    find_adjoint<A, D, THREADS>(covariance + (long long)index * d * d, matrix, eps, steps, d, shared_memory,
                                [&](int place, A element, A transposed) {
                                    matrix[place] = (element + transposed) / samples;
                                });
}
