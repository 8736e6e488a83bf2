// Products of a matrix with the samples of an array, tile by tile, from which affine maps are made.

#include "arrays.cuh"

constexpr int THREADS = 128;
constexpr int SAMPLES = THREADS;  // of a tile: each thread computes the offset of one of them
constexpr int BATCH = 16;         // elements that a thread loads before it uses the first

// The layout of a tile and of a matrix in shared memory, and how threads share the elements of a product.
template <typename A, int D> struct Tile {
    // A thread computes a fragment of `rows` by `columns` elements. With 8 x 8 it does 64 multiplications for 16
    // elements from shared memory, and three thread blocks fit a multiprocessor: while some wait for memory, others
    // multiply.
    static constexpr int rows = D > 16 ? 8 : 4;
    static constexpr int columns = D / rows;
    static constexpr int size = Pack<A>::size;
    static constexpr int stride = SAMPLES + size;  // padded, so that packs of neighbouring rows lie in different banks
    static constexpr int matrix_stride = D + size;

    // Returns the index of a thread's i-th element if threads share LENGTH elements and each has COUNT. Neighbouring
    // threads have neighbouring packs.
    template <int LENGTH, int COUNT> static __device__ int index(int thread, int i) {
        constexpr int width = COUNT < size ? COUNT : size;
        return i / width * (LENGTH * width / COUNT) + thread * width + i % width;
    }

    template <int LENGTH, int COUNT>
    static __device__ void read_fragment(A (&values)[COUNT], const A* row, int thread) {
        constexpr int width = COUNT < size ? COUNT : size;
#pragma unroll
        for (int i = 0; i < COUNT; i += width) read<width>(values + i, row + index<LENGTH, COUNT>(thread, i));
    }
};

// The offsets of the samples of a tile, and their positions on the inner axis. Samples past the end have negative
// offsets.
struct SampleOffsets {
    long long offset[SAMPLES];
    int inner[SAMPLES];
};

// A transform is applied to an array's elements as they are loaded or stored. It depends on their variable and on their
// sample's position on the inner axis.
struct Identity {
    template <typename A> __device__ A operator()(A element, int, int) const { return element; }
};

// Loads a tile of an array into shared memory, transformed and minus the centre, with one row for each variable.
template <typename T, int D, typename A, typename Transform = Identity>
__device__ void load(A* tile, SampleOffsets& offsets, const Block<const T>& block, const Cursor& sample, bool in_range,
                     bool along_samples, const A* centre, int d, const Transform& transform = {}) {
    using Shape = Tile<A, D>;
    const long long offset = in_range ? block.offset(sample) : -1;
    if (along_samples) {
        constexpr int count = D < BATCH ? D : BATCH;
        for (int first = 0; first < d; first += count) {  // rows past d are never read
            A batch[count];
#pragma unroll
            for (int k = 0; k < count; ++k)
                batch[k] = in_range && first + k < d
                               ? transform(A(widen(block.at(offset, first + k))), first + k, sample.inner)
                               : centre[first + k];
#pragma unroll
            for (int k = 0; k < count; ++k)
                tile[(first + k) * Shape::stride + threadIdx.x] = batch[k] - centre[first + k];
        }
        return;
    }
    offsets.offset[threadIdx.x] = offset;
    offsets.inner[threadIdx.x] = sample.inner;
    __syncthreads();
    constexpr int size = Pack<A>::size, step = THREADS / D * size;
    constexpr int count = SAMPLES / step < BATCH / size ? SAMPLES / step : BATCH / size;
    const int v = threadIdx.x % D;
    const A own_centre = centre[v];
    for (int first = threadIdx.x / D * size; first < SAMPLES; first += count * step) {
        Pack<A> batch[count];
#pragma unroll
        for (int i = 0; i < count; ++i)
#pragma unroll
            for (int k = 0; k < size; ++k) {
                const int m = first + i * step + k;
                const long long source = offsets.offset[m];
                batch[i].at[k] =
                    source >= 0 && v < d ? transform(A(widen(block.at(source, v))), v, offsets.inner[m]) : own_centre;
            }
#pragma unroll
        for (int i = 0; i < count; ++i) {
#pragma unroll
            for (int k = 0; k < size; ++k) batch[i].at[k] -= own_centre;
            pack(tile + v * Shape::stride + first + i * step) = batch[i];
        }
    }
}

// Loads a matrix into shared memory, transposed, so that threads read adjacent rows as packs.
template <typename A, int D>
__device__ void load_matrix(A* memory, const A* matrix, long long row, long long column, int d) {
    for (int i = threadIdx.x; i < D * D; i += THREADS) {
        const int r = i % D, c = i / D;
        memory[c * Tile<A, D>::matrix_stride + r] = r < d && c < d ? matrix[r * row + c * column] : A(0);
    }
}

// Adds the thread's fragment of matrix times tile to its total.
template <typename A, int D>
__device__ void multiply(A (&total)[Tile<A, D>::rows][Tile<A, D>::columns], const A* matrix, const A* tile, int d) {
    using Shape = Tile<A, D>;
    constexpr int fragments = SAMPLES / Shape::columns;
    const int row = threadIdx.x / fragments, column = threadIdx.x % fragments;
#pragma unroll 4
    for (int v = 0; v < d; ++v) {
        A left[Shape::rows], right[Shape::columns];
        Shape::template read_fragment<D, Shape::rows>(left, matrix + v * Shape::matrix_stride, row);
        Shape::template read_fragment<SAMPLES, Shape::columns>(right, tile + v * Shape::stride, column);
#pragma unroll
        for (int i = 0; i < Shape::rows; ++i)
#pragma unroll
            for (int j = 0; j < Shape::columns; ++j) total[i][j] += left[i] * right[j];
    }
}

// Sets the thread's total to the start value of each row, or to 0 if there are none.
template <typename A, int D>
__device__ void initialize(A (&total)[Tile<A, D>::rows][Tile<A, D>::columns], const A* start = nullptr) {
    using Shape = Tile<A, D>;
    const int row = threadIdx.x / (SAMPLES / Shape::columns);
#pragma unroll
    for (int i = 0; i < Shape::rows; ++i)
#pragma unroll
        for (int j = 0; j < Shape::columns; ++j)
            total[i][j] = start ? start[Shape::template index<D, Shape::rows>(row, i)] : A(0);
}

// Copies the threads' totals to shared memory, from where neighbouring threads store neighbouring elements.
template <typename A, int D>
__device__ void write_tile(A* tile, const A (&total)[Tile<A, D>::rows][Tile<A, D>::columns]) {
    using Shape = Tile<A, D>;
    constexpr int fragments = SAMPLES / Shape::columns;
    const int row = threadIdx.x / fragments, column = threadIdx.x % fragments;
#pragma unroll
    for (int i = 0; i < Shape::rows; ++i)
#pragma unroll
        for (int j = 0; j < Shape::columns; ++j)
            tile[Shape::template index<D, Shape::rows>(row, i) * Shape::stride +
                 Shape::template index<SAMPLES, Shape::columns>(column, j)] = total[i][j];
}

// Stores a tile of the result, transformed.
template <typename T, int D, typename A, typename Transform = Identity>
__device__ void store(const A* tile, SampleOffsets& offsets, const Block<T>& block, const Cursor& sample, bool in_range,
                      bool along_samples, int d, const Transform& transform = {}) {
    using Shape = Tile<A, D>;
    const long long offset = in_range ? block.offset(sample) : -1;
    if (along_samples) {
        if (!in_range) return;
#pragma unroll 8
        for (int v = 0; v < d; ++v)
            assign(block.at(offset, v), transform(tile[v * Shape::stride + threadIdx.x], v, sample.inner));
        return;
    }
    offsets.offset[threadIdx.x] = offset;
    offsets.inner[threadIdx.x] = sample.inner;
    __syncthreads();
    const int v = threadIdx.x % D;
    if (v >= d) return;
#pragma unroll 4
    for (int m = threadIdx.x / D * Pack<A>::size; m < SAMPLES; m += THREADS / D * Pack<A>::size) {
        const Pack<A> values = pack(tile + v * Shape::stride + m);
#pragma unroll
        for (int k = 0; k < Pack<A>::size; ++k) {
            const long long target = offsets.offset[m + k];
            if (target >= 0) assign(block.at(target, v), transform(values.at[k], v, offsets.inner[m + k]));
        }
    }
}
