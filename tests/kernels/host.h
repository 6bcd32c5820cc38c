// CUDA on a CPU: each thread of a block is a thread, and blocks run one after another.
// Defines what the kernels use, and `launch`, which calls the one that KERNEL names; included before their text.
#define ON_HOST
#define __device__
#define __global__
#define __launch_bounds__(...)
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

struct Dim {
    unsigned x, y, z;
};
static thread_local Dim threadIdx, blockIdx;
static Dim blockDim, gridDim;
static std::vector<float> shared_memory;
static std::barrier<>* all_threads;

#define SHARED_FLOATS(name) float* name = shared_memory.data()
static void __syncthreads() { all_threads->arrive_and_wait(); }
static int __syncthreads_or(int mine) {
    static std::atomic<int> of_any;
    of_any = 0;
    __syncthreads();
    if (mine) of_any = 1;
    __syncthreads();
    int found = of_any;
    __syncthreads();  // before the next sets it back
    return found;
}
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

struct Half;
static float to_float(Half value);
static void store(Half* place, float value);

// What the threads of a warp do together: each shows what it has, and takes from the others what is its share.
struct Warp {
    std::barrier<> all{32};
    unsigned a[2][32][4], b[2][32][2];
    const void* rows[32];
};
static std::vector<std::unique_ptr<Warp>> warps;

template <typename T>
static unsigned paired(float first, float second, T) {
    T both[2];
    store(&both[0], first);
    store(&both[1], second);
    return both[0].bits | (unsigned)both[1].bits << 16;
}
template <typename T>
static void unpaired(unsigned pair, float* both, T) {
    for (unsigned i = 0; i < 2; i++) both[i] = to_float(T{(unsigned short)(pair >> 16 * i)});
}

template <typename T>
static void load_matrices(unsigned* a, const T* row) {
    Warp& warp = *warps[threadIdx.y];
    warp.rows[threadIdx.x] = row;
    warp.all.arrive_and_wait();
    for (unsigned i = 0; i < 4; i++)
        std::memcpy(&a[i], (const char*)warp.rows[i * 8 + threadIdx.x / 4] + threadIdx.x % 4 * 4, 4);
    warp.all.arrive_and_wait();
}

// c += a b, of two factors a step for each number in a register of half numbers, one for TF32's. Two places in turn: who
// is at the next product but one has seen all others leave this.
template <typename Number>
static void multiply_add(float* c, const unsigned* a, const unsigned* b, int of_register, Number number) {
    static thread_local unsigned turn = 0;
    turn ^= 1;
    Warp& warp = *warps[threadIdx.y];
    std::memcpy(warp.a[turn][threadIdx.x], a, sizeof warp.a[0][0]);
    std::memcpy(warp.b[turn][threadIdx.x], b, sizeof warp.b[0][0]);
    warp.all.arrive_and_wait();
    for (int i = 0; i < 4; i++) {
        int line = threadIdx.x / 4, column = threadIdx.x % 4 * 2 + i % 2;
        for (int k = 0; k < 8 * of_register; k++) {
            int thread = k % (4 * of_register) / of_register, half = k / (4 * of_register), which = k % of_register;
            c[i] += number(warp.a[turn][line * 4 + thread][i / 2 + half * 2], which) *
                    number(warp.b[turn][column * 4 + thread][half], which);
        }
    }
}

template <typename T>
static void multiply_add(float* c, const unsigned* a, const unsigned* b, T) {
    auto half = [](unsigned pair, int which) { return to_float(T{(unsigned short)(pair >> 16 * which)}); };
    multiply_add(c, a, b, 2, half);
}

// Of TF32, which is a float's upper 19 bits; the others count for nothing.
static void multiply_add(float* c, const unsigned* a, const unsigned* b) {
    multiply_add(c, a, b, 1, [](unsigned bits, int) { return __uint_as_float(bits & 0xffffe000u); });
}

static void copy(float* place, const float* source, int numbers) {
    for (int i = 0; i < 4; i++) place[i] = i < numbers ? source[i] : 0;
}
static void wait_for_copies() {}

template <typename... P, size_t... I>
static void run(void (*kernel)(P...), const long long* values, std::index_sequence<I...>) {
    std::barrier<> barrier(blockDim.x * blockDim.y);
    all_threads = &barrier;
    for (unsigned y = 0; y < blockDim.y; y++) warps.push_back(std::make_unique<Warp>());
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < blockDim.x * blockDim.y; t++)
        threads.emplace_back([=] {
            threadIdx = {t % blockDim.x, t / blockDim.x, 0};
            for (unsigned block = 0; block < gridDim.x; block++) {
                blockIdx = {block, 0, 0};
                kernel((P)values[I]...);
                __syncthreads();  // shared memory is the next block's now
            }
        });
    for (auto& thread : threads) thread.join();
    warps.clear();
}

template <typename... P>
static void run_all(void (*kernel)(P...), const long long* values) {
    run(kernel, values, std::index_sequence_for<P...>());
}
