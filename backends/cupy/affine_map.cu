// Sum of matrix (array - centre) over one or two arrays, plus bias: every array is read once, the result written once.

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

// An array's tile, less the centre, to shared memory, a row for every variable.
template <typename T, int D, typename A>
__device__ void load(A* tile, long long* offsets, const Block<const T>& block, const Cursor& sample, bool there,
                     bool along_samples, const A* centre, int d) {
    using Shape = Tile<A, D>;
    const long long own = there ? block.offset(sample) : -1;
    if (along_samples) {
        constexpr int count = D < BATCH ? D : BATCH;
        for (int first = 0; first < d; first += count) {  // beyond d are zeros, which nothing reads
            A batch[count];
#pragma unroll
            for (int k = 0; k < count; ++k)
                batch[k] = there && first + k < d ? A(value(block.at(own, first + k))) : centre[first + k];
#pragma unroll
            for (int k = 0; k < count; ++k)
                tile[(first + k) * Shape::stride + threadIdx.x] = batch[k] - centre[first + k];
        }
        return;
    }
    offsets[threadIdx.x] = own;
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
                const long long offset = offsets[first + i * step + k];
                batch[i].at[k] = offset >= 0 && v < d ? A(value(block.at(offset, v))) : middle;
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

// The result's tile to memory.
template <typename T, int D, typename A>
__device__ void store(const A* tile, long long* offsets, const Block<T>& block, const Cursor& sample, bool there,
                      bool along_samples, int d) {
    using Shape = Tile<A, D>;
    const long long own = there ? block.offset(sample) : -1;
    if (along_samples) {
        if (!there) return;
#pragma unroll 8
        for (int v = 0; v < d; ++v) assign(block.at(own, v), tile[v * Shape::stride + threadIdx.x]);
        return;
    }
    offsets[threadIdx.x] = own;
    __syncthreads();
    const int v = threadIdx.x % D;
    if (v >= d) return;
#pragma unroll 4
    for (int m = threadIdx.x / D * Pack<A>::size; m < SAMPLES; m += THREADS / D * Pack<A>::size) {
        const Pack<A> values = pack(tile + v * Shape::stride + m);
#pragma unroll
        for (int k = 0; k < Pack<A>::size; ++k) {
            const long long offset = offsets[m + k];
            if (offset >= 0) assign(block.at(offset, v), values.at[k]);
        }
    }
}

// A program takes every so many of a block's tiles, so that it loads the matrices once. `x2` and `bias` may be null.
template <typename T1, typename T2, typename TY, int D>
__global__ void __launch_bounds__(THREADS, sizeof(accumulator<T1>) == 4 ? 3 : 1)
    affine_map(const T1* x1, long long x1_block, long long x1_outer, long long x1_variable, long long x1_inner,
               long long x1_along_samples, const accumulator<T1>* matrix1, long long matrix1_block,
               long long matrix1_row, long long matrix1_column, const accumulator<T1>* centre1,
               const T2* x2, long long x2_block, long long x2_outer, long long x2_variable, long long x2_inner,
               long long x2_along_samples, const accumulator<T1>* matrix2, long long matrix2_block,
               long long matrix2_row, long long matrix2_column, const accumulator<T1>* centre2,
               TY* y, long long y_block, long long y_outer, long long y_variable, long long y_inner,
               long long y_along_samples, const accumulator<T1>* bias, long long size,
               long long inner, long long count, long long programs) {
    using A = accumulator<T1>;
    using Shape = Tile<A, D>;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    A* tile = reinterpret_cast<A*>(shared_memory);
    A* first_matrix = tile + D * Shape::stride;
    A* second_matrix = first_matrix + D * Shape::matrix_stride;
    __shared__ A centres[2][D], start[D];
    __shared__ long long offsets[SAMPLES];

    const int d = size, thread = threadIdx.x;
    const long long index = blockIdx.x / programs, program = blockIdx.x % programs;
    const Block<const T1> in1(x1, x1_block, x1_outer, x1_variable, x1_inner, index);
    const Block<const T2> in2(x2, x2_block, x2_outer, x2_variable, x2_inner, index);
    const Block<TY> out(y, y_block, y_outer, y_variable, y_inner, index);

    load_matrix<A, D>(first_matrix, matrix1 + index * matrix1_block, matrix1_row, matrix1_column, d);
    if (x2) load_matrix<A, D>(second_matrix, matrix2 + index * matrix2_block, matrix2_row, matrix2_column, d);
    if (thread < D) {
        centres[0][thread] = thread < d ? centre1[index * d + thread] : A(0);
        centres[1][thread] = thread < d && x2 ? centre2[index * d + thread] : A(0);
        start[thread] = thread < d && bias ? bias[index * d + thread] : A(0);
    }

    constexpr int across = SAMPLES / Shape::columns;
    const int row = thread / across, column = thread % across;
    const int tiles = (count + SAMPLES - 1) / SAMPLES;
    Cursor sample(program * SAMPLES + thread, inner);
    const Cursor step(programs * SAMPLES, inner);
    for (int number = program; number < tiles; number += programs) {
        const bool there = number * SAMPLES + thread < count;
        __syncthreads();
        load<T1, D>(tile, offsets, in1, sample, there, x1_along_samples, centres[0], d);
        __syncthreads();
        A total[Shape::rows][Shape::columns];
#pragma unroll
        for (int i = 0; i < Shape::rows; ++i)
#pragma unroll
            for (int j = 0; j < Shape::columns; ++j) total[i][j] = start[Shape::template place<D, Shape::rows>(row, i)];
        multiply<A, D>(total, first_matrix, tile, d);
        __syncthreads();
        if (x2) {
            load<T2, D>(tile, offsets, in2, sample, there, x2_along_samples, centres[1], d);
            __syncthreads();
            multiply<A, D>(total, second_matrix, tile, d);
            __syncthreads();
        }
        // through shared memory, so that neighbouring threads write to neighbouring places
#pragma unroll
        for (int i = 0; i < Shape::rows; ++i)
#pragma unroll
            for (int j = 0; j < Shape::columns; ++j)
                tile[Shape::template place<D, Shape::rows>(row, i) * Shape::stride +
                     Shape::template place<SAMPLES, Shape::columns>(column, j)] = total[i][j];
        __syncthreads();
        store<TY, D>(tile, offsets, out, sample, there, y_along_samples, d);
        sample.advance(step, inner);
    }
}
