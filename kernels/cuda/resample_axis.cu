// out[.., i, ..] = clip(sum over t of weights[t, i] * normalize(data[.., first[i] + t - offset, ..]))
//
// Bytes per voxel: sizeof(T) read for each input and 4 written for each output; a block also reads the inputs that its
// outputs share with the next block's: 9 % of all at 24 taps and 128 outputs of as many inputs, and these the L2 cache has.
//
// A block makes a run of outputs for 32 columns, after copying their inputs to shared memory, each once, normalised.
// Axis `a` is resampled, `b` numbers the columns, `o` is the third. Where `a` is x (LINES is 1), threads run along it as
// they read and write; else `b` is x, and they run along that.

const int COLUMNS = 32;
const int PITCH = COLUMNS + 1;  // in shared memory, so that rows and columns both lie in 32 banks

extern "C" __global__ void resample_axis(
    const T* data, Index in_c, Index in_a, Index in_b, Index in_o, float* out, Index out_c, Index out_a, Index out_b,
    Index out_o, Index n_out, Index n_b, Index n_o, Index start, Index offset, const int* first, const float* weights,
    Index rows_of_operator, Index taps, Index run, const float* normalization, const float* low, const float* high,
    Index limit_c, Index limit_a, Index limit_b, Index limit_o
) {
    SHARED_FLOATS(inputs);  // [inputs of the run][PITCH]
    int groups = (int)(n_b + COLUMNS - 1) / COLUMNS, runs = (int)((n_out + run - 1) / run);
    int block = blockIdx.x;
    int b0 = block % groups * COLUMNS, i0 = block / groups % runs * (int)run;
    int o = block / groups / runs % (int)n_o, c = block / groups / runs / (int)n_o;
    int columns = n_b - b0 < COLUMNS ? (int)n_b - b0 : COLUMNS;
    int outputs = n_out - i0 < run ? (int)n_out - i0 : (int)run;
    first += start + i0;
    weights += start + i0;
    int from = first[0], rows = first[outputs - 1] + (int)taps - from;
    const T* source = data + c * in_c + o * in_o + (from - offset) * in_a + b0 * in_b;
    int across = LINES ? rows : columns, down = LINES ? columns : rows;
    for (int d = threadIdx.y; d < down; d += blockDim.y)
        for (int e = threadIdx.x; e < across; e += blockDim.x) {
            int row = LINES ? e : d, column = LINES ? d : e;
            float value = to_float(source[row * in_a + column * in_b]);
            if (normalization) {
                const float* of_channel = normalization + 4 * c;  // least, greatest, shift, scale
                value = fminf(fmaxf(value, of_channel[0]), of_channel[1]);
                value = __fdiv_rn(__fsub_rn(value, of_channel[2]), of_channel[3]);
            }
            inputs[row * PITCH + column] = value;
        }
    __syncthreads();
    float* target = out + c * out_c + o * out_o + i0 * out_a + b0 * out_b;
    Index limit = c * limit_c + o * limit_o + i0 * limit_a + b0 * limit_b;
    across = LINES ? outputs : columns, down = LINES ? columns : outputs;
    for (int d = threadIdx.y; d < down; d += blockDim.y)
        for (int e = threadIdx.x; e < across; e += blockDim.x) {
            int i = LINES ? e : d, column = LINES ? d : e;
            const float* window = inputs + (first[i] - from) * PITCH + column;
            float total = 0;
            for (int t = 0; t < taps; t++) total = fmaf(weights[t * rows_of_operator + i], window[t * PITCH], total);
            if (low) {
                Index at = limit + i * limit_a + column * limit_b;
                total = fminf(fmaxf(total, low[at]), high[at]);
            }
            target[i * out_a + column * out_b] = total;
        }
}
