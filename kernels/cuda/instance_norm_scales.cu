// Second of three steps of an instance norm: from sums over parts of an image to its mean and a scale.
//
// `scales` is [image][2][channel]: (value - mean) * scale has mean 0 and variance 1 over the image, times `weight`.
// Bytes: 8 read per part and channel, which is little.
//
// A row of threads makes the channels of an image.

extern "C" __global__ void instance_norm_scales(
    const T* values, const float* sums, Index images, Index voxels, Index channels, Index parts, const float* weight,
    Index epsilon, float* scales
) {
    FOR_LINES(image, images) {
        for (int channel = threadIdx.x; channel < channels; channel += blockDim.x) {
            const float* of_parts = sums + image * parts * 2 * channels + channel;
            float total = 0, squares = 0;
            for (int part = 0; part < parts; part++, of_parts += 2 * channels) {
                total += of_parts[0];
                squares += of_parts[channels];
            }
            float distance = total / (float)voxels, variance = fmaxf(squares / (float)voxels - distance * distance, 0.f);
            float middle = to_float(values[(image * voxels + voxels / 2) * channels + channel]);
            scales[(image * 2 + 0) * channels + channel] = middle + distance;
            scales[(image * 2 + 1) * channels + channel] =
                (weight ? weight[channel] : 1.f) / sqrtf(variance + from_bits(epsilon));
        }
    }
}
