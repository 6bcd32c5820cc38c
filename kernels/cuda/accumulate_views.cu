// out += wz * (wy * wx) * (sum over views of the un-mirrored logits), for all classes of one tile.
//
// Bytes per voxel and class: sizeof(T) read for each view, 4 read and 4 written. That is the least possible.
//
// A row of threads adds a line of x; `flips` holds three bits for each view: flipped along z, y, x. Sums are rounded where the
// twin's are.

extern "C" __global__ void accumulate_views(
    const T* logits, Index flips, Index views, Index classes, Index tz, Index ty, Index tx,
    const float* wz, const float* wy, const float* wx, float* out, Index stride_k, Index stride_z, Index stride_y
) {
    FOR_LINES(line, classes * tz * ty) {
        int y = (int)line % (int)ty, z = (int)line / (int)ty % (int)tz, k = (int)line / (int)ty / (int)tz;
        float* target = out + k * stride_k + z * stride_z + y * stride_y;
        Index lines[MOST_VIEWS];
#pragma unroll
        for (int view = 0; view < MOST_VIEWS; view++) {
            int flip = (int)(flips >> 3 * view);
            Index from_z = flipped(z, tz, flip & 1), from_y = flipped(y, ty, flip & 2);
            lines[view] = (((view * classes + k) * tz + from_z) * ty + from_y) * tx;
        }
        for (int x = threadIdx.x; x < tx; x += blockDim.x) {
            int back = (int)tx - 1 - x;
            float total = to_float(logits[lines[0] + (flips & 4 ? back : x)]);
#pragma unroll
            for (int view = 1; view < MOST_VIEWS; view++)
                if (view < views)
                    total = __fadd_rn(total, to_float(logits[lines[view] + (flips >> 3 * view & 4 ? back : x)]));
            float weight = __fmul_rn(wz[z], __fmul_rn(wy[y], wx[x]));
            target[x] = fmaf(total, weight, target[x]);
        }
    }
}
