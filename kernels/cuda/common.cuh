// What every kernel uses; pasted in front of each file, so that one string is all there is to compile and to cache.
//
// Parameters are only pointers and 64-bit integers, so every launch is a list of integers. Types are macros:
// each combination is compiled for itself. Half and bfloat16 are bits here: no header of CUDA is needed, and the same text
// compiles for a CPU.

typedef long long Index;  // of elements in volumes, which may have more than 2^31

struct Half {
    unsigned short bits;
};
struct Bfloat {
    unsigned short bits;
};

#ifndef ON_HOST
#define SHARED_FLOATS(name) extern __shared__ float name[]

__device__ inline float to_float(Half value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}
__device__ inline void store(Half* place, float value) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(place->bits) : "f"(value));
}
#endif

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(short value) { return value; }
__device__ inline float to_float(unsigned char value) { return value; }
__device__ inline float to_float(Bfloat value) { return __uint_as_float((unsigned)value.bits << 16); }
__device__ inline void store(float* place, float value) { *place = value; }
__device__ inline void store(Bfloat* place, float value) {
    unsigned bits = __float_as_uint(value);
    bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    // To nearest, ties to even.
    place->bits = (unsigned short)(is_nan ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Where index i of an axis of n voxels lies in a view that is flipped along it, or not.
__device__ inline Index flipped(Index i, Index n, bool flip) { return flip ? n - 1 - i : i; }

// Of three axes. Loops over views are unrolled to that, so that what belongs to a view stays in registers.
#define MOST_VIEWS 8

// W numbers side by side, which a thread reads or writes at once; they lie at a multiple of their size.
template <typename N, int W>
struct alignas(W * sizeof(N)) Neighbours {
    N values[W];
};

// As many as a thread can read or write at once: sixteen bytes.
template <typename N>
using Pack = Neighbours<N, 16 / sizeof(N)>;

typedef Pack<unsigned> Pairs;  // eight half numbers, two in each

#ifndef ON_HOST
#define PRODUCT(type)                                                                                                  \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "   \
        "{%0, %1, %2, %3};"                                                                                            \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                               \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
// c += a b, of 16 x 16 by 16 x 8, each spread over a warp.
__device__ inline void multiply_add(float* c, const unsigned* a, const unsigned* b, Half) { PRODUCT("f16"); }
__device__ inline void multiply_add(float* c, const unsigned* a, const unsigned* b, Bfloat) { PRODUCT("bf16"); }
// Two numbers in one register, the first in its lower half.
__device__ inline unsigned paired(float first, float second, Half) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
__device__ inline unsigned paired(float first, float second, Bfloat) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
__device__ inline void unpaired(unsigned pair, float* both, Half) {
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(both[0]), "=f"(both[1]) : "r"(pair));
}
__device__ inline void unpaired(unsigned pair, float* both, Bfloat) {
    both[0] = __uint_as_float(pair << 16);
    both[1] = __uint_as_float(pair & 0xffff0000u);
}
#endif

// A pack's norm and activation, in float and rounded once.
template <typename N>
__device__ inline void normalize(
    Pairs& pack, const Pack<float>* means, const Pack<float>* scales, const Pack<float>* biases, float damping, N number
) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        Pack<float> mean = means[h], scale = scales[h], bias = {};
        if (biases) bias = biases[h];
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            float both[2];
            unpaired(pack.values[2 * h + n / 2], both, number);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float value = fmaf(both[e] - mean.values[n + e], scale.values[n + e], bias.values[n + e]);
                both[e] = fmaxf(value, damping * value);
            }
            pack.values[2 * h + n / 2] = paired(both[0], both[1], number);
        }
    }
}

// A float that came as its bits, since arguments are integers.
__device__ inline float from_bits(Index bits) { return __uint_as_float((unsigned)bits); }

// Lines of x are spread over all rows of threads of all blocks.
#define FOR_LINES(line, count)                                                          \
    for (Index line = (Index)blockIdx.x * blockDim.y + threadIdx.y, lines_ = (count);   \
         line < lines_; line += (Index)gridDim.x * blockDim.y)
