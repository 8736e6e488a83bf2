// Sums over the samples of products of two variables, from which moments and cross moments are made.
//
// Each thread block goes through one part of a block's samples, tile by tile, and stores its partial sums. These are
// added up later, in a fixed order, so that results are reproducible.

#include "arrays.cuh"

constexpr int THREADS = 256;

// The layout of a tile of samples in shared memory. A thread loads LOADS elements of each tile: few need fewer
// registers, many make larger tiles, between which threads have to wait less often.
template <typename A, int D, int LOADS> struct Tile {
    static constexpr int samples = LOADS * THREADS / D;
    static_assert(samples <= THREADS, "a thread computes the offset of one sample of a tile");
    // A thread accumulates a square of products in registers. With 8 x 8 it does 4 multiplications for each element
    // that it reads from shared memory, and leaves half of the registers to a second thread block on the
    // multiprocessor.
    static constexpr int side = D > 16 ? 8 : 4;
    static constexpr int sides = D / side;
    // Padded, so that eight threads that read a pack from eight consecutive rows use each bank once.
    static constexpr int stride = D + Pack<A>::size;

    // Returns the i-th variable of square s. Neighbouring squares have neighbouring packs.
    static __device__ int variable(int s, int i) {
        constexpr int size = Pack<A>::size;
        return i / size * (D * size / side) + s * size + i % size;
    }

    static __device__ void read_square(A (&values)[side], const A* row, int s) {
        constexpr int size = Pack<A>::size;
#pragma unroll
        for (int i = 0; i < side; i += size) read<size>(values + i, row + variable(s, i));
    }
};

// Loads the tiles of an array, minus a centre, into shared memory. The next tile is fetched into registers while the
// current one is in use.
template <typename T, int D, int LOADS> struct Loader {
    using A = accumulator<T>;
    using Shape = Tile<A, D, LOADS>;

    const Block<const T> block;
    const bool along_samples;  // neighbouring threads load neighbouring samples, rather than variables
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

    // Samples past the end have negative offsets. They, and variables past d, are replaced by the centre, and so add 0.
    __device__ void fetch(const long long* offsets) {
        if (along_samples) {
            const long long offset = offsets[sample(0)];
            const T* source = &block.at(offset, variable(0));
#pragma unroll
            for (int e = 0; e < LOADS; ++e, source += block.variable)
                fetched[e] = offset >= 0 && variable(e) < d ? A(widen(*source)) : centre[variable(e)];
        } else {
            const T* source = &block.at(0, variable(0));
#pragma unroll
            for (int e = 0; e < LOADS; ++e) {
                const long long offset = offsets[sample(e)];
                fetched[e] = offset >= 0 && variable(e) < d ? A(widen(source[offset])) : centre[variable(e)];
            }
        }
    }

    __device__ void store(A* tile, A (&elements)[LOADS]) const {
        if (along_samples) {
#pragma unroll
            for (int e = 0; e < LOADS; e += Pack<A>::size) {
                Pack<A> values;
#pragma unroll
                for (int k = 0; k < Pack<A>::size; ++k) values.at[k] = elements[e + k];
                pack(tile + sample(e) * Shape::stride + variable(e)) = values;
            }
        } else {
#pragma unroll
            for (int e = 0; e < LOADS; ++e) tile[sample(e) * Shape::stride + variable(e)] = elements[e];
        }
    }

    __device__ void store_centred(A* tile) {
#pragma unroll
        for (int e = 0; e < LOADS; ++e) fetched[e] -= centre[variable(e)];
        store(tile, fetched);
    }
};

// Computes the offsets of the samples of one tile after the other. Each thread computes at most one offset of a tile.
template <int SAMPLES> struct Samples {
    const int length, end;
    int next;
    Cursor cursor;
    const Cursor step;

    __device__ Samples(int begin, int end, int length)
        : length(length), end(end), next(begin + threadIdx.x), cursor(next, length), step(SAMPLES, length) {}

    template <typename T> __device__ void locate(long long* offsets, const Block<const T>& block) const {
        if (threadIdx.x < SAMPLES) offsets[threadIdx.x] = next < end ? block.offset(cursor) : -1;
    }

    __device__ void advance() {
        next += SAMPLES;
        cursor.advance(step, length);
    }
};

// Which products a thread accumulates: those of a square of variables, for the samples of a tile that its group takes.
// SYMMETRIC: the two arrays are the same, so that only squares on and above the diagonal are computed.
template <int SIDES, bool SYMMETRIC> struct Square {
    static constexpr int count = SYMMETRIC ? SIDES * (SIDES + 1) / 2 : SIDES * SIDES;
    static constexpr int groups = THREADS / count;  // of threads, one for each square; leftover threads only load

    int group, row, column;

    __device__ Square() {
        const int thread = threadIdx.x;
        group = thread / count;
        row = 0;
        column = thread % count;
        if (SYMMETRIC) {
            while (column >= SIDES - row) column -= SIDES - row++;
            column += row;
        } else {
            row = column / SIDES;
            column %= SIDES;
        }
    }
};

// Adds the products of the samples of a tile to the thread's total.
template <typename Shape, typename Square, int SIDE, typename A>
__device__ __forceinline__ void multiply_tile(A (&total)[SIDE][SIDE], const A* tile_a, const A* tile_b,
                                              const Square& square) {
    if (square.group >= Square::groups) return;
    for (int m = square.group; m < Shape::samples; m += Square::groups) {
        A left[SIDE], right[SIDE];
        Shape::read_square(left, tile_a + m * Shape::stride, square.row);
        Shape::read_square(right, tile_b + m * Shape::stride, square.column);
#pragma unroll
        for (int i = 0; i < SIDE; ++i)
#pragma unroll
            for (int j = 0; j < SIDE; ++j) total[i][j] += left[i] * right[j];
    }
}

// Adds up what the tile holds for each variable, and stores the d sums.
template <typename Shape, int D, typename A>
__device__ __forceinline__ void sum_tile(A* tile, A* sums, int d) {
    const int thread = threadIdx.x;
    for (int half = Shape::samples / 2; half > 0; half /= 2) {
        __syncthreads();
        for (int i = thread; i < half * D; i += THREADS) {
            const int m = i / D, v = i % D;
            tile[m * Shape::stride + v] += tile[(m + half) * Shape::stride + v];
        }
    }
    __syncthreads();
    if (thread < d) sums[thread] = tile[thread];
}

// Adds up the groups' totals in the threads of the first group. In each round the later half of the groups hands one
// row of each square at a time to the earlier half, by way of `memory`.
template <typename Square, int SIDE, typename A>
__device__ __forceinline__ void combine_groups(A (&total)[SIDE][SIDE], A* memory, const Square& square) {
    const int thread = threadIdx.x;
#pragma unroll
    for (int width = Square::groups; width > 1; width = (width + 1) / 2) {
        const int half = (width + 1) / 2;
#pragma unroll
        for (int i = 0; i < SIDE; ++i) {
            __syncthreads();
            if (square.group >= half && square.group < width)
#pragma unroll
                for (int j = 0; j < SIDE; ++j)
                    memory[j * (THREADS / 2) + thread - half * Square::count] = total[i][j];
            __syncthreads();
            if (square.group < width - half)
#pragma unroll
                for (int j = 0; j < SIDE; ++j) total[i][j] += memory[j * (THREADS / 2) + thread];
        }
    }
}

// Computes the sums of (a - its centre) (b - its centre)', (d, d), and of a - its centre, (d), over samples `begin` to
// `end`. SYMMETRIC: a and b are the same array.
template <typename TA, typename TB, int D, int LOADS, bool SYMMETRIC>
__device__ void sum_products(Loader<TA, D, LOADS>& a, Loader<TB, D, LOADS>& b, int length, int begin, int end,
                             accumulator<TA>* products, accumulator<TA>* sums) {
    using A = accumulator<TA>;
    using Shape = Tile<A, D, LOADS>;
    constexpr int side = Shape::side, samples = Shape::samples, arrays = SYMMETRIC ? 1 : 2;
    constexpr int tile_size = samples * Shape::stride;

    __shared__ Pack<A> memory[arrays * tile_size / Pack<A>::size];
    __shared__ long long offsets[2][arrays][samples];  // of the current tile and of the next
    A* tile_a = memory[0].at;
    A* tile_b = SYMMETRIC ? tile_a : tile_a + tile_size;

    const Square<Shape::sides, SYMMETRIC> square;
    A total[side][side] = {};
    A sum[LOADS] = {};
    Samples<samples> position(begin, end, length);
    const int tiles = (end - begin + samples - 1) / samples;

    position.locate(offsets[0][0], a.block);
    if (!SYMMETRIC) position.locate(offsets[0][arrays - 1], b.block);
    __syncthreads();
    a.fetch(offsets[0][0]);
    if (!SYMMETRIC) b.fetch(offsets[0][arrays - 1]);

    for (int tile = 0; tile < tiles; ++tile) {
        const int next = (tile + 1) % 2;
        a.store_centred(tile_a);
        if (!SYMMETRIC) b.store_centred(tile_b);
#pragma unroll
        for (int e = 0; e < LOADS; ++e) sum[e] += a.fetched[e];
        position.advance();
        position.locate(offsets[next][0], a.block);
        if (!SYMMETRIC) position.locate(offsets[next][arrays - 1], b.block);
        __syncthreads();
        if (tile + 1 < tiles) {
            a.fetch(offsets[next][0]);
            if (!SYMMETRIC) b.fetch(offsets[next][arrays - 1]);
        }
        multiply_tile<Shape>(total, tile_a, tile_b, square);
        __syncthreads();
    }

    a.store(tile_a, sum);  // each thread's sums, laid out like the elements that it has loaded
    sum_tile<Shape, D>(tile_a, sums, a.d);
    combine_groups(total, tile_a, square);
    if (square.group > 0) return;
#pragma unroll
    for (int i = 0; i < side; ++i)
#pragma unroll
        for (int j = 0; j < side; ++j) {
            const int r = Shape::variable(square.row, i), c = Shape::variable(square.column, j);
            if (r < a.d && c < a.d) {
                products[r * a.d + c] = total[i][j];
                if (SYMMETRIC) products[c * a.d + r] = total[i][j];
            }
        }
}

// Adds up the parts' partial sums: one row of the products, and all d sums. Each lane of threads takes some parts, then
// lane 0 adds up the lanes. Only its threads, one for each column, have the results.
template <typename A, int D>
__device__ void combine_row(const A* products, const A* sums, int num_parts, int d, int row, A& product, A& sum) {
    constexpr int lanes = THREADS / D;
    __shared__ A partial[2][lanes][D];
    const int column = threadIdx.x % D, lane = threadIdx.x / D;
    product = sum = 0;
    if (column < d)
#pragma unroll 4
        for (int part = lane; part < num_parts; part += lanes) {
            product += products[((long long)part * d + row) * d + column];
            sum += sums[(long long)part * d + column];
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
