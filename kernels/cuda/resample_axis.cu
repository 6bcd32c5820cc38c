// out[.., i, ..] = clip(sum over t of weights[t, i] * normalize(data[.., first[i] + t - offset, ..]))
//
// Bytes per voxel: sizeof(T) read for each input and 4 written for each output; a block also reads the inputs that its
// outputs share with the next block's: a quarter of all at 24 taps and 96 outputs of as many inputs, and these the L2 cache
// has.
//
// Axis `a` is resampled, `b` numbers the columns, `o` is the third. Where `a` is x (LINES), columns are lines, else `b` is
// x. A block makes a run of outputs for COLUMNS columns, after copying their inputs to shared memory, each once, and
// normalised.
//
// A warp makes OUTPUTS outputs of 8 * PRODUCTS columns, as products of a band of weights by inputs: on tensor cores 16 x 8
// by 8 x 8 at a time. Their factors are TF32, with 11 bits, so a float is the sum of two, and of the four products of these
// the three that count are added in float. `bands` is [outputs / OUTPUTS][steps][2][32][4]: upper and lower halves of the
// weights as a thread takes them for STEP inputs, from the first that any of these outputs takes, 0 where an output takes
// none.

const int OUTPUTS = 16, STEP = 8, PRODUCTS = 4, COLUMNS = 64, PARTS = COLUMNS / (8 * PRODUCTS);
const int AT_ONCE = 6;

// (x - shift) / scale of x between two bounds. The quotient is made from the reciprocal, and mended by what is left.
struct Normalization {
    float least, greatest, shift, scale, reciprocal;

    __device__ float operator()(float value) const {
        value = __fsub_rn(fminf(fmaxf(value, least), greatest), shift);
        float quotient = __fmul_rn(value, reciprocal);
        float mended = fmaf(fmaf(-quotient, scale, value), reciprocal, quotient);
        return fabsf(quotient) < __uint_as_float(0x7f800000u) ? mended : quotient;
    }
};

template <int WIDTH>
__device__ inline void hold(float* place, Neighbours<float, WIDTH> values) {
    *(Neighbours<float, WIDTH>*)place = values;
}
#ifndef ON_HOST
// The compiler makes four stores of it.
template <>
__device__ inline void hold<4>(float* place, Neighbours<float, 4> values) {
    asm volatile("{ .reg .u64 a; cvta.to.shared.u64 a, %0; st.shared.v4.f32 [a], {%1, %2, %3, %4}; }"
                 : : "l"(place), "f"(values.values[0]), "f"(values.values[1]), "f"(values.values[2]),
                 "f"(values.values[3]) : "memory");
}

// Up to four floats to shared memory, and zeros for the rest of four, without a thread's waiting for them.
__device__ inline void copy(float* place, const float* source, int numbers) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 : : "r"((unsigned)__cvta_generic_to_shared(place)), "l"(source), "r"(4 * numbers) : "memory");
#else
    for (int i = 0; i < 4; i++) place[i] = i < numbers ? source[i] : 0;
#endif
}
__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" : : : "memory");
#endif
}

// c += a b, of 16 x 8 by 8 x 8, each spread over a warp.
__device__ inline void multiply_add(float* c, const unsigned* a, const unsigned* b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
#endif

#if defined(ON_HOST) || __CUDA_ARCH__ >= 800
const bool TENSOR_CORES = true;
#else
const bool TENSOR_CORES = false;
#endif

struct alignas(16) Weights {  // of the outputs line and line + 8, for the inputs quarter, and then quarter + 4
    unsigned bits[4];
};

// Inputs of a block in shared memory, `across` and `along` numbers from column to column and from one to the next.
struct Held {
    const float* inputs;
    int along, across;

    __device__ float operator()(int row, int column) const { return inputs[row * along + column * across]; }
};

// Copies `padded` rows of inputs to shared memory, of which those before `rows` exist; the others are 0. A thread reads
// WIDTH neighbours at once, and MANY times as many before it needs the first.
template <int WIDTH, int MANY>
__device__ inline void stage(
    const T* source, Index in_a, Index in_b, int rows, int padded, int columns, const float* of_channel, float* inputs,
    int pitch
) {
    Normalization normalized = {};
    if (of_channel)
        normalized = {of_channel[0], of_channel[1], of_channel[2], of_channel[3], __fdiv_rn(1, of_channel[3])};
    int threads = (int)(blockDim.x * blockDim.y), thread = (int)(threadIdx.y * blockDim.x + threadIdx.x);
    int pieces = (LINES ? (padded + 31) / 32 * 32 : padded) * (COLUMNS / WIDTH);
    for (int begin = thread; begin < pieces; begin += MANY * threads) {
        Neighbours<T, WIDTH> values[MANY] = {};
        int row[MANY], column[MANY];
#pragma unroll
        for (int k = 0; k < MANY; k++) {
            int piece = begin + k * threads;
            row[k] = LINES ? piece % 32 + piece / (32 * COLUMNS) * 32 : piece / (COLUMNS / WIDTH);
            column[k] = LINES ? piece / 32 % COLUMNS : piece % (COLUMNS / WIDTH) * WIDTH;
            if (row[k] < rows && column[k] < columns)
                values[k] = *(const Neighbours<T, WIDTH>*)(source + row[k] * in_a + column[k] * in_b);
        }
#pragma unroll
        for (int k = 0; k < MANY; k++) {
            if (row[k] >= padded || column[k] >= COLUMNS) continue;
            bool exists = row[k] < rows && column[k] < columns;
            Neighbours<float, WIDTH> made;
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                float value = to_float(values[k].values[i]);
                made.values[i] = of_channel && exists ? normalized(value) : value;
            }
            hold<WIDTH>(inputs + (LINES ? column[k] * pitch + row[k] : row[k] * pitch + column[k]), made);
        }
    }
}

// The same of floats that need no work and lie at multiples of four.
__device__ inline void copy_all(
    const float* source, Index in_a, Index in_b, int rows, int padded, int columns, float* inputs, int pitch
) {
    int threads = (int)(blockDim.x * blockDim.y), thread = (int)(threadIdx.y * blockDim.x + threadIdx.x);
    int pieces = LINES ? (padded + 31) / 32 * 8 * COLUMNS : padded * (COLUMNS / 4);
    for (int piece = thread; piece < pieces; piece += threads) {
        int row = LINES ? (piece % 8 + piece / (8 * COLUMNS) * 8) * 4 : piece / (COLUMNS / 4);
        int column = LINES ? piece / 8 % COLUMNS : piece % (COLUMNS / 4) * 4;
        int left = LINES ? rows - row : columns - column;
        if (row >= padded) continue;
        bool some = row < rows && column < columns;
        copy(inputs + (LINES ? column * pitch + row : row * pitch + column),
             some ? source + row * in_a + column * in_b : source, !some ? 0 : left < 4 ? left : 4);
    }
    wait_for_copies();
}

// Adds the products of some steps of weights by inputs, from a row and a column of these.
__device__ inline void add(
    float (&totals)[PRODUCTS][4], const Weights* weights, Held held, int row, int column, int steps
) {
    int line = threadIdx.x / 4, quarter = threadIdx.x % 4;
#pragma unroll 2
    for (int step = 0; step < steps; step++, weights += 64, row += STEP) {
        Weights upper = weights[threadIdx.x], lower = weights[32 + threadIdx.x];
        unsigned high[PRODUCTS][2], low[PRODUCTS][2];
#pragma unroll
        for (int n = 0; n < PRODUCTS; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float value = held(row + quarter + 4 * h, column + n * 8 + line);
                high[n][h] = __float_as_uint(value) & 0xffffe000u;
                low[n][h] = __float_as_uint(__fsub_rn(value, __uint_as_float(high[n][h])));
            }
        // The small products first; those that follow each other do not wait for each other's sums.
#pragma unroll
        for (int n = 0; n < PRODUCTS; n++) multiply_add(totals[n], upper.bits, low[n]);
#pragma unroll
        for (int n = 0; n < PRODUCTS; n++) multiply_add(totals[n], lower.bits, high[n]);
#pragma unroll
        for (int n = 0; n < PRODUCTS; n++) multiply_add(totals[n], upper.bits, high[n]);
    }
}

// The same without tensor cores, each thread for itself, for the inputs [from, to) of a band whose first is in `row`. Where
// inputs are infinite or not numbers, this keeps them from outputs that do not take them, since 0 times such an input is
// not 0.
__device__ inline void add_carefully(
    float (&totals)[PRODUCTS][4], const Weights* weights, Held held, int row, int from, int to, int column
) {
    int line = threadIdx.x / 4, quarter = threadIdx.x % 4;
#pragma unroll 1
    for (int k = from; k < to; k++) {
        const Weights* of_step = weights + k / STEP * 64 + line * 4 + k % 4;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int at = e / 2 + k % STEP / 4 * 2;
            float weight = __uint_as_float(of_step[0].bits[at]) + __uint_as_float(of_step[32].bits[at]);
            if (weight == 0) continue;
#pragma unroll
            for (int n = 0; n < PRODUCTS; n++)
                totals[n][e] = fmaf(weight, held(row + k, column + n * 8 + quarter * 2 + e % 2), totals[n][e]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(192, 4) resample_axis(
    const T* data, Index in_c, Index in_a, Index in_b, Index in_o, float* out, Index out_c, Index out_a, Index out_b,
    Index out_o, Index n_out, Index n_b, Index n_o, Index start, Index offset, const int* first, Index taps,
    const Weights* bands, Index of_steps, Index of_run, Index rows_at_once, Index of_pitch, const float* normalization,
    const float* low, const float* high, Index limit_c, Index limit_a, Index limit_b, Index limit_o
) {
    SHARED_FLOATS(inputs);  // [rows_at_once][pitch], or for LINES [COLUMNS][pitch]
    int run = (int)of_run, pitch = (int)of_pitch, most = (int)rows_at_once;
    int column_groups = ((int)n_b + COLUMNS - 1) / COLUMNS, runs = ((int)n_out + run - 1) / run, block = blockIdx.x;
    int b0 = block % column_groups * COLUMNS, i0 = block / column_groups % runs * run;
    int o = block / column_groups / runs % (int)n_o, c = block / column_groups / runs / (int)n_o;
    int columns = n_b - b0 < COLUMNS ? (int)n_b - b0 : COLUMNS, outputs = n_out - i0 < run ? (int)n_out - i0 : run;
    first += start + i0;
    int from = first[0], stop = first[outputs - 1] + (int)taps;
    const T* source = data + c * in_c + o * in_o + (from - offset) * in_a + b0 * in_b;
    float* target = out + c * out_c + o * out_o + i0 * out_a + b0 * out_b;
    Index limit = c * limit_c + o * limit_o + i0 * limit_a + b0 * limit_b;
    const float* of_channel = normalization ? normalization + 4 * c : nullptr;
    // What lies side by side is read four at a time, where fours lie at multiples of their size.
    bool aligned = (LINES ? in_a : in_b) == 1 && (LINES ? in_b : in_a) % 4 == 0;
    bool plain = aligned && sizeof(T) == 4 && !of_channel;
    if (LINES && plain) {
        int before = (int)((Index)source / (Index)sizeof(T) % 4);
        source -= before, from -= before;
    }
    aligned = aligned && !LINES && columns % 4 == 0 && (Index)source % (4 * sizeof(T)) == 0;
    plain = plain && (Index)source % 16 == 0;
    int rows = stop - from;
    bool pairs = !LINES && out_a % 2 == 0 && columns % 2 == 0 && (Index)target % 8 == 0;
    Held held = {inputs, LINES ? 1 : pitch, LINES ? pitch : 1};
    int line = threadIdx.x / 4, quarter = threadIdx.x % 4, warps = (int)blockDim.y;
    int tasks = (outputs + OUTPUTS - 1) / OUTPUTS * PARTS;
    bool whole = rows + STEP - 1 <= most;
    for (int task0 = 0; task0 < tasks; task0 += warps) {
        int task = task0 + (int)threadIdx.y, i = task / PARTS * OUTPUTS, column0 = task % PARTS * 8 * PRODUCTS;
        int count = task >= tasks || column0 >= columns ? 0 : outputs - i < OUTPUTS ? outputs - i : OUTPUTS;
        int begin = count ? first[i] - from : 0, end = count ? first[i + count - 1] + (int)taps - from : 0;
        const Weights* weights = bands + ((start + i0 + i) / OUTPUTS * of_steps) * 64;
        float totals[PRODUCTS][4] = {};
        for (int staged = 0; staged < rows; staged += most) {
            if (task0 == 0 || !whole) {
                __syncthreads();
                int padded = whole ? rows + STEP - 1 : most, left = rows - staged;
                const T* at = source + staged * in_a;
                if (plain) copy_all((const float*)at, in_a, in_b, left, padded, columns, inputs, pitch);
                else if (aligned) stage<4, AT_ONCE>(at, in_a, in_b, left, padded, columns, of_channel, inputs, pitch);
                else stage<1, LINES ? 4 : 8>(at, in_a, in_b, left, padded, columns, of_channel, inputs, pitch);
                __syncthreads();
            }
            bool careful = !TENSOR_CORES || !whole;
            if (!careful) {
                add(totals, weights, held, begin, column0, (end - begin + STEP - 1) / STEP);
                float spoilt = 0;
#pragma unroll
                for (int n = 0; n < PRODUCTS; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) spoilt = fmaf(totals[n][e], 0, spoilt);
                careful = spoilt != 0;
            }
            if (careful) {
                if (whole)
#pragma unroll
                    for (int n = 0; n < PRODUCTS; n++)
#pragma unroll
                        for (int e = 0; e < 4; e++) totals[n][e] = 0;
                int low_row = begin > staged ? begin : staged, high_row = end < staged + most ? end : staged + most;
                add_carefully(totals, weights, held, begin - staged, low_row - begin, high_row - begin, column0);
            }
        }
#pragma unroll
        for (int n = 0; n < PRODUCTS; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int made = i + line + 8 * h, column = column0 + n * 8 + quarter * 2;
                if (line + 8 * h >= count || column >= columns) continue;
                float* place = target + made * out_a + column * out_b;
                Neighbours<float, 2> both = {{totals[n][2 * h], totals[n][2 * h + 1]}};
                bool second = column + 1 < columns;
                if (low)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        Index at = limit + made * limit_a + (column + (second ? e : 0)) * limit_b;
                        both.values[e] = fminf(fmaxf(both.values[e], low[at]), high[at]);
                    }
                if (pairs) *(Neighbours<float, 2>*)place = both;
                else {
                    place[0] = both.values[0];
                    if (second) place[out_b] = both.values[1];
                }
            }
    }
}
