// Sums over a block's samples of the products of two variables, which is what moments and cross moments are.
//
// A program (a CUDA block) takes a stretch of the samples, tile by tile; what it adds up goes to its own place in
// memory, and a second kernel adds the programs' sums in a fixed order. So results don't depend on chance.

#include "arrays.cuh"

constexpr int THREADS = 256;

// LOADS: the numbers of a tile that a thread brings. Few take less registers, many make a tile last longer.
template <typename A, int D, int LOADS> struct Tile {
    static constexpr int samples = LOADS * THREADS / D;
    static_assert(samples <= THREADS, "a thread locates one sample of a tile");
    // A thread adds up a square of products in registers: 8 x 8 does 4 multiplications for every number that it reads
    // from shared memory, and leaves half of the registers to a second program on the same multiprocessor.
    static constexpr int side = D > 16 ? 8 : 4;
    static constexpr int sides = D / side;
    // Threads that read packs from eight rows in turn, at the same variable, read from all banks once.
    static constexpr int stride = D + Pack<A>::size;

    // The i-th variable of square s. Neighbouring threads have neighbouring packs.
    static __device__ int variable(int s, int i) {
        constexpr int size = Pack<A>::size;
        return i / size * (D * size / side) + s * size + i % size;
    }

    static __device__ void read_square(A (&numbers)[side], const A* row, int s) {
        constexpr int size = Pack<A>::size;
#pragma unroll
        for (int i = 0; i < side; i += size) read<size>(numbers + i, row + variable(s, i));
    }
};

// Brings the tiles of one array, less a centre, to shared memory; the next tile is on its way while one is in use.
template <typename T, int D, int LOADS> struct Loader {
    using A = accumulator<T>;
    using Shape = Tile<A, D, LOADS>;

    const Block<const T> block;
    const bool along_samples;  // neighbouring threads take neighbouring samples, not variables
    const int d;
    const A* centre;
    A fetched[LOADS];

    __device__ Loader(const Block<const T>& block, bool along_samples, int d, const A* centre)
        : block(block), along_samples(along_samples), d(d), centre(centre) {}

    __device__ int sample(int e) const {
        const int thread = threadIdx.x;
        return along_samples ? thread % Shape::samples : thread / D + e * (THREADS / D);
    }

    __device__ int variable(int e) const {
        const int thread = threadIdx.x;
        return along_samples ? thread / Shape::samples * LOADS + e : thread % D;
    }

    // What isn't there is as good as the centre. Offsets of samples that aren't there are negative.
    __device__ void fetch(const long long* offsets) {
        if (along_samples) {
            const long long offset = offsets[sample(0)];
            const T* place = &block.at(offset, variable(0));
#pragma unroll
            for (int e = 0; e < LOADS; ++e, place += block.variable)
                fetched[e] = offset >= 0 && variable(e) < d ? A(value(*place)) : centre[variable(e)];
        } else {
            const T* place = &block.at(0, variable(0));
#pragma unroll
            for (int e = 0; e < LOADS; ++e) {
                const long long offset = offsets[sample(e)];
                fetched[e] = offset >= 0 && variable(e) < d ? A(value(place[offset])) : centre[variable(e)];
            }
        }
    }

    __device__ void store(A* tile, A (&numbers)[LOADS]) const {
        if (along_samples) {
#pragma unroll
            for (int e = 0; e < LOADS; e += Pack<A>::size) {
                Pack<A> values;
#pragma unroll
                for (int k = 0; k < Pack<A>::size; ++k) values.at[k] = numbers[e + k];
                pack(tile + sample(e) * Shape::stride + variable(e)) = values;
            }
        } else {
#pragma unroll
            for (int e = 0; e < LOADS; ++e) tile[sample(e) * Shape::stride + variable(e)] = numbers[e];
        }
    }

    __device__ void store_centred(A* tile) {
#pragma unroll
        for (int e = 0; e < LOADS; ++e) fetched[e] -= centre[variable(e)];
        store(tile, fetched);
    }
};

// Offsets of the samples of a tile, for all threads.
template <int SAMPLES> struct Samples {
    const int length, last;
    int next;
    Cursor cursor;
    const Cursor step;

    __device__ Samples(int first, int last, int length)
        : length(length), last(last), next(first + threadIdx.x), cursor(next, length), step(SAMPLES, length) {}

    template <typename T> __device__ void locate(long long* offsets, const Block<const T>& block) const {
        if (threadIdx.x < SAMPLES) offsets[threadIdx.x] = next < last ? block.offset(cursor) : -1;
    }

    __device__ void advance() {
        next += SAMPLES;
        cursor.advance(step, length);
    }
};

// Sums of (a - its centre) (b - its centre)' to `products` (d, d) and of a - its centre to `sums` (d), over the samples
// from `first` to `last`. SQUARE: b is a, and half of the products do.
template <typename TA, typename TB, int D, int LOADS, bool SQUARE>
__device__ void sum_products(Loader<TA, D, LOADS>& a, Loader<TB, D, LOADS>& b, int length, int first, int last,
                             accumulator<TA>* products, accumulator<TA>* sums) {
    using A = accumulator<TA>;
    using Shape = Tile<A, D, LOADS>;
    constexpr int side = Shape::side, sides = Shape::sides, samples = Shape::samples;
    constexpr int squares = SQUARE ? sides * (sides + 1) / 2 : sides * sides;
    constexpr int groups = THREADS / squares;  // of threads, that share the samples of a tile
    constexpr int tile_size = samples * Shape::stride;

    __shared__ Pack<A> memory[(SQUARE ? 1 : 2) * tile_size / Pack<A>::size];
    __shared__ long long offsets[2][SQUARE ? 1 : 2][samples];  // of the tile in use and of the next
    A* tile_a = memory[0].at;
    A* tile_b = SQUARE ? tile_a : tile_a + tile_size;

    const int thread = threadIdx.x, group = thread / squares;
    int row = 0, column = thread % squares;
    if (SQUARE) {
        while (column >= sides - row) column -= sides - row++;
        column += row;
    } else {
        row = column / sides;
        column %= sides;
    }

    A total[side][side] = {};
    A sum[LOADS] = {};
    Samples<samples> position(first, last, length);
    const int tiles = (last - first + samples - 1) / samples;

    position.locate(offsets[0][0], a.block);
    if (!SQUARE) position.locate(offsets[0][SQUARE ? 0 : 1], b.block);
    __syncthreads();
    a.fetch(offsets[0][0]);
    if (!SQUARE) b.fetch(offsets[0][SQUARE ? 0 : 1]);

    for (int tile = 0; tile < tiles; ++tile) {
        const int after = (tile + 1) % 2;
        a.store_centred(tile_a);
        if (!SQUARE) b.store_centred(tile_b);
#pragma unroll
        for (int e = 0; e < LOADS; ++e) sum[e] += a.fetched[e];
        position.advance();
        position.locate(offsets[after][0], a.block);
        if (!SQUARE) position.locate(offsets[after][SQUARE ? 0 : 1], b.block);
        __syncthreads();
        if (tile + 1 < tiles) {
            a.fetch(offsets[after][0]);
            if (!SQUARE) b.fetch(offsets[after][SQUARE ? 0 : 1]);
        }
        if (group < groups) {
            for (int m = group; m < samples; m += groups) {
                A left[side], right[side];
                Shape::read_square(left, tile_a + m * Shape::stride, row);
                Shape::read_square(right, tile_b + m * Shape::stride, column);
#pragma unroll
                for (int i = 0; i < side; ++i)
#pragma unroll
                    for (int j = 0; j < side; ++j) total[i][j] += left[i] * right[j];
            }
        }
        __syncthreads();
    }

    // The tiles' memory is free: the sums of the samples that each thread has brought lie there as a tile once more.
    a.store(tile_a, sum);
    for (int half = samples / 2; half > 0; half /= 2) {
        __syncthreads();
        for (int place = thread; place < half * D; place += THREADS) {
            const int m = place / D, v = place % D;
            tile_a[m * Shape::stride + v] += tile_a[(m + half) * Shape::stride + v];
        }
    }
    __syncthreads();
    if (thread < a.d) sums[thread] = tile_a[thread];

    // The groups' products, a row of each square at a time; the later half of the groups hand theirs to the other.
#pragma unroll
    for (int width = groups; width > 1; width = (width + 1) / 2) {
        const int half = (width + 1) / 2;
#pragma unroll
        for (int i = 0; i < side; ++i) {
            __syncthreads();
            if (group >= half && group < width)
#pragma unroll
                for (int j = 0; j < side; ++j) tile_a[j * (THREADS / 2) + thread - half * squares] = total[i][j];
            __syncthreads();
            if (group < width - half)
#pragma unroll
                for (int j = 0; j < side; ++j) total[i][j] += tile_a[j * (THREADS / 2) + thread];
        }
    }
    if (group > 0) return;
#pragma unroll
    for (int i = 0; i < side; ++i)
#pragma unroll
        for (int j = 0; j < side; ++j) {
            const int r = Shape::variable(row, i), c = Shape::variable(column, j);
            if (r < a.d && c < a.d) {
                products[r * a.d + c] = total[i][j];
                if (SQUARE) products[c * a.d + r] = total[i][j];
            }
        }
}

// Adds up what the programs left of one row of the products, and of all sums: thread (lane, column) every so many of
// them, then lane 0 the lanes' sums, which are complete in its threads.
template <typename A, int D>
__device__ void add_programs(const A* products, const A* sums, int programs, int d, int row, A& product, A& sum) {
    constexpr int lanes = THREADS / D;
    __shared__ A partial[2][lanes][D];
    const int column = threadIdx.x % D, lane = threadIdx.x / D;
    product = sum = 0;
    if (column < d)
#pragma unroll 4
        for (int p = lane; p < programs; p += lanes) {
            product += products[((long long)p * d + row) * d + column];
            sum += sums[(long long)p * d + column];
        }
    partial[0][lane][column] = product;
    partial[1][lane][column] = sum;
    __syncthreads();
    if (lane > 0) return;
    for (int other = 1; other < lanes; ++other) {
        product += partial[0][other][column];
        sum += partial[1][other][column];
    }
}
