// out += wz * (wy * wx) * (sum over views of the un-mirrored logits), for all classes of one tile.
//
// Bytes per voxel and class: sizeof(T) read for each view, 4 read and 4 written. That is the least possible.
//
// A row of threads adds a line of x; `flips` holds three bits for each view: flipped along z, y, x. A thread reads WIDTH
// neighbours of each view at once, and all views before it needs the first. More than two would lie too far apart in the
// sums, whose lines begin anywhere. Sums are rounded where the twin's are.

template <int WIDTH>
__device__ inline void accumulate(
    const T* logits, int flips, int views, int classes, int tz, int ty, int tx, const float* wz, const float* wy,
    const float* wx, float* out, Index stride_k, Index stride_z, Index stride_y
) {
    int of_class = tz * ty * tx, step = WIDTH * (int)blockDim.x;
    FOR_LINES(line, (Index)classes * tz * ty) {
        int y = (int)line % ty, plane = (int)line / ty, z = plane % tz, k = plane / tz;
        float* target = out + k * stride_k + z * stride_z + y * stride_y;
        float of_line = wz[z], of_y = wy[y];
        int at[MOST_VIEWS];  // in its view
#pragma unroll
        for (int view = 0; view < MOST_VIEWS; view++) {
            int flip = flips >> 3 * view, from_z = flip & 1 ? tz - 1 - z : z, from_y = flip & 2 ? ty - 1 - y : y;
            int x = threadIdx.x * WIDTH;
            at[view] = k * of_class + (from_z * ty + from_y) * tx + (flip & 4 ? tx - WIDTH - x : x);
        }
        for (int x = threadIdx.x * WIDTH; x < tx; x += step) {
            Neighbours<T, WIDTH> values[MOST_VIEWS];
            float sums[WIDTH], of_x[WIDTH];
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                sums[i] = target[x + i];
                of_x[i] = wx[x + i];
            }
#pragma unroll
            for (int view = 0; view < MOST_VIEWS; view++) {
                const T* of_view = logits + (view < views ? view : 0) * ((Index)classes * of_class);
                values[view] = *(const Neighbours<T, WIDTH>*)(of_view + at[view]);
                at[view] += flips >> 3 * view & 4 ? -step : step;
            }
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                float total = 0;
#pragma unroll
                for (int view = 0; view < MOST_VIEWS; view++) {
                    const T* pair = values[view].values;
                    float value = to_float(flips >> 3 * view & 4 ? pair[WIDTH - 1 - i] : pair[i]);
                    if (view < views) total = view ? __fadd_rn(total, value) : value;
                }
                target[x + i] = fmaf(total, __fmul_rn(of_line, __fmul_rn(of_y, of_x[i])), sums[i]);
            }
        }
    }
}

// With bounds that name one block, the compiler spends the registers that all views' reads at once need.
extern "C" __global__ void __launch_bounds__(256, 1) accumulate_views(
    const T* logits, Index flips, Index views, Index classes, Index tz, Index ty, Index tx,
    const float* wz, const float* wy, const float* wx, float* out, Index stride_k, Index stride_z, Index stride_y
) {
    if (tx % 2 == 0 && (Index)logits % (2 * sizeof(T)) == 0)
        accumulate<2>(logits, flips, views, classes, tz, ty, tx, wz, wy, wx, out, stride_k, stride_z, stride_y);
    else
        accumulate<1>(logits, flips, views, classes, tz, ty, tx, wz, wy, wx, out, stride_k, stride_z, stride_y);
}
