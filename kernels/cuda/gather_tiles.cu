// One tile of a volume, mirrored in several ways, into the network's batch and number type T; zero outside the volume.
//
// Bytes per voxel of the tile: 4 read, and sizeof(T) written for each view. That is the least possible.
//
// A row of threads copies a line of x; `flips` holds three bits for each view: flipped along z, y, x.

extern "C" __global__ void gather_tiles(
    const float* volume, Index stride_c, Index stride_z, Index stride_y, Index nz, Index ny, Index nx,
    Index corner_z, Index corner_y, Index corner_x, Index channels, Index tz, Index ty, Index tx,
    Index flips, Index views, T* out
) {
    FOR_LINES(line, channels * tz * ty) {
        int y = (int)line % (int)ty, z = (int)line / (int)ty % (int)tz, c = (int)line / (int)ty / (int)tz;
        Index from_z = corner_z + z, from_y = corner_y + y;
        bool inside = 0 <= from_z && from_z < nz && 0 <= from_y && from_y < ny;
        Index source = c * stride_c + from_z * stride_z + from_y * stride_y + corner_x;
        Index lines[MOST_VIEWS];
#pragma unroll
        for (int view = 0; view < MOST_VIEWS; view++) {
            int flip = (int)(flips >> 3 * view);
            Index to_z = flipped(z, tz, flip & 1), to_y = flipped(y, ty, flip & 2);
            lines[view] = (((view * channels + c) * tz + to_z) * ty + to_y) * tx;
        }
        for (int x = threadIdx.x; x < tx; x += blockDim.x) {
            float value = 0;
            if (inside && 0 <= corner_x + x && corner_x + x < nx) value = volume[source + x];
            T rounded;
            store(&rounded, value);
            int back = (int)tx - 1 - x;
#pragma unroll
            for (int view = 0; view < MOST_VIEWS; view++)
                if (view < views) out[lines[view] + (flips >> 3 * view & 4 ? back : x)] = rounded;
        }
    }
}
