// Products of matrices with an array's samples, tile by tile: what affine maps are made of.

#include "arrays.cuh"

constexpr int THREADS = 128;
constexpr int SAMPLES = THREADS;  // of a tile: a thread looks after the place of one of them
constexpr int BATCH = 16;         // numbers that a thread has on their way from memory at once

template <typename A, int D> struct Tile {
    // A thread's share of the result: with 8 x 8, 64 multiplications for every 16 numbers read from shared memory, and
    // three programs of 4 warps on a multiprocessor: while some wait for memory, others multiply.
    static constexpr int rows = D > 16 ? 8 : 4;
    static constexpr int columns = D / rows;
    static constexpr int size = Pack<A>::size;
    static constexpr int stride = SAMPLES + size;  // so that packs of neighbouring rows lie in other banks
    static constexpr int matrix_stride = D + size;

    // The i-th number of a thread among LENGTH of which it has COUNT. Neighbouring threads have neighbouring packs.
    template <int LENGTH, int COUNT> static __device__ int place(int thread, int i) {
        constexpr int width = COUNT < size ? COUNT : size;
        return i / width * (LENGTH * width / COUNT) + thread * width + i % width;
    }

    template <int LENGTH, int COUNT> static __device__ void read_share(A (&numbers)[COUNT], const A* row, int thread) {
        constexpr int width = COUNT < size ? COUNT : size;
#pragma unroll
        for (int i = 0; i < COUNT; i += width) read<width>(numbers + i, row + place<LENGTH, COUNT>(thread, i));
    }
};

// Where the samples of a tile lie, for all threads. Offsets of samples that aren't there are negative.
struct Places {
    long long offset[SAMPLES];
    int inner[SAMPLES];
};

// What is done to the elements of an array on their way, by their variable and their sample's position on the inner axis.
struct Unchanged {
    template <typename A> __device__ A operator()(A element, int, int) const { return element; }
};

// An array's tile, changed and less the centre, to shared memory, a row for every variable.
template <typename T, int D, typename A, typename Change = Unchanged>
__device__ void load(A* tile, Places& places, const Block<const T>& block, const Cursor& sample, bool there,
                     bool along_samples, const A* centre, int d, const Change& change = {}) {
    using Shape = Tile<A, D>;
    const long long own = there ? block.offset(sample) : -1;
    if (along_samples) {
        constexpr int count = D < BATCH ? D : BATCH;
        for (int first = 0; first < d; first += count) {  // beyond d are zeros, which nothing reads
            A batch[count];
#pragma unroll
            for (int k = 0; k < count; ++k)
                batch[k] = there && first + k < d
                               ? change(A(value(block.at(own, first + k))), first + k, sample.inner)
                               : centre[first + k];
#pragma unroll
            for (int k = 0; k < count; ++k)
                tile[(first + k) * Shape::stride + threadIdx.x] = batch[k] - centre[first + k];
        }
        return;
    }
    places.offset[threadIdx.x] = own;
    places.inner[threadIdx.x] = sample.inner;
    __syncthreads();
    constexpr int size = Pack<A>::size, step = THREADS / D * size;
    constexpr int count = SAMPLES / step < BATCH / size ? SAMPLES / step : BATCH / size;
    const int v = threadIdx.x % D;
    const A middle = centre[v];
    for (int first = threadIdx.x / D * size; first < SAMPLES; first += count * step) {
        Pack<A> batch[count];
#pragma unroll
        for (int i = 0; i < count; ++i)
#pragma unroll
            for (int k = 0; k < size; ++k) {
                const int m = first + i * step + k;
                const long long offset = places.offset[m];
                batch[i].at[k] =
                    offset >= 0 && v < d ? change(A(value(block.at(offset, v))), v, places.inner[m]) : middle;
            }
#pragma unroll
        for (int i = 0; i < count; ++i) {
#pragma unroll
            for (int k = 0; k < size; ++k) batch[i].at[k] -= middle;
            pack(tile + v * Shape::stride + first + i * step) = batch[i];
        }
    }
}

// A matrix, transposed: threads that multiply have its rows in packs.
template <typename A, int D>
__device__ void load_matrix(A* memory, const A* matrix, long long row, long long column, int d) {
    for (int place = threadIdx.x; place < D * D; place += THREADS) {
        const int r = place % D, c = place / D;
        memory[c * Tile<A, D>::matrix_stride + r] = r < d && c < d ? matrix[r * row + c * column] : A(0);
    }
}

template <typename A, int D>
__device__ void multiply(A (&total)[Tile<A, D>::rows][Tile<A, D>::columns], const A* matrix, const A* tile, int d) {
    using Shape = Tile<A, D>;
    constexpr int across = SAMPLES / Shape::columns;
    const int row = threadIdx.x / across, column = threadIdx.x % across;
#pragma unroll 4
    for (int v = 0; v < d; ++v) {
        A left[Shape::rows], right[Shape::columns];
        Shape::template read_share<D, Shape::rows>(left, matrix + v * Shape::matrix_stride, row);
        Shape::template read_share<SAMPLES, Shape::columns>(right, tile + v * Shape::stride, column);
#pragma unroll
        for (int i = 0; i < Shape::rows; ++i)
#pragma unroll
            for (int j = 0; j < Shape::columns; ++j) total[i][j] += left[i] * right[j];
    }
}

// Zeros, or the start of every row.
template <typename A, int D>
__device__ void begin(A (&total)[Tile<A, D>::rows][Tile<A, D>::columns], const A* start = nullptr) {
    using Shape = Tile<A, D>;
    const int row = threadIdx.x / (SAMPLES / Shape::columns);
#pragma unroll
    for (int i = 0; i < Shape::rows; ++i)
#pragma unroll
        for (int j = 0; j < Shape::columns; ++j)
            total[i][j] = start ? start[Shape::template place<D, Shape::rows>(row, i)] : A(0);
}

// The threads' totals to shared memory, so that neighbouring threads then write to neighbouring places.
template <typename A, int D>
__device__ void put(A* tile, const A (&total)[Tile<A, D>::rows][Tile<A, D>::columns]) {
    using Shape = Tile<A, D>;
    constexpr int across = SAMPLES / Shape::columns;
    const int row = threadIdx.x / across, column = threadIdx.x % across;
#pragma unroll
    for (int i = 0; i < Shape::rows; ++i)
#pragma unroll
        for (int j = 0; j < Shape::columns; ++j)
            tile[Shape::template place<D, Shape::rows>(row, i) * Shape::stride +
                 Shape::template place<SAMPLES, Shape::columns>(column, j)] = total[i][j];
}

// The result's tile, changed, to memory.
template <typename T, int D, typename A, typename Change = Unchanged>
__device__ void store(const A* tile, Places& places, const Block<T>& block, const Cursor& sample, bool there,
                      bool along_samples, int d, const Change& change = {}) {
    using Shape = Tile<A, D>;
    const long long own = there ? block.offset(sample) : -1;
    if (along_samples) {
        if (!there) return;
#pragma unroll 8
        for (int v = 0; v < d; ++v)
            assign(block.at(own, v), change(tile[v * Shape::stride + threadIdx.x], v, sample.inner));
        return;
    }
    places.offset[threadIdx.x] = own;
    places.inner[threadIdx.x] = sample.inner;
    __syncthreads();
    const int v = threadIdx.x % D;
    if (v >= d) return;
#pragma unroll 4
    for (int m = threadIdx.x / D * Pack<A>::size; m < SAMPLES; m += THREADS / D * Pack<A>::size) {
        const Pack<A> values = pack(tile + v * Shape::stride + m);
#pragma unroll
        for (int k = 0; k < Pack<A>::size; ++k) {
            const long long offset = places.offset[m + k];
            if (offset >= 0) assign(block.at(offset, v), change(values.at[k], v, places.inner[m + k]));
        }
    }
}
