// A convolution with stride 1 of half numbers on tensor cores, for few channels: 32 outputs at a time. It takes what the norm of
// its input needs, and leaves the statistics that the norm of its output needs, so that no norm is a pass of its own.
//
// Values are [image][voxel][pitch], channels side by side, of which `channels`, a multiple of 32, are read; with LINES they are
// [image][channel][voxel] and few. Where `scales` are given, a value is (value - mean) * scale + bias, times `slope` where
// negative, before it is multiplied. Beyond the image are zeros. `weights` are the second factors of all products in the order
// in which threads take them, see `factors_of`.
//
// Outputs are [image][voxel][channel], and `sums` [image][part][3][channel]: voxels, mean, and sum of squared distances from
// it. With `bias` they are instead [image][channel][voxel], have no sums, and may be fewer than 32.
//
// Bytes: sizeof(T) read per value, and more for the borders that tiles share, which are in the L2 cache; sizeof(T) written per
// output. A tile is two lines of 32 voxels for each row of threads (a warp, which makes all 32 outputs of its lines: four by
// four products of 16 x 16 by 16 x 8), copied to shared memory with its borders for 32 channels of a plane at a time.

const int ACROSS = 32, PITCH = ACROSS + 2, OUTPUTS = 32, STEP = 16, DOWN = 2, AT_ONCE = 3;

#ifndef ON_HOST
// Four matrices of 8 x 8; each thread gives the place of a row of 16 bytes.
__device__ inline void load_matrices(unsigned* a, const T* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row)));
}
#endif

// The products of a step of factors for all 32 outputs of 16 voxels.
__device__ inline void add_products(float (&sum)[4][4], const unsigned* a, const Pairs& low, const Pairs& high) {
#pragma unroll
    for (int j = 0; j < 4; j++) multiply_add(sum[j], a, (j < 2 ? low : high).values + j % 2 * 2, T());
}

extern "C" __global__ void __launch_bounds__(128, 4) convolve(
    const T* values, Index of_pitch, Index of_z, Index of_y, Index of_x, Index of_channels, Index of_kz, Index of_ky,
    Index of_kx, const T* weights, const float* scales, const float* norm_bias, Index slope, Index groups, Index of_parts,
    Index of_run, T* out, Index of_outputs, float* sums, const float* bias
) {
    // No plane has as many numbers as an int counts, nor has one thread the registers for longer ones.
    int pitch = (int)of_pitch, nz = (int)of_z, ny = (int)of_y, nx = (int)of_x, channels = (int)of_channels;
    int kz = (int)of_kz, ky = (int)of_ky, kx = (int)of_kx, parts = (int)of_parts, run = (int)of_run;
    int outputs = (int)of_outputs;
    SHARED_FLOATS(held);  // [OUTPUTS] of the first tile, [2][8][threads] sums of distances from these and of squares, the tile
    int lane = threadIdx.x, row = threadIdx.y, rows = blockDim.y, thread = row * 32 + lane, threads = rows * 32;
    float *shift = held, *total = held + OUTPUTS + thread, *squares = total + 8 * threads;
    T* tile = (T*)(held + OUTPUTS + 16 * threads);
    int line = lane / 4, pack = lane % 4;  // of the outputs of a product, those that a thread has: lines and packs of 8
    int block = blockIdx.x, part = block % parts, group = block / parts % (int)groups;
    int image = block / parts / (int)groups, channel = group * OUTPUTS + pack * 8;
    Index voxels = (Index)nz * ny * nx;
    int down = rows * DOWN, along_x = (nx + ACROSS - 1) / ACROSS, along_y = (ny + down - 1) / down;
    int first = part * run, last = first + run, tiles = nz * along_y * along_x;
    if (last > tiles) last = tiles;
    int plane = (down + 2) * PITCH;
    int steps = LINES ? (channels * kz * ky * kx + STEP - 1) / STEP : channels / STEP * kz * ky * kx;
    const Pairs* factors = (const Pairs*)weights + (Index)group * steps * 64 + lane;
    int* offsets = (int*)(tile + (channels * kz * plane + 8) / 8 * 8);  // with LINES: where the tile has each factor
    if (LINES)
        for (int k = thread; k < steps * STEP; k += threads) {
            int dx = k % kx, dy = k / kx % ky, from = k / (kx * ky);
            bool there = from < channels * kz;
            offsets[k] = there ? from * plane + (dy + 1 - ky / 2) * PITCH + dx + 1 - kx / 2 : -1;
        }
    // The first voxel of a plane that a thread copies, and how far it is to its next.
    int first_column = thread / 4 % PITCH - 1, first_row = thread / 4 / PITCH - 1;
    int step = threads / 4, step_columns = step % PITCH, step_rows = step / PITCH;
    float damping = from_bits(slope), count = 0;
    for (int n = 0; n < 8; n++) total[n * threads] = squares[n * threads] = 0;
#pragma unroll 1
    for (int number = first; number < last; number++) {
        int x0 = number % along_x * ACROSS, y0 = number / along_x % along_y * down, z = number / along_x / along_y;
        float sum[DOWN][2][4][4] = {};
        if (LINES) {
            __syncthreads();
#pragma unroll 1
            for (int i = thread; i < channels * kz * plane; i += threads) {
                int x = x0 + i % PITCH - 1, y = y0 + i % plane / PITCH - 1, from = i / plane;
                int at = z + from % kz - kz / 2, c = from / kz;
                T value = {};
                if (0 <= x && x < nx && 0 <= y && y < ny && 0 <= at && at < nz)
                    value = values[(image * channels + c) * voxels + (Index)at * ny * nx + y * nx + x];
                tile[i] = value;
            }
            __syncthreads();
#pragma unroll 1
            for (int k = 0; k < steps; k++) {
                Pairs low = factors[k * 64], high = factors[k * 64 + 32];
                int places[4];
#pragma unroll
                for (int i = 0; i < 4; i++) places[i] = offsets[k * STEP + i / 2 * 8 + pack * 2 + i % 2];
#pragma unroll
                for (int m = 0; m < 2 * DOWN; m++) {
                    unsigned a[4] = {};
                    int from = (row * DOWN + m / 2) * PITCH + m % 2 * 16 + line;
#pragma unroll
                    for (int i = 0; i < 8; i++)  // halves of the four registers: of two lines, times two of factors
                        if (places[i / 4 * 2 + i % 2] >= 0)
                            a[i / 2] |= (unsigned)tile[from + i / 2 % 2 * 8 + places[i / 4 * 2 + i % 2]].bits << 16 * (i % 2);
                    add_products(sum[m / 2][m % 2], a, low, high);
                }
            }
        } else {
#pragma unroll 1
            for (int dz = 0; dz < kz; dz++) {
                int at = z + dz - kz / 2;
                if (at < 0 || at >= nz) continue;
#pragma unroll 1
                for (int chunk = 0; chunk < channels / 32; chunk++) {
                    int from = chunk * 32 + thread % 4 * 8;
                    const T* source = values + (image * voxels + (Index)at * ny * nx) * pitch + from;
                    const Pack<float>* means = (const Pack<float>*)(scales + image * 2 * channels + from);
                    const Pack<float>* factor = (const Pack<float>*)(scales + (image * 2 + 1) * channels + from);
                    const Pack<float>* added = (const Pack<float>*)(norm_bias + from);
                    __syncthreads();
                    int y = y0 + first_row, x = x0 + first_column, place = thread / 4;
#pragma unroll 1
                    while (place < plane) {
                        Pairs now[AT_ONCE] = {};
                        bool inside[AT_ONCE];
#pragma unroll
                        for (int i = 0; i < AT_ONCE; i++) {
                            inside[i] = (unsigned)x < (unsigned)nx && (unsigned)y < (unsigned)ny && place + i * step < plane;
                            if (inside[i]) now[i] = *(const Pairs*)(source + (y * nx + x) * pitch);
                            x += step_columns, y += step_rows;
                            if (x > x0 + ACROSS) x -= PITCH, y++;
                        }
#pragma unroll
                        for (int i = 0; i < AT_ONCE; i++, place += step) {
                            if (place >= plane) break;
                            if (scales && inside[i]) normalize(now[i], means, factor, norm_bias ? added : nullptr, damping, T());
                            // Packs of neighbours change places, so that eight of them lie in different banks.
                            *(Pairs*)(tile + place * 32 + ((thread % 4) ^ (place >> 1 & 3)) * 8) = now[i];
                        }
                    }
                    __syncthreads();
                    const Pairs* next = factors + (dz * (channels / 32) + chunk) * ky * kx * 128;
#pragma unroll 1
                    for (int dy = 0; dy < ky; dy++)
#pragma unroll 1
                        for (int dx = 0; dx < kx; dx++, next += 128) {
                            int corner = (row * DOWN + dy + 1 - ky / 2) * PITCH + dx + 1 - kx / 2 + lane % 16;
                            int rows_at[DOWN];  // 16 voxels further, the same packs have changed places
#pragma unroll
                            for (int d = 0; d < DOWN; d++) {
                                int place = corner + d * PITCH;
                                rows_at[d] = place * 32 + (lane / 16 ^ (place >> 1 & 3)) * 8;
                            }
#pragma unroll
                            for (int k = 0; k < 2; k++) {
                                Pairs low = next[k * 64], high = next[k * 64 + 32];
#pragma unroll
                                for (int m = 0; m < 2 * DOWN; m++) {
                                    unsigned a[4];
                                    load_matrices(a, tile + (rows_at[m / 2] ^ k * 16) + m % 2 * 16 * 32);
                                    add_products(sum[m / 2][m % 2], a, low, high);
                                }
                            }
                        }
                }
            }
        }
        int y = y0 + row * DOWN, columns = nx - x0 < ACROSS ? nx - x0 : ACROSS, lines = ny - y0 < down ? ny - y0 : down;
        Index voxel = ((Index)z * ny + y) * nx + x0 + line;
        if (bias) {
#pragma unroll
            for (int n = 0; n < 8; n++) {
                if (channel + n >= outputs) break;
                T* target = out + (Index)(image * outputs + channel + n) * voxels + voxel;
                float added = bias[channel + n];
#pragma unroll
                for (int i = 0; i < 4 * DOWN; i++)
                    if (y + i / 4 < ny && i % 4 * 8 + line < columns)
                        store(target + i / 4 * nx + i % 4 * 8, added + sum[i / 4][i % 4 / 2][n / 2][i % 2 * 2 + n % 2]);
            }
            continue;
        }
        if (number == first) {
            if (thread < 4)
#pragma unroll
                for (int n = 0; n < 8; n += 2)
                    unpaired(paired(sum[0][0][n / 2][0], sum[0][0][n / 2][1], T()), shift + pack * 8 + n, T());
            __syncthreads();
        }
        T* target = out + (image * voxels + voxel) * outputs + channel;
        float of_tile[8] = {}, squares_of_tile[8] = {}, middle[8];
#pragma unroll
        for (int n = 0; n < 8; n++) middle[n] = shift[pack * 8 + n];
#pragma unroll
        for (int i = 0; i < 4 * DOWN; i++) {
            if (y + i / 4 >= ny || i % 4 * 8 + line >= columns) continue;
            Pairs made;
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                const float* of_line = sum[i / 4][i % 4 / 2][n / 2] + i % 2 * 2;
                float both[2];
                made.values[n / 2] = paired(of_line[0], of_line[1], T());
                unpaired(made.values[n / 2], both, T());
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float distance = both[e] - middle[n + e];
                    of_tile[n + e] += distance;
                    squares_of_tile[n + e] = fmaf(distance, distance, squares_of_tile[n + e]);
                }
            }
            *(Pairs*)(target + (i / 4 * nx + i % 4 * 8) * outputs) = made;
        }
#pragma unroll
        for (int n = 0; n < 8; n++) {
            total[n * threads] += of_tile[n];
            squares[n * threads] += squares_of_tile[n];
        }
        count += (float)(lines * columns);
    }
    if (bias) return;
    __syncthreads();
    for (int c = thread; c < OUTPUTS; c += threads) {
        const float* of_threads = held + OUTPUTS + c % 8 * threads + c / 8;
        float all = 0, far = 0;
        for (int i = 0; i < threads; i += 4) {
            all += of_threads[i];
            far += of_threads[8 * threads + i];
        }
        float* target = sums + (Index)(image * parts + part) * 3 * outputs + group * OUTPUTS + c;
        target[0] = count;
        target[outputs] = shift[c] + all / count;
        float rest = far - all * (all / count);
        target[2 * outputs] = rest < 0 ? 0 : rest;  // what is not a number stays so
    }
}
