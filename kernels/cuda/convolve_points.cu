// A convolution of one voxel, from 32 channels to at most 16 outputs, with a bias, after the norm of its input: the last
// one of a network.
//
// Values are [image][voxel][pitch], channels side by side, of which 32 are read; `scales`, `norm_bias`, `slope` and
// `weights` are as in convolve.cu. Outputs are [image][channel][voxel].
//
// Bytes: sizeof(T) read per value and written per output. That is the least possible.
//
// A warp makes 32 voxels on tensor cores: 16 outputs x 16 channels by 16 x 8 voxels at a time. In the products' order of
// channels a thread has the eight that it reads in one piece, and in their order of voxels, column 2 t + e of product j is
// voxel 8 t + 2 j + e, so that it ends with eight neighbours, which it writes in one piece.

const int CHANNELS = 32, VOXELS = 32;

// The factors of a thread for a step s of 16 channels, of an output: pairs of the channels 8 t + 4 s + {0, 1} and + {2, 3}.
__device__ inline void take_factors(unsigned* pairs, const unsigned* weights, int output, int s) {
    int t = threadIdx.x % 4, of_eight = output % 8;
    for (int h = 0; h < 2; h++) {
        int thread = (output / 8 * 2 + of_eight % 2) * 4 + 2 * s + h, pack = (t / 2 * 2 + of_eight / 4) * 32 + thread;
        pairs[2 * h] = weights[pack * 4 + of_eight / 2 % 2 * 2 + t % 2];
    }
}

extern "C" __global__ void __launch_bounds__(128, 5) convolve_points(
    const T* values, Index of_pitch, Index voxels, const unsigned* weights, const float* scales, const float* norm_bias,
    Index slope, Index of_blocks, T* out, Index of_outputs, const float* bias
) {
    int pitch = (int)of_pitch, outputs = (int)of_outputs, blocks = (int)of_blocks;
    int line = threadIdx.x / 4, t = threadIdx.x % 4, image = blockIdx.x / blocks;
    float damping = from_bits(slope);
    Pack<float> means[2], factors[2], added[2] = {};
    if (scales)
        for (int h = 0; h < 2; h++) {
            means[h] = ((const Pack<float>*)(scales + image * 2 * CHANNELS))[t * 2 + h];
            factors[h] = ((const Pack<float>*)(scales + (image * 2 + 1) * CHANNELS))[t * 2 + h];
            if (norm_bias) added[h] = ((const Pack<float>*)norm_bias)[t * 2 + h];
        }
    unsigned a[2][4];
    for (int s = 0; s < 2; s++)
        for (int r = 0; r < 2; r++) take_factors(a[s] + r, weights, line + 8 * r, s);
    Index first = ((Index)(blockIdx.x % blocks) * blockDim.y + threadIdx.y) * VOXELS;
    for (Index voxel = first; voxel < voxels; voxel += (Index)blocks * blockDim.y * VOXELS) {
        int left = voxels - voxel < VOXELS ? (int)(voxels - voxel) : VOXELS;
        const T* source = values + (image * voxels + voxel) * pitch + t * 8;
        Pairs now[4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int place = line / 2 * 8 + 2 * j + line % 2;
            if (place < left) now[j] = *(const Pairs*)(source + place * pitch);
        }
        float sums[4][4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (scales) normalize(now[j], means, factors, added, damping, T());
#pragma unroll
            for (int s = 0; s < 2; s++) multiply_add(sums[j], a[s], now[j].values + 2 * s, T());
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int output = line + 8 * r;
            if (output >= outputs) break;
            float more = bias[output];
            T* target = out + ((Index)image * outputs + output) * voxels + voxel + t * 8;
            if (voxels % 8 == 0) {
                Pairs made;
#pragma unroll
                for (int j = 0; j < 4; j++)
                    made.values[j] = paired(sums[j][2 * r] + more, sums[j][2 * r + 1] + more, T());
                if (t * 8 < left) *(Pairs*)target = made;
                continue;
            }
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (t * 8 + i < left) store(target + i, sums[i / 2][2 * r + i % 2] + more);
        }
    }
}
