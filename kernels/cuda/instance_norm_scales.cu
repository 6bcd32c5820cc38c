// Second of three steps of an instance norm: from counts, means and squared distances of parts of an image to its mean and a
// scale.
//
// Sums are [image][part][3][channel], see the first step; an empty part is all zeros. `scales` is [image][2][channel]:
// (value - mean) * scale has mean 0 and variance 1 over the image, times `weight`. Means and squares are combined as Chan,
// Golub and LeVeque do (Algorithms for computing the sample variance, 1983), over all parts at once: the mean of means,
// then squares plus count * (mean of part - mean)^2. Bytes: 12 read per part and channel, which is little.
//
// A block makes some channels of an image, as many as fill the 32 bytes that memory gives at once. Its rows of threads
// share the parts, which they read from memory once, and then from the cache. Memory takes longest here, so a thread has
// several parts on their way, and the registers for them.

const int GROUP = 8, AT_ONCE = 8;

// Read parts of a channel, `step` apart; of those beyond the last one, counts and squares are 0.
__device__ inline void read_parts(
    const float* sums, Index first, Index step, Index parts, Index channels, float* counts, float* means, float* squares
) {
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
        Index part = first + k * step;
        const float* of_part = sums + (part < parts ? part : 0) * 3 * channels;
        counts[k] = of_part[0];
        means[k] = of_part[channels];
        squares[k] = of_part[2 * channels];
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++)
        if (first + k * step >= parts) counts[k] = squares[k] = 0;
}

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

extern "C" __global__ void __launch_bounds__(256, 1) instance_norm_scales(
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
    float counts[AT_ONCE], means[AT_ONCE], within[AT_ONCE];
    for (Index part = row; part < parts; part += AT_ONCE * rows) {
        read_parts(of_image, part, rows, parts, channels, counts, means, within);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            count += counts[k];
            distances += counts[k] * (means[k] - start);
            squares += within[k];
        }
    }
    count = over_rows(held, count);
    float mean = start + over_rows(held, distances) / count;
    for (Index part = row; part < parts; part += AT_ONCE * rows) {
        read_parts(of_image, part, rows, parts, channels, counts, means, within);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) squares += counts[k] * (means[k] - mean) * (means[k] - mean);
    }
    squares = over_rows(held, squares);
    if (row > 0 || place >= channels) return;
    scales[image * 2 * channels + channel] = mean;
    scales[(image * 2 + 1) * channels + channel] =
        (weight ? weight[channel] : 1.f) / sqrtf(squares / count + from_bits(epsilon));
}
