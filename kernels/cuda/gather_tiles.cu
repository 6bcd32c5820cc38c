// One tile of a volume, mirrored in several ways, into the network's batch and number type T; zero outside the volume.
//
// Bytes per voxel of the tile: 4 read, and sizeof(T) written for each view. That is the least possible.
//
// A row of threads copies a line of x; `flips` holds three bits for each view: flipped along z, y, x. A thread copies WIDTH
// neighbours, which it writes at once to each view, and reads twice as many before it writes the first.

template <int WIDTH>
__device__ inline void gather(
    const float* volume, Index stride_c, Index stride_z, Index stride_y, Index nz, Index ny, int nx,
    Index corner_z, Index corner_y, int corner_x, int channels, int tz, int ty, int tx, int flips, int views, T* out
) {
    const int AT_ONCE = 2;
    int step = WIDTH * (int)blockDim.x;
    FOR_LINES(line, (Index)channels * tz * ty) {
        int y = (int)line % ty, plane = (int)line / ty, z = plane % tz, c = plane / tz;
        Index from_z = corner_z + z, from_y = corner_y + y;
        bool inside = 0 <= from_z && from_z < nz && 0 <= from_y && from_y < ny;
        const float* source = volume + c * stride_c + from_z * stride_z + from_y * stride_y + corner_x;
        T* lines[MOST_VIEWS];
#pragma unroll
        for (int view = 0; view < MOST_VIEWS; view++) {
            int flip = flips >> 3 * view, to_z = flip & 1 ? tz - 1 - z : z, to_y = flip & 2 ? ty - 1 - y : y;
            lines[view] = out + (((Index)view * channels + c) * tz + to_z) * ((Index)ty * tx) + to_y * tx;
        }
        for (int begin = threadIdx.x * WIDTH; begin < tx; begin += AT_ONCE * step) {
            float values[AT_ONCE][WIDTH];
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
                for (int i = 0; i < WIDTH; i++) {
                    int x = begin + k * step + i, from_x = corner_x + x;
                    values[k][i] = 0;
                    if (inside && x < tx && 0 <= from_x && from_x < nx) values[k][i] = source[x];
                }
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                int x = begin + k * step;
                if (x >= tx) break;
                Neighbours<T, WIDTH> forward, backward;
#pragma unroll
                for (int i = 0; i < WIDTH; i++) store(&forward.values[i], values[k][i]);
#pragma unroll
                for (int i = 0; i < WIDTH; i++) backward.values[i] = forward.values[WIDTH - 1 - i];
#pragma unroll
                for (int view = 0; view < MOST_VIEWS; view++) {
                    bool flip = flips >> 3 * view & 4;
                    T* place = lines[view] + (flip ? tx - WIDTH - x : x);
                    if (view < views) *(Neighbours<T, WIDTH>*)place = flip ? backward : forward;
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) gather_tiles(
    const float* volume, Index stride_c, Index stride_z, Index stride_y, Index nz, Index ny, Index nx,
    Index corner_z, Index corner_y, Index corner_x, Index channels, Index tz, Index ty, Index tx,
    Index flips, Index views, T* out
) {
    if (tx % 4 == 0 && (Index)out % (4 * sizeof(T)) == 0)
        gather<4>(volume, stride_c, stride_z, stride_y, nz, ny, nx, corner_z, corner_y, corner_x, channels, tz, ty, tx, flips,
                  views, out);
    else
        gather<1>(volume, stride_c, stride_z, stride_y, nz, ny, nx, corner_z, corner_y, corner_x, channels, tz, ty, tx, flips,
                  views, out);
}
