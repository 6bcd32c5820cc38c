// Third of three steps of an instance norm: (value - mean) * scale + bias, plus a residual, times `slope` where negative.
//
// The mean is taken away first: of a channel that is constant nothing but the bias is left, whatever its value was.
//
// Values and residual are [image][voxel][channel]; the result takes the place of the values, and is also written to
// `copy`, where there is one, whose voxels are `pitch` numbers apart. Bytes: sizeof(T) read per value, as much for a
// residual, and as much written for each place. That is the least possible.
//
// Blocks and threads share the work as in the first step. Registers are held down so that two blocks of 256 threads fit on
// a multiprocessor, with enough bytes on their way.

extern "C" __global__ void __launch_bounds__(256, 2) instance_norm_apply(
    T* values, Index voxels, Index channels, Index parts, Index run, const float* scales, const float* bias, Index slope,
    const T* residual, T* copy, Index pitch
) {
    const int WIDTH = 16 / sizeof(T), AT_ONCE = 3;
    int threads = (int)(blockDim.x * blockDim.y), thread = (int)(threadIdx.y * blockDim.x + threadIdx.x);
    int packs = (int)channels / WIDTH, lanes = packs < threads ? packs : threads, rows = threads / lanes;
    int lane = thread % lanes, row = thread / lanes;
    if (row >= rows) return;
    Index image = blockIdx.x / parts;
    Index first = blockIdx.x % parts * run, last = first + run < voxels ? first + run : voxels;
    Pack<T>* place = (Pack<T>*)(values + image * voxels * channels);
    const Pack<T>* added = (const Pack<T>*)(residual + image * voxels * channels);
    Pack<T>* other = (Pack<T>*)(copy + image * voxels * pitch);
    float damping = from_bits(slope);
    for (int pack = lane; pack < packs; pack += lanes) {
        float mean[WIDTH], scale[WIDTH], shift[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            mean[i] = scales[image * 2 * channels + pack * WIDTH + i];
            scale[i] = scales[image * 2 * channels + channels + pack * WIDTH + i];
            shift[i] = bias ? bias[pack * WIDTH + i] : 0;
        }
        for (Index begin = first + row; begin < last; begin += AT_ONCE * rows) {
            Pack<T> now[AT_ONCE], more[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                Index voxel = begin + k * rows;
                if (voxel < last) now[k] = place[voxel * packs + pack];
                if (voxel < last && residual) more[k] = added[voxel * packs + pack];
            }
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                Index voxel = begin + k * rows;
                if (voxel >= last) break;
#pragma unroll
                for (int i = 0; i < WIDTH; i++) {
                    float value = fmaf(to_float(now[k].values[i]) - mean[i], scale[i], shift[i]);
                    if (residual) value += to_float(more[k].values[i]);
                    store(&now[k].values[i], value > 0 ? value : damping * value);
                }
                place[voxel * packs + pack] = now[k];
                if (copy) other[voxel * (pitch / WIDTH) + pack] = now[k];
            }
        }
    }
}
