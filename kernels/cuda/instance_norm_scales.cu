// Second of three steps of an instance norm: from counts, means and squared distances of parts of an image to its mean and a
// scale.
//
// Sums are [image][part][3][channel], see the first step; an empty part is all zeros. `scales` is [image][2][channel]:
// (value - mean) * scale has mean 0 and variance 1 over the image, times `weight`. Means and squares are combined as Chan,
// Golub and LeVeque do (Algorithms for computing the sample variance, 1983), over all parts at once: the mean of means,
// then squares plus count * (mean of part - mean)^2. Bytes: 12 read per part and channel, which is little.
//
// A block makes some channels of an image, as many as fill the 32 bytes that memory gives at once. Its rows of threads
// share the parts, which they read from memory once, and then from the cache.

const int GROUP = 8;

// Sum over the threads of a channel, for each of them.
__device__ inline float over_rows(float* held, float value) {
    int threads = (int)(blockDim.x * blockDim.y), thread = (int)(threadIdx.y * blockDim.x + threadIdx.x);
    held[thread] = value;
    __syncthreads();
    float sum = 0;
    for (int i = thread % GROUP; i < threads; i += GROUP) sum += held[i];
    __syncthreads();
    return sum;
}

extern "C" __global__ void instance_norm_scales(
    const float* sums, Index channels, Index parts, const float* weight, Index epsilon, float* scales
) {
    SHARED_FLOATS(held);  // [threads]
    int threads = (int)(blockDim.x * blockDim.y), thread = (int)(threadIdx.y * blockDim.x + threadIdx.x);
    int row = thread / GROUP, rows = threads / GROUP;
    Index groups = (channels + GROUP - 1) / GROUP, image = blockIdx.x / groups;
    Index place = blockIdx.x % groups * GROUP + thread % GROUP, channel = place < channels ? place : channels - 1;
    const float* of_image = sums + image * parts * 3 * channels + channel;
    // What is far from zero is added up as a distance from the first mean; of a channel that is constant that is zero.
    float start = of_image[channels], count = 0, distances = 0, squares = 0;
#pragma unroll 8
    for (Index part = row; part < parts; part += rows) {
        const float* of_part = of_image + part * 3 * channels;
        count += of_part[0];
        distances += of_part[0] * (of_part[channels] - start);
        squares += of_part[2 * channels];
    }
    count = over_rows(held, count);
    float mean = start + over_rows(held, distances) / count;
#pragma unroll 8
    for (Index part = row; part < parts; part += rows) {
        const float* of_part = of_image + part * 3 * channels;
        float distance = of_part[channels] - mean;
        squares += of_part[0] * distance * distance;
    }
    squares = over_rows(held, squares);
    if (row > 0 || place >= channels) return;
    scales[image * 2 * channels + channel] = mean;
    scales[(image * 2 + 1) * channels + channel] =
        (weight ? weight[channel] : 1.f) / sqrtf(squares / count + from_bits(epsilon));
}
