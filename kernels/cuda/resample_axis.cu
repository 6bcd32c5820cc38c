// out[.., i, ..] = clip(sum over t of weights[t, i] * normalize(data[.., first[i] + t - offset, ..]))
//
// Bytes per voxel: sizeof(T) read for each input and 4 written for each output; a block also reads the inputs that its
// outputs share with the next block's: half of all at 24 taps and 48 outputs of as many inputs, and these the L2 cache has.
//
// Axis `a` is resampled, `b` numbers the columns, `o` is the third. A block makes a run of outputs for COLUMNS columns, after
// copying their inputs to shared memory, each once, normalised. A thread makes OUTPUTS outputs, one after another along
// the axis, for ACROSS columns: it reads each input once for all of them, with as many weights. `bands` holds the weights
// that way: [outputs / OUTPUTS][band_rows][OUTPUTS], for the inputs from the first that any of these outputs takes, 0
// where an output takes none. Where `a` is x (LINES), threads run along it as they read and write, and along the columns
// in between; else `b` is x.

const int OUTPUTS = 8, ACROSS = 4, COLUMNS = 32 * ACROSS;
const int PITCH = COLUMNS + LINES;  // of inputs in shared memory: for LINES, rows and columns both lie in 32 banks
const int FINISHED_PITCH = 33;

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
#endif

// Copies rows of inputs to shared memory, and tells whether all are finite. A thread reads WIDTH neighbours at once, and
// AT_ONCE times as many before it needs the first.
template <int WIDTH, int AT_ONCE>
__device__ inline bool stage(
    const T* source, Index in_a, Index in_b, int rows, int columns, const float* of_channel, float* inputs
) {
    Normalization normalized = {};
    if (of_channel)
        normalized = {of_channel[0], of_channel[1], of_channel[2], of_channel[3], __fdiv_rn(1, of_channel[3])};
    int threads = (int)(blockDim.x * blockDim.y), thread = (int)(threadIdx.y * blockDim.x + threadIdx.x);
    int pieces = (LINES ? (rows + 31) / 32 * 32 : rows) * (COLUMNS / WIDTH);
    bool finite = true;
    for (int begin = thread; begin < pieces; begin += AT_ONCE * threads) {
        Neighbours<T, WIDTH> values[AT_ONCE] = {};
        int row[AT_ONCE], column[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            int piece = begin + k * threads;
            row[k] = LINES ? piece % 32 + piece / (32 * COLUMNS) * 32 : piece / (COLUMNS / WIDTH);
            column[k] = LINES ? piece / 32 % COLUMNS : piece % (COLUMNS / WIDTH) * WIDTH;
            if (row[k] < rows && column[k] < columns)
                values[k] = *(const Neighbours<T, WIDTH>*)(source + row[k] * in_a + column[k] * in_b);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (row[k] >= rows || column[k] >= columns) continue;
            Neighbours<float, WIDTH> made;
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                float value = to_float(values[k].values[i]);
                made.values[i] = of_channel ? normalized(value) : value;
                finite &= fabsf(made.values[i]) < __uint_as_float(0x7f800000u);
            }
            hold<WIDTH>(inputs + row[k] * PITCH + column[k], made);
        }
    }
    return finite;
}

// Adds rows of inputs to the outputs that take them. Where inputs are infinite or not numbers, CAREFUL keeps them from
// outputs that do not take them, since 0 times such an input is not 0.
template <bool CAREFUL>
__device__ inline void add(float (&totals)[OUTPUTS][ACROSS], const float* band, const float* inputs, int rows) {
#pragma unroll 1
    for (int row = 0; row < rows; row++) {
        Neighbours<float, 4> weights[OUTPUTS / 4];
        float values[ACROSS];
#pragma unroll
        for (int i = 0; i < OUTPUTS / 4; i++) weights[i] = ((const Neighbours<float, 4>*)(band + row * OUTPUTS))[i];
#pragma unroll
        for (int c = 0; c < ACROSS; c++) values[c] = inputs[row * PITCH + 32 * c];
#pragma unroll
        for (int i = 0; i < OUTPUTS; i++) {
            float weight = weights[i / 4].values[i % 4];
            if (CAREFUL && weight == 0) continue;
#pragma unroll
            for (int c = 0; c < ACROSS; c++) totals[i][c] = fmaf(weight, values[c], totals[i][c]);
        }
    }
}

__device__ inline float clipped(float value, const float* low, const float* high, Index at) {
    return fminf(fmaxf(value, low[at]), high[at]);
}

extern "C" __global__ void __launch_bounds__(256, 4) resample_axis(
    const T* data, Index in_c, Index in_a, Index in_b, Index in_o, float* out, Index out_c, Index out_a, Index out_b,
    Index out_o, Index n_out, Index n_b, Index n_o, Index start, Index offset, const int* first, Index taps,
    const float* bands, Index band_rows, Index run, Index rows_at_once, const float* normalization, const float* low,
    const float* high, Index limit_c, Index limit_a, Index limit_b, Index limit_o
) {
    SHARED_FLOATS(band);                               // [run / OUTPUTS][band_rows][OUTPUTS]
    float* inputs = band + run * band_rows;            // [rows_at_once][PITCH]
    float* finished = inputs + rows_at_once * PITCH;   // for LINES, [run][FINISHED_PITCH]
    int column_groups = ((int)n_b + COLUMNS - 1) / COLUMNS, runs = ((int)n_out + (int)run - 1) / (int)run;
    int block = blockIdx.x;
    int b0 = block % column_groups * COLUMNS, i0 = block / column_groups % runs * (int)run;
    int o = block / column_groups / runs % (int)n_o, c = block / column_groups / runs / (int)n_o;
    int columns = n_b - b0 < COLUMNS ? (int)n_b - b0 : COLUMNS;
    int outputs = n_out - i0 < run ? (int)n_out - i0 : (int)run, groups = (outputs + OUTPUTS - 1) / OUTPUTS;
    int width = (int)blockDim.x, height = (int)blockDim.y;
    first += start + i0;
    int from = first[0], rows = first[outputs - 1] + (int)taps - from, held = (int)rows_at_once;
    const T* source = data + c * in_c + o * in_o + (from - offset) * in_a + b0 * in_b;
    float* target = out + c * out_c + o * out_o + i0 * out_a + b0 * out_b;
    Index limit = c * limit_c + o * limit_o + i0 * limit_a + b0 * limit_b;
    const float* of_channel = normalization ? normalization + 4 * c : nullptr;
    bool aligned = !LINES && in_b == 1 && in_a % 4 == 0 && columns % 4 == 0 && (Index)source % (4 * sizeof(T)) == 0;

    const Neighbours<float, 4>* of_run = (const Neighbours<float, 4>*)(bands + (start + i0) / OUTPUTS * band_rows * OUTPUTS);
    for (int e = (int)threadIdx.y * width + (int)threadIdx.x; e < groups * (int)band_rows * OUTPUTS / 4; e += width * height)
        ((Neighbours<float, 4>*)band)[e] = of_run[e];

    // Each thread has at most one task in each round; a block of 32 x 8 threads has one round.
    int rounds_across = (32 + width - 1) / width, rounds = (groups + height - 1) / height * rounds_across;
    bool careful = false;
    for (int round = 0; round < rounds; round++) {
        int lane0 = round % rounds_across * width, lane = lane0 + (int)threadIdx.x;
        int group0 = round / rounds_across * height, i = (group0 + (int)threadIdx.y) * OUTPUTS;
        int count = outputs - i < OUTPUTS ? outputs - i : OUTPUTS;
        int begin = count > 0 ? first[i] - from : 0, end = count > 0 ? first[i + count - 1] + (int)taps - from : 0;
        if (round == 0 || held < rows) {
            if (round > 0) __syncthreads();
            int here = rows < held ? rows : held;
            bool finite = aligned ? stage<4, 6>(source, in_a, in_b, here, columns, of_channel, inputs)
                                  : stage<1, LINES ? 12 : 8>(source, in_a, in_b, here, columns, of_channel, inputs);
            careful = __syncthreads_or(!finite);
        }
        float totals[OUTPUTS][ACROSS] = {};
        for (int staged = 0;;) {
            int low_row = begin > staged ? begin : staged, high_row = end < staged + held ? end : staged + held;
            const float* of_group = band + (i / OUTPUTS * (int)band_rows + low_row - begin) * OUTPUTS;
            const float* at = inputs + (low_row - staged) * PITCH + lane;
            if (careful) add<true>(totals, of_group, at, high_row - low_row);
            else add<false>(totals, of_group, at, high_row - low_row);
            staged += held;
            if (staged >= rows) break;
            __syncthreads();
            int here = rows - staged < held ? rows - staged : held;
            careful = __syncthreads_or(
                !stage<1, 1>(source + staged * in_a, in_a, in_b, here, columns, of_channel, inputs));
        }
        if (LINES) {  // by way of shared memory, so that threads write along x
            int last = (group0 + height) * OUTPUTS < outputs ? (group0 + height) * OUTPUTS : outputs;
#pragma unroll
            for (int c = 0; c < ACROSS; c++) {
                __syncthreads();
#pragma unroll
                for (int r = 0; r < OUTPUTS; r++)
                    if (r < count) finished[(i + r) * FINISHED_PITCH + lane] = totals[r][c];
                __syncthreads();
                for (int d = lane0 + threadIdx.y; d < lane0 + width && d + 32 * c < columns; d += height)
                    for (int e = group0 * OUTPUTS + threadIdx.x; e < last; e += width) {
                        float value = finished[e * FINISHED_PITCH + d];
                        if (low) value = clipped(value, low, high, limit + e * limit_a + (d + 32 * c) * limit_b);
                        target[(d + 32 * c) * out_b + e] = value;
                    }
            }
        } else {
            float* place = target + i * out_a + lane;
            Index at = limit + i * limit_a + lane * limit_b;
#pragma unroll
            for (int r = 0; r < OUTPUTS; r++, place += out_a, at += limit_a) {
                if (r >= count) break;
#pragma unroll
                for (int c = 0; c < ACROSS; c++) {
                    if (lane + 32 * c >= columns) break;
                    place[32 * c] = low ? clipped(totals[r][c], low, high, at + 32 * c * limit_b) : totals[r][c];
                }
            }
        }
    }
}
