// First of three steps of an instance norm: sums of each channel, and of its squares, over a part of the voxels of an image.
//
// Values are [image][voxel][channel]; sums are [image][part][2][channel], of distances from the value in the middle of the
// image, so that squares lose nothing to a mean far from zero. Bytes: sizeof(T) read per value. That is the least possible.
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
    float* target = sums + blockIdx.x * 2 * channels;
    for (int base = 0; base < packs; base += lanes) {
        int pack = base + lane;
        float total[WIDTH] = {}, squares[WIDTH] = {};
        if (row < rows && pack < packs) {
            Pack<T> middle = image[voxels / 2 * packs + pack];
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
        for (int i = thread; i < 2 * columns * WIDTH; i += threads) {
            int which = i / (columns * WIDTH), channel = i % (columns * WIDTH);
            const float* of_rows = held + (which * WIDTH + channel % WIDTH) * threads + channel / WIDTH;
            float sum = 0;
            for (int r = 0; r < rows; r++) sum += of_rows[r * lanes];
            target[which * channels + base * WIDTH + channel] = sum;
        }
        __syncthreads();
    }
}
