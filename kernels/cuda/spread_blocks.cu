// Blocks of voxels, one for each voxel of a coarse grid, to where they lie in the finer grid; numbers are only copied.
//
// Blocks are [image][z][y][x][sz][sy][sx][channel]; the result is [image][z * sz][y * sy][x * sx][channel], with `pitch`
// packs of 16 bytes from voxel to voxel, of which `packs` are written. In two dimensions z and sz are 1. Bytes: each number
// is read and written once. That is the least possible.
//
// A row of threads makes a line of x. Along it a block's part [sx][channel] is read in one piece. Each thread has several
// packs on their way.

const int AT_ONCE = 4;

// The place of a pack among groups of equal length, without a division for each.
struct Place {
    int number, within, step_number, step_within, length;

    __device__ void advance() {
        number += step_number, within += step_within;
        if (within >= length) within -= length, number++;
    }
};

extern "C" __global__ void __launch_bounds__(256, 4) spread_blocks(
    const T* blocks, Index images, Index of_z, Index of_y, Index of_x, Index sz, Index sy, Index sx, Index of_packs, T* out,
    Index pitch
) {
    // No grid has as many lines as an int counts.
    int nz = (int)of_z, ny = (int)of_y, packs = (int)of_packs, down_z = (int)sz, down_y = (int)sy;
    int piece = (int)sx * packs, length = (int)of_x * piece, block = down_z * down_y * piece, step = (int)blockDim.x;
    // Where a thread's packs are, in which block's part and in which voxel: from one to the next it is always as far.
    Place of_source = {(int)threadIdx.x / piece, (int)threadIdx.x % piece, step / piece, step % piece, piece};
    Place of_target = {(int)threadIdx.x / packs, (int)threadIdx.x % packs, step / packs, step % packs, packs};
    FOR_LINES(line, images * nz * down_z * ny * down_y) {
        int y = (int)line % (ny * down_y), plane = (int)line / (ny * down_y), z = plane % (nz * down_z);
        Index coarse = ((Index)(plane / (nz * down_z)) * nz + z / down_z) * ny + y / down_y;
        const Pack<T>* source = (const Pack<T>*)blocks + coarse * of_x * block + (z % down_z * down_y + y % down_y) * piece;
        Pack<T>* target = (Pack<T>*)out + line * of_x * sx * pitch;
        Place from = of_source, to = of_target;
        for (int begin = threadIdx.x; begin < length; begin += AT_ONCE * step) {
            Pack<T> now[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++, from.advance())
                if (begin + k * step < length) now[k] = source[(Index)from.number * block + from.within];
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++, to.advance())
                if (begin + k * step < length) target[to.number * pitch + to.within] = now[k];
        }
    }
}
