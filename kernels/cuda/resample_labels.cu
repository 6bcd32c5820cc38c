// The label of each voxel of the scan: logits interpolated between up to two planes, lines and columns, then the greatest
// class, or regions painted over each other in their order.
//
// Bytes: 4 read per class and voxel of the logits, each once (neighbouring outputs find it in a cache); sizeof(T) written per
// voxel of the scan, 4 more where the confidence is asked for. That is the least possible.
//
// A row of threads makes a line of x. Of each axis, `first` holds the first tap of each output and `weights` is
// [taps][outputs]; with one tap, the second neighbour is the first again with weight 0. Additions are in the twin's order:
// along y, then x, then z.

__device__ inline float mix(float a, float b, float weight_a, float weight_b) {
    return __fadd_rn(__fmul_rn(a, weight_a), __fmul_rn(b, weight_b));
}

extern "C" __global__ void resample_labels(
    const float* logits, Index stride_k, Index stride_z, Index stride_y, Index classes, Index start, Index planes,
    Index offset, const int* first_z, const float* weights_z, Index taps_z, Index nz, const int* first_y,
    const float* weights_y, Index taps_y, Index ny, const int* first_x, const float* weights_x, Index taps_x, Index nx,
    const int* values, T* out, Index out_z, Index out_y, Index out_x, float* confidence
) {
    Index next_z = taps_z == 2 ? stride_z : 0, next_y = taps_y == 2 ? stride_y : 0, next_x = taps_x == 2;
    FOR_LINES(line, planes * ny) {
        int y = (int)(line % ny), plane = (int)(line / ny);
        Index z = start + plane;
        float z0 = weights_z[z], z1 = taps_z == 2 ? weights_z[nz + z] : 0;
        float y0 = weights_y[y], y1 = taps_y == 2 ? weights_y[ny + y] : 0;
        const float* corner = logits + (first_z[z] - offset) * stride_z + first_y[y] * stride_y;
        for (int x = threadIdx.x; x < nx; x += blockDim.x) {
            float x0 = weights_x[x], x1 = taps_x == 2 ? weights_x[nx + x] : 0;
            const float* at = corner + first_x[x];
            float best = 0, others = 0;
            int label = 0;
            for (int k = 0; k < classes; k++, at += stride_k) {
                float logit = mix(mix(at[0], at[next_y], y0, y1), mix(at[next_x], at[next_y + next_x], y0, y1), x0, x1);
                if (next_z) {
                    const float* behind = at + next_z;
                    float far = mix(mix(behind[0], behind[next_y], y0, y1),
                                    mix(behind[next_x], behind[next_y + next_x], y0, y1), x0, x1);
                    logit = mix(logit, far, z0, z1);
                }
                bool wins = values ? logit > 0 : k == 0 || logit > best;
                if (confidence && !values && k > 0)  // sum of exp(logit - best) over all classes but the best
                    others = wins ? (others + 1) * expf(best - logit) : others + expf(logit - best);
                if (wins) {
                    label = values ? values[k] : k;
                    best = logit;
                }
            }
            Index place = plane * out_z + y * out_y + x * out_x;
            out[place] = (T)label;
            if (confidence) confidence[place] = values ? (best > 0 ? 1 / (1 + expf(-best)) : 0) : 1 / (1 + others);
        }
    }
}
