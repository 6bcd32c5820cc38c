// The label of each voxel of the scan: logits interpolated between up to two planes, lines and columns, then the greatest
// class, or regions painted over each other in their order.
//
// Bytes: 4 read per class and voxel of the logits, each once (neighbouring outputs find it in a cache); sizeof(T) written per
// voxel of the scan, 4 more where the confidence is asked for. That is the least possible.
//
// A row of threads makes a line of x in each of PLANES planes: what one plane's outputs take from the planes of the logits,
// the next plane's often take too. A thread reads all it needs of a class before it needs the first; how many planes it
// can make at once, registers limit. Of each axis, `first` holds the first tap of each output and `weights` is
// [taps][outputs]; with one tap, the second neighbour is the first again with weight 0. Additions are in the twin's order:
// along y, then x, then z.

__device__ inline float mix(float a, float b, float weight_a, float weight_b) {
    return fmaf(b, weight_b, __fmul_rn(a, weight_a));
}

// Of one class in one plane: two lines in one column, then in the next.
struct Corners {
    float values[4];
};

template <int NEXT_X>
__device__ inline Corners corners(const float* at, int next_y) {
    const float* other = at + next_y;
    return {{at[0], other[0], at[NEXT_X], other[NEXT_X]}};
}

__device__ inline float mix(Corners of, float y0, float y1, float x0, float x1) {
    return mix(mix(of.values[0], of.values[1], y0, y1), mix(of.values[2], of.values[3], y0, y1), x0, x1);
}

template <int PLANES, bool CONFIDENT, int NEXT_X>
__device__ inline void label_lines(
    const float* logits, Index stride_k, int stride_z, int stride_y, int classes, Index start, int planes, Index offset,
    const int* first_z, const float* weights_z, bool two, Index nz, const int* first_y, const float* weights_y, int taps_y,
    int ny, const int* first_x, const float* weights_x, int nx, const int* values, T* out, Index out_z, Index out_y,
    Index out_x, float* confidence
) {
    int next_z = two ? stride_z : 0, next_y = taps_y == 2 ? stride_y : 0;
    FOR_LINES(line, (Index)((planes + PLANES - 1) / PLANES) * ny) {
        int y = (int)line % ny, plane = (int)line / ny * PLANES, last = planes - 1 - plane;
        float y0 = weights_y[y], y1 = taps_y == 2 ? weights_y[ny + y] : 0;
        // Of each plane: how far its first logits lie from those of the first; whether both of its planes, or the first of
        // them as the second before, have been read.
        int from[PLANES];
        bool same[PLANES], next[PLANES];
        float z0[PLANES], z1[PLANES];
        Index z = start + plane;
#pragma unroll
        for (int p = 0; p < PLANES; p++) {
            int q = p < last ? p : last, step = p ? first_z[z + q] - first_z[z + (p <= last ? p - 1 : last)] : 0;
            from[p] = (first_z[z + q] - first_z[z]) * stride_z;
            same[p] = p && step == 0;
            next[p] = p && step == 1 && two;
            z0[p] = weights_z[z + q];
            z1[p] = two ? weights_z[nz + z + q] : 0;
        }
        const float* corner = logits + (first_z[z] - offset) * stride_z + (Index)first_y[y] * stride_y;
        for (int x = threadIdx.x; x < nx; x += blockDim.x) {
            float x0 = weights_x[x], x1 = NEXT_X ? weights_x[nx + x] : 0;
            const float* at = corner + first_x[x];
            float best[PLANES] = {}, others[PLANES] = {};
            int label[PLANES] = {};
            for (int k = 0; k < classes; k++, at += stride_k) {
                Corners near[PLANES] = {}, far[PLANES] = {};
#pragma unroll
                for (int p = 0; p < PLANES; p++) {
                    if (!same[p] && !next[p]) near[p] = corners<NEXT_X>(at + from[p], next_y);
                    if (!same[p] && two) far[p] = corners<NEXT_X>(at + (from[p] + next_z), next_y);
                }
                float before = 0, behind = 0;
                int name = values ? values[k] : k;
                bool least = !values && k == 0;
#pragma unroll
                for (int p = 0; p < PLANES; p++) {
                    if (next[p]) before = behind;
                    else if (!same[p]) before = mix(near[p], y0, y1, x0, x1);
                    if (!same[p] && two) behind = mix(far[p], y0, y1, x0, x1);
                    float logit = two ? mix(before, behind, z0[p], z1[p]) : before;
                    bool wins = least || logit > (values ? 0 : best[p]);
                    if (CONFIDENT && k > 0)  // sum of exp(logit - best) over all classes but the best
                        others[p] = wins ? (others[p] + 1) * expf(best[p] - logit) : others[p] + expf(logit - best[p]);
                    if (wins) {
                        label[p] = name;
                        best[p] = logit;
                    }
                }
            }
#pragma unroll
            for (int p = 0; p < PLANES; p++) {
                if (p > last) break;
                Index place = (plane + p) * out_z + y * out_y + x * out_x;
                out[place] = (T)label[p];
                if (CONFIDENT)
                    confidence[place] = values ? (best[p] > 0 ? 1 / (1 + expf(-best[p])) : 0) : 1 / (1 + others[p]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256, 3) resample_labels(
    const float* logits, Index stride_k, Index stride_z, Index stride_y, Index classes, Index start, Index planes,
    Index offset, const int* first_z, const float* weights_z, Index taps_z, Index nz, const int* first_y,
    const float* weights_y, Index taps_y, Index ny, const int* first_x, const float* weights_x, Index taps_x, Index nx,
    const int* values, T* out, Index out_z, Index out_y, Index out_x, float* confidence
) {
    auto label = [&](auto lines) {
        lines(logits, stride_k, stride_z, stride_y, classes, start, planes, offset, first_z, weights_z, taps_z == 2, nz,
              first_y, weights_y, taps_y, ny, first_x, weights_x, nx, values, out, out_z, out_y, out_x, confidence);
    };
    if (confidence && taps_x == 2) label(label_lines<2, true, 1>);
    else if (confidence) label(label_lines<2, true, 0>);
    else if (taps_x == 2) label(label_lines<3, false, 1>);
    else label(label_lines<3, false, 0>);
}
