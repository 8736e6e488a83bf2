// The program that is the last of some to get to a place, which goes on with what the others have left in memory. Nobody
// waits for others. Counters are 0 before a launch and after it.
//
// It needs THREADS, which products.cuh has.

// Whether all `expected` programs have come here now. Then the caller may read what they wrote before, with __ldcg: this
// multiprocessor's own cache may hold what was there earlier.
__device__ bool is_last(unsigned* counter, unsigned expected) {
    __shared__ bool last;
    __threadfence();  // every thread's stores come before the count
    __syncthreads();
    if (threadIdx.x == 0) {
        last = expected == 1 || atomicAdd(counter, 1u) == expected - 1;
        if (last && expected > 1) *counter = 0;
        __threadfence();  // and the count before what any thread reads from now on
    }
    __syncthreads();
    return last;
}

// Adds up `count` parts, each `step` after the former, in the first one's place.
template <typename A> __device__ void add_in_place(A* parts, long long step, int count, int length) {
    for (int place = threadIdx.x; place < length; place += THREADS) {
        A sum = 0;
#pragma unroll 8
        for (int i = 0; i < count; ++i) sum += __ldcg(parts + i * step + place);
        parts[place] = sum;
    }
}

// Adds up the parts of a block's programs in the first one's place, in the same order whoever comes last: the last of
// every cluster of programs adds up the cluster, the last cluster the clusters' sums. Whether the caller is the one that
// has finished this.
template <typename A>
__device__ bool add_parts(A* parts, int length, int program, int programs, int cluster, unsigned* counters) {
    const int clusters = (programs + cluster - 1) / cluster, mine = program / cluster;
    const int members = mine + 1 < clusters ? cluster : programs - mine * cluster;
    if (!is_last(counters + 1 + mine, members)) return false;
    if (members > 1) add_in_place(parts + (long long)mine * cluster * length, length, members, length);
    if (!is_last(counters, clusters)) return false;
    if (clusters > 1) add_in_place(parts, (long long)cluster * length, clusters, length);
    __syncthreads();
    return true;
}
