// Blocks of voxels, one for each voxel of a coarse grid, to where they lie in the finer grid; numbers are only copied.
//
// Blocks are [image][z][y][x][sz][sy][sx][channel]; the result is [image][z * sz][y * sy][x * sx][channel], with `pitch`
// packs of 16 bytes from voxel to voxel, of which `packs` are written. In two dimensions z and sz are 1. Bytes: each number
// is read and written once. That is the least possible.
//
// A row of threads makes a line of x. Along it a block's part [sx][channel] is read in one piece.

extern "C" __global__ void spread_blocks(
    const T* __restrict__ blocks, Index images, Index nz, Index ny, Index nx, Index sz, Index sy, Index sx, Index packs,
    T* __restrict__ out, Index pitch
) {
    const Pack<T>* from = (const Pack<T>*)blocks;
    Pack<T>* to = (Pack<T>*)out;
    int width = (int)packs, piece = (int)(sx * packs), length = (int)(nx * sx * packs);
    Index lines_z = nz * sz, lines_y = ny * sy, block = sz * sy * piece;
    FOR_LINES(line, images * lines_z * lines_y) {
        Index y = line % lines_y, z = line / lines_y % lines_z, image = line / (lines_y * lines_z);
        const Pack<T>* source = from + ((image * nz + z / sz) * ny + y / sy) * nx * block + (z % sz * sy + y % sy) * piece;
        Pack<T>* target = to + line * nx * sx * pitch;
#pragma unroll 4
        for (int i = threadIdx.x; i < length; i += blockDim.x)
            target[i / width * pitch + i % width] = source[i / piece * block + i % piece];
    }
}
