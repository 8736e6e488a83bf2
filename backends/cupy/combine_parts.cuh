// Adding up the partial sums of a block's parts inside the launch that computed them. No thread block waits for
// another: whichever finishes last goes on with what the others left in memory. Counters are 0 before and after a
// launch.
//
// Include products.cuh, which defines THREADS, before this file.

// Counts this thread block, and returns whether it is the last of `expected` ones. If it is, it may read what the
// others wrote before they were counted, but only with __ldcg: the multiprocessor's own cache may hold older values.
__device__ bool is_last(unsigned* counter, unsigned expected) {
    __shared__ bool last;
    __threadfence();  // the stores of every thread come before the count
    __syncthreads();
    if (threadIdx.x == 0) {
        last = expected == 1 || atomicAdd(counter, 1u) == expected - 1;
        if (last && expected > 1) *counter = 0;
        __threadfence();  // and the count comes before any later load
    }
    __syncthreads();
    return last;
}

// Adds up `count` vectors of `length` elements, `step` elements apart, and leaves their sum in place of the first.
template <typename A> __device__ void add_in_place(A* vectors, long long step, int count, int length) {
    for (int i = threadIdx.x; i < length; i += THREADS) {
        A sum = 0;
#pragma unroll 8
        for (int j = 0; j < count; ++j) sum += __ldcg(vectors + j * step + i);
        vectors[i] = sum;
    }
}

// Adds up the partial sums of a block's parts, and leaves the total in place of the first part. The result doesn't
// depend on which thread block is last, as this is a tree of two levels: the last thread block of every `fan_in`
// adjacent parts adds up these, and the last one of all adds up their sums. Returns whether this thread block has
// completed the total.
template <typename A>
__device__ bool combine_parts(A* partial_sums, int length, int part, int num_parts, int fan_in, unsigned* counters) {
    const int nodes = (num_parts + fan_in - 1) / fan_in, node = part / fan_in;
    const int children = node + 1 < nodes ? fan_in : num_parts - node * fan_in;
    if (!is_last(counters + 1 + node, children)) return false;
    if (children > 1) add_in_place(partial_sums + (long long)node * fan_in * length, length, children, length);
    if (!is_last(counters, nodes)) return false;
    if (nodes > 1) add_in_place(partial_sums, (long long)fan_in * length, nodes, length);
    __syncthreads();
    return true;
}
