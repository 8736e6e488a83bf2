// The sum of matrix (array - centre) over one or two arrays, plus bias. Every array is read once.

#include "maps.cuh"

// Several thread blocks, called parts, share the tiles of a block: part p takes tiles p, p + num_parts, and so on, and
// loads the matrices once. `x2` and `bias` may be null.
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
               long long inner, long long count, long long num_parts) {
    using A = accumulator<T1>;
    using Shape = Tile<A, D>;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    A* tile = reinterpret_cast<A*>(shared_memory);
    A* first_matrix = tile + D * Shape::stride;
    A* second_matrix = first_matrix + D * Shape::matrix_stride;
    __shared__ A centres[2][D], start[D];
    __shared__ SampleOffsets offsets;

    const int d = size, thread = threadIdx.x;
    const long long index = blockIdx.x / num_parts, part = blockIdx.x % num_parts;
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

    const int tiles = (count + SAMPLES - 1) / SAMPLES;
    Cursor sample(part * SAMPLES + thread, inner);
    const Cursor step(num_parts * SAMPLES, inner);
    for (int tile_index = part; tile_index < tiles; tile_index += num_parts) {
        const bool in_range = tile_index * SAMPLES + thread < count;
        __syncthreads();
        load<T1, D>(tile, offsets, in1, sample, in_range, x1_along_samples, centres[0], d);
        __syncthreads();
        A total[Shape::rows][Shape::columns];
        initialize<A, D>(total, start);
        multiply<A, D>(total, first_matrix, tile, d);
        __syncthreads();
        if (x2) {
            load<T2, D>(tile, offsets, in2, sample, in_range, x2_along_samples, centres[1], d);
            __syncthreads();
            multiply<A, D>(total, second_matrix, tile, d);
            __syncthreads();
        }
        write_tile<A, D>(tile, total);
        __syncthreads();
        store<TY, D>(tile, offsets, out, sample, in_range, y_along_samples, d);
        sample.advance(step, inner);
    }
}
