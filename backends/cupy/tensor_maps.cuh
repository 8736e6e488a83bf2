// Products of matrices with the samples of arrays, on tensor cores. Each warp loads, multiplies and stores samples of
// its own. Only the matrices are in shared memory.
//
// Include maps.cuh and tensor_cores.cuh before this file.

#include "words.cuh"

constexpr int WARP_SAMPLES = 32;  // each group of lanes loads 4 of them, and each member of a group stores 8

// Which variables a lane has. As many are adjacent as one instruction loads or stores.
template <int D> struct MapShape {
    static constexpr int columns = D / 4, rows = D / 8, width = rows < 4 ? rows : 4;

    // Returns the variable of an input, or of a matrix's column, that the same members of all groups have.
    static __device__ int column(int i) { return column(threadIdx.x % 4, i); }
    static __device__ int column(int member, int i) { return i / 4 * 16 + member * 4 + i % 4; }

    // Returns the variable of the output, or of a matrix's row, that the lanes of a group have.
    static __device__ int row(int i) { return row(threadIdx.x % 32 / 4, i); }
    static __device__ int row(int group, int i) { return i / width * (8 * width) + group * width + i % width; }
};

// A matrix in shared memory, in the order in which lanes read both parts of 4 numbers.
template <int D> struct TensorMatrix {
    using Shape = MapShape<D>;
    static constexpr int tiles = D / 8;  // of 8 columns
    static constexpr int size = D * D / 2;

    Words<4>* const memory;  // `size` of them

    __device__ void load(const float* matrix, long long row_stride, long long column_stride, int d) const {
        for (int i = threadIdx.x; i < D * D; i += THREADS) {
            const int k = i % 4, lane = i / 4 % 32, tile = i / 128;
            const int row = Shape::row(lane / 4, tile / tiles * 2 + k % 2);
            const int column = Shape::column(lane % 4, tile % tiles * 2 + k / 2);
            const bool exists = row < d && column < d;
            const Parts<2> parts(exists ? matrix[row * row_stride + column * column_stride] : 0.f);
            for (int part = 0; part < 2; ++part) memory[(tile * 2 + part) * 32 + lane].at[k] = parts.at[part];
        }
    }

    // Reads the numbers of 16 rows and 8 columns.
    __device__ void read(Parts<2> (&numbers)[4], int row_tile, int column_tile) const {
        const Words<4>* tile = memory + (row_tile * tiles + column_tile) * 64 + threadIdx.x % 32;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const Words<4> words = tile[part * 32];
#pragma unroll
            for (int k = 0; k < 4; ++k) numbers[k].at[part] = words.at[k];
        }
    }
};

// Whether one instruction moves four adjacent samples of a variable, or four adjacent variables of a sample.
struct Access {
    bool of_samples, of_variables;

    template <typename T>
    __device__ Access(const Block<T>& block, bool along_samples, int d, int length)
        : of_samples(along_samples && block.inner == 1 && length % 4 == 0 && fits_32_bits(block.variable) &&
                     is_aligned<4 * sizeof(T)>(block, block.variable)),
          of_variables(!along_samples && block.variable == 1 && d % 4 == 0 &&
                       is_aligned<4 * sizeof(T)>(block, block.inner)) {}
};

// Four adjacent samples of a lane's input variables.
template <typename T, int D> struct MapInput {
    using Shape = MapShape<D>;
    using Vector = Words<4 / per_word<T>>;

    Vector vectors[Shape::columns];     // as they were loaded
    float elements[Shape::columns][4];  // of each variable

    // Loads the samples from the cursor on, of which `left` exist. Others, and variables past d, are 0.
    __device__ void fetch(const Block<const T>& block, const Access& access, int d, int length, Cursor cursor,
                          int left) {
        if (access.of_samples) {
            const T* samples = &block.at(block.offset(cursor), 0);
            const int stride = block.variable;
#pragma unroll
            for (int i = 0; i < Shape::columns; ++i) {
                const int v = Shape::column(i);
                vectors[i] = {};
                if (left > 0 && v < d) vectors[i] = *reinterpret_cast<const Vector*>(samples + (long long)v * stride);
            }
        } else if (access.of_variables) {
#pragma unroll
            for (int e = 0; e < 4; ++e, cursor.increase(length)) {
                const T* sample = &block.at(block.offset(cursor), 0);
#pragma unroll
                for (int i = 0; i < Shape::columns; i += 4) {
                    const int v = Shape::column(i);
                    vectors[i + e] = {};
                    if (e < left && v < d) vectors[i + e] = *reinterpret_cast<const Vector*>(sample + v);
                }
            }
        } else {
            fetch_singly(block, d, length, cursor, left);
        }
    }

    // Sets the elements to what was loaded.
    __device__ void unpack(const Access& access) {
#pragma unroll
        for (int i = 0; i < Shape::columns; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                elements[i][e] = access.of_variables ? element_of<T>(vectors[i / 4 * 4 + e].at, i % 4)
                                                     : element_of<T>(vectors[i].at, e);
    }

    // Subtracts a number of each variable.
    __device__ void subtract(const float* centres) {
#pragma unroll
        for (int i = 0; i < Shape::columns; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) elements[i][e] -= centres[Shape::column(i)];
    }

  private:
    __device__ void fetch_singly(const Block<const T>& block, int d, int length, Cursor cursor, int left) {
        T elements[Shape::columns][4];
#pragma unroll
        for (int e = 0; e < 4; ++e, cursor.increase(length)) {
            const T* sample = &block.at(block.offset(cursor), 0);
#pragma unroll
            for (int i = 0; i < Shape::columns; ++i) {
                const int v = Shape::column(i);
                if (e < left && v < d)
                    elements[i][e] = sample[v * block.variable];
                else
                    assign(elements[i][e], 0.f);
            }
        }
#pragma unroll
        for (int i = 0; i < Shape::columns; ++i)
#pragma unroll
            for (int e = 0; e < 4; e += per_word<T>) vectors[i].at[e / per_word<T>] = word_of(elements[i] + e);
    }
};

// A lane's part of the output: eight adjacent samples of its rows.
template <int D> struct MapOutput {
    using Shape = MapShape<D>;

    float total[Shape::rows / 2][4][4] = {};

    // Returns the e-th sample of the i-th row.
    __device__ float& element(int i, int e) { return total[i / 2][e % 4][i % 2 * 2 + e / 4]; }

    // Adds a matrix times the input.
    template <typename T>
    __device__ __forceinline__ void add(const TensorMatrix<D>& matrix, const MapInput<T, D>& input) {
#pragma unroll
        for (int i = 0; i < Shape::columns; i += 2) {
            Number<T> right[4][2];
#pragma unroll
            for (int e = 0; e < 4; ++e)
#pragma unroll
                for (int k = 0; k < 2; ++k) right[e][k] = Number<T>(input.elements[i + k][e]);
#pragma unroll
            for (int rows = 0; rows < Shape::rows / 2; ++rows) {
                Parts<2> left[4];
                matrix.read(left, rows, i / 2);
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    if (sizeof(T) == 4)
                        add_rounded_product(total[rows][e], left, right[e]);
                    else
                        multiply_add(total[rows][e], left, right[e]);
            }
        }
    }

    // Stores the samples from the cursor on, of which `left` exist.
    template <typename T>
    __device__ void store(const Block<T>& block, const Access& access, int d, int length, Cursor cursor, int left) {
        if (access.of_samples) {
            const Cursor four(4, length);
            const int stride = block.variable;
#pragma unroll
            for (int e = 0; e < 8; e += 4, cursor.advance(four, length)) {
                T* samples = &block.at(block.offset(cursor), 0);
#pragma unroll
                for (int i = 0; i < Shape::rows; ++i)
                    if (e < left && Shape::row(i) < d)
                        store_vector<4>(samples + (long long)Shape::row(i) * stride, i, e, 0);
            }
            return;
        }
#pragma unroll
        for (int e = 0; e < 8; ++e, cursor.increase(length)) {
            T* sample = &block.at(block.offset(cursor), 0);
            if (e >= left) continue;
            if (access.of_variables) {
#pragma unroll
                for (int i = 0; i < Shape::rows; i += Shape::width)
                    if (Shape::row(i) < d) store_vector<Shape::width>(sample + Shape::row(i), i, e, 1);
            } else {
#pragma unroll
                for (int i = 0; i < Shape::rows; ++i)
                    if (Shape::row(i) < d) assign(sample[Shape::row(i) * block.variable], element(i, e));
            }
        }
    }

  private:
    // Stores adjacent rows, if `rows` is 1, or adjacent samples, if it is 0.
    template <int COUNT, typename T> __device__ void store_vector(T* to, int i, int e, int rows) {
        T elements[COUNT];
#pragma unroll
        for (int k = 0; k < COUNT; ++k) assign(elements[k], element(i + k * rows, e + k * (1 - rows)));
        Words<COUNT / per_word<T>> vector;
#pragma unroll
        for (int k = 0; k < COUNT; k += per_word<T>) vector.at[k / per_word<T>] = word_of(elements + k);
        store_words(reinterpret_cast<unsigned*>(to), vector.at);
    }
};
