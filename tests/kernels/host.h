// CUDA on a CPU: each thread of a block is a thread, and blocks run one after another.
// Defines what the kernels use, and `launch`, which calls the one that KERNEL names; included before their text.
#define ON_HOST
#define __device__
#define __global__
#define __launch_bounds__(...)
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
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

template <typename... P, size_t... I>
static void run(void (*kernel)(P...), const long long* values, std::index_sequence<I...>) {
    std::barrier<> barrier(blockDim.x * blockDim.y);
    all_threads = &barrier;
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
}

template <typename... P>
static void run_all(void (*kernel)(P...), const long long* values) {
    run(kernel, values, std::index_sequence_for<P...>());
}
