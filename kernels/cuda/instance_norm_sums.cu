// First of three steps of an instance norm: count, mean, and sum of squared distances from that mean, over a part of the
// voxels of an image, for each channel.
//
// Values are [image][voxel][channel]; sums are [image][part][3][channel]. What is added up are distances from the value in
// the middle of the part, so that squares lose nothing to a mean far from zero, and the mean of a channel that is constant
// is exact. Bytes: sizeof(T) read per value. That is the least possible.
//
// A block adds up one part. Each thread holds on to the same channels, a pack of them, of every so many voxels.

extern "C" __global__ void instance_norm_sums(
    const T* values, Index voxels, Index channels, Index parts, Index run, float* sums
) {
    const int WIDTH = 16 / sizeof(T);
    SHARED_FLOATS(held);  // [2][WIDTH][threads]
    int threads = (int)(blockDim.x * blockDim.y), thread = (int)(threadIdx.y * blockDim.x + threadIdx.x);
    int packs = (int)channels / WIDTH, lanes = packs < threads ? packs : threads, rows = threads / lanes;
    int lane = thread % lanes, row = thread / lanes;
    Index first = blockIdx.x % parts * run, last = first + run < voxels ? first + run : voxels;
    const Pack<T>* image = (const Pack<T>*)(values + blockIdx.x / parts * voxels * channels);
    const Pack<T>* middles = image + (first + last) / 2 * packs;
    float count = (float)(last - first);
    float* target = sums + blockIdx.x * 3 * channels;
    for (int base = 0; base < packs; base += lanes) {
        int pack = base + lane;
        float total[WIDTH] = {}, squares[WIDTH] = {};
        if (row < rows && pack < packs) {
            Pack<T> middle = middles[pack];
#pragma unroll 4
            for (Index voxel = first + row; voxel < last; voxel += rows) {
                Pack<T> now = image[voxel * packs + pack];
#pragma unroll
                for (int i = 0; i < WIDTH; i++) {
                    float distance = to_float(now.values[i]) - to_float(middle.values[i]);
                    total[i] += distance;
                    squares[i] = fmaf(distance, distance, squares[i]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            held[i * threads + thread] = total[i];
            held[(WIDTH + i) * threads + thread] = squares[i];
        }
        __syncthreads();
        int columns = packs - base < lanes ? packs - base : lanes;
        for (int i = thread; i < columns * WIDTH; i += threads) {
            const float* of_rows = held + i % WIDTH * threads + i / WIDTH;
            float sum = 0, square = 0;
            for (int r = 0; r < rows; r++, of_rows += lanes) {
                sum += of_rows[0];
                square += of_rows[WIDTH * threads];
            }
            int channel = base * WIDTH + i;
            float distance = sum / count, rest = square - sum * distance;
            target[channel] = count;
            target[channels + channel] = to_float(middles[base + i / WIDTH].values[i % WIDTH]) + distance;
            target[2 * channels + channel] = rest < 0 ? 0 : rest;  // what is not a number stays so
        }
        __syncthreads();
    }
}
