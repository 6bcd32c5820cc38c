// A transposed convolution of half numbers whose kernel equals its stride, on tensor cores, for few channels: one product of
// matrices, whose results go straight to where they lie in the finer grid.
//
// Values are [image][z][y][x][channel], and results [image][z * sz][y * sy][x * sx][output], with `pitch` numbers from voxel
// to voxel, of which `outputs` are written; channels and outputs are multiples of 32. In two dimensions z and sz are 1.
// `weights` are the second factors of all products in the order in which threads take them, see `factors_of_upsampling`.
// `bias` is added in float, and a result is rounded once.
//
// Bytes: each value is read once and each result written once, the least possible. What is read again, for the next 32
// results of a voxel, is in the L1 cache, or where `groups` blocks share the work of a voxel, in the L2 cache.
//
// A warp makes 32 results of 32 voxels at a time: two by four products of 16 x 16 by 16 x 8. The order of factors is free, so
// four threads read 32 channels of a voxel, each 16 bytes, as first factors for two products. The order of results is too, so
// the same four threads have 32 results of the voxel, each 16 bytes.

const int AT_ONCE = 32;

extern "C" __global__ void __launch_bounds__(128, 5) upsample(
    const T* values, Index of_voxels, Index of_y, Index of_x, Index of_channels, const T* weights, const float* bias,
    Index of_z_stride, Index of_y_stride, Index of_x_stride, Index of_outputs, Index of_groups, Index of_run, T* out,
    Index pitch
) {
    // The finer grid has fewer voxels than an int counts.
    int voxels = (int)of_voxels, ny = (int)of_y, nx = (int)of_x, steps = (int)of_channels / AT_ONCE;
    int sz = (int)of_z_stride, sy = (int)of_y_stride, sx = (int)of_x_stride, outputs = (int)of_outputs;
    int groups = (int)of_groups, run = (int)of_run;
    int line = threadIdx.x / 4, pack = threadIdx.x % 4;  // of 8 voxels, and of 4 times 8 channels, those that a thread has
    int first = ((int)blockIdx.x / groups * (int)blockDim.y + (int)threadIdx.y) * AT_ONCE + line;
    int chunk = (int)blockIdx.x % groups * run, chunks = sz * sy * sx * outputs / AT_ONCE;
    int last = chunk + run < chunks ? chunk + run : chunks, places[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int voxel = first + 8 * i, along_y = voxel / nx, plane = along_y / ny;
        places[i] = (plane * sz * ny + along_y % ny) * sy * nx * sx + voxel % nx * sx;
    }
    int apart = 8 * 4 * steps;  // packs from a thread's voxel to its next
    const Pairs* source = (const Pairs*)values + (Index)first * steps * 4 + pack;
    const Pairs* factors = (const Pairs*)weights + (Index)chunk * steps * 128 + threadIdx.x;
#pragma unroll 1
    for (; chunk < last; chunk++) {
        float sum[2][4][4] = {};
#pragma unroll 1
        for (int step = 0; step < steps; step++, factors += 128) {
            Pairs now[4] = {};
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (first + 8 * i < voxels) now[i] = source[i * apart];
            source += 4;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                Pairs factor = factors[j * 32];
#pragma unroll
                for (int k = 0; k < 4; k += 2)
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        const unsigned *upper = now[2 * m].values + k, *lower = now[2 * m + 1].values + k;
                        unsigned a[4] = {upper[0], lower[0], upper[1], lower[1]};
                        multiply_add(sum[m][j], a, factor.values + k, T());
                    }
            }
        }
        source -= 4 * steps;
        int place = chunk * AT_ONCE / outputs, output = chunk * AT_ONCE % outputs + pack * 8;
        int further = (place / (sy * sx) * ny * sy + place / sx % sy) * nx * sx + place % sx;
        Pack<float> added[2] = {};
        if (bias)
            for (int h = 0; h < 2; h++) added[h] = ((const Pack<float>*)(bias + output))[h];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (first + 8 * i >= voxels) continue;
            Pairs made;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float *both = sum[i / 2][j] + i % 2 * 2, *more = added[j / 2].values + j % 2 * 2;
                made.values[j] = paired(both[0] + more[0], both[1] + more[1], T());
            }
            *(Pairs*)(out + (Index)(places[i] + further) * pitch + output) = made;
        }
    }
}
