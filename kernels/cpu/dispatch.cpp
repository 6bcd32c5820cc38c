// The functions that programs call, which go to the widest instructions that this processor has.

#include "kernels.h"

#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#if defined(_WIN32)
#define EXPORTED extern "C" __declspec(dllexport)
#else
#define EXPORTED extern "C" __attribute__((visibility("default")))
#endif

namespace nnturbo {

// One from each compilation of convolution.cpp.
#if defined(__x86_64__)
extern const Kernels avx512, avx2;
#else
extern const Kernels neon;
#endif

namespace {

struct Variant {
  const char* name;
  const Kernels* kernels;
  bool runs_here;
};

#if defined(__x86_64__)
// Whether the processor has these bits of its seventh leaf, and the system saves those registers.
bool has(unsigned wanted, unsigned saved) {
  constexpr unsigned FMA = 1u << 12, OSXSAVE = 1u << 27, AVX = 1u << 28;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & (FMA | OSXSAVE | AVX)) != (FMA | OSXSAVE | AVX)) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & saved) != saved || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (b & wanted) == wanted;
}

constexpr unsigned AVX2 = 1u << 5, AVX512 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;  // F, DQ, CD, BW, VL
constexpr unsigned YMM = 0x06, ZMM = 0xe6;
#endif

// The best first.
const Variant* variants() {
  static const Variant all[] = {
#if defined(__x86_64__)
      {"avx512", &avx512, has(AVX2 | AVX512, ZMM)},
      {"avx2", &avx2, has(AVX2, YMM)},
#else
      {"neon", &neon, true},
#endif
      {nullptr, nullptr, true},
  };
  return all;
}

const Variant*& chosen() {
  static const Variant* variant = [] {
    const Variant* best = variants();
    while (!best->runs_here) ++best;
    return best;
  }();
  return variant;
}

const Kernels& kernels() { return *chosen()->kernels; }

// 0, or 1 where there is too little memory: exceptions end here.
template <class Work>
int guarded(const Work& work) {
  try {
    work();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace
}  // namespace nnturbo

using nnturbo::guarded;
using nnturbo::kernels;
using nnturbo::Size;

// The name of the instructions that are used, or null where this processor has too few; then nothing else may be called
// but the next one.
EXPORTED const char* nnturbo_variant() { return nnturbo::chosen()->name; }

// Use those of another name from now on; what was laid out for others is of no use then. 1 where they are not here.
EXPORTED int nnturbo_use(const char* name) {
  for (const nnturbo::Variant* each = nnturbo::variants(); each->name; ++each)
    if (std::strcmp(each->name, name) == 0 && each->runs_here) {
      nnturbo::chosen() = each;
      return 0;
    }
  return 1;
}

// Channels come in multiples of this, and weights in panels of as many columns.
EXPORTED int nnturbo_lanes() { return kernels().lanes; }
EXPORTED int nnturbo_columns() { return kernels().columns; }

// Memory that was freed, and that the C library keeps.
EXPORTED void nnturbo_give_back() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

EXPORTED void nnturbo_threads(int count) { nnturbo::resize(count); }

// Floats of the transformed weights of a kernel of `taps` (1 or 3) x 3 x 3.
EXPORTED Size nnturbo_weights_size(Size taps, Size inputs, Size outputs) {
  return kernels().weights_size(taps, inputs, outputs);
}

// From (outputs, inputs, taps, 3, 3) to panels of columns for each position.
EXPORTED int nnturbo_transform_weights(Size taps, Size inputs, Size outputs, const float* from, float* to) {
  return guarded([&] { kernels().transform_weights(taps, inputs, outputs, from, to); });
}

// Convolve (z, y, x, inputs), taken from two tensors one after the other, with zeros around it. The first may be none and
// `coarse` in its place, to be spread by `stride` (see nnturbo_spread); `to` may be the last one.
EXPORTED int nnturbo_convolve(Size taps, Size z, Size y, Size x, const float* one, Size channels_one, const float* other,
                              Size channels_other, Size outputs, const float* weights, const float* bias, float* to,
                              const float* coarse, Size channels_coarse, const Size* stride,
                              const float* spread_weights, const float* spread_bias) {
  return guarded([&] {
    kernels().convolve(taps, z, y, x, one, channels_one, other, channels_other, outputs, weights, bias, to, coarse,
                       channels_coarse, stride, spread_weights, spread_bias);
  });
}

// With any odd number of taps and any strides, zeros around; weights are (panels, taps, inputs, columns).
EXPORTED int nnturbo_convolve_directly(const Size* size, const Size* taps, const Size* stride, Size inputs, Size outputs,
                                       const float* from, const float* weights, const float* bias, float* to) {
  return guarded([&] {
    kernels().convolve_directly(size, taps, stride, inputs, outputs, from, weights, bias, to);
  });
}

// Each input voxel becomes `stride` output voxels; weights are (stride, panels, inputs, columns).
EXPORTED int nnturbo_spread(const Size* size, const Size* stride, Size inputs, Size outputs, const float* from,
                            const float* weights, const float* bias, float* to) {
  return guarded([&] { kernels().spread(size, stride, inputs, outputs, from, weights, bias, to); });
}

// One output channel after the other, (outputs, z, y, x), of each voxel by itself; weights are (panels, inputs, columns),
// biases as many as panels have columns.
EXPORTED int nnturbo_project(Size voxels, Size inputs, Size outputs, const float* from, const float* weights,
                             const float* bias, float* to) {
  return guarded([&] { kernels().project(voxels, inputs, outputs, from, weights, bias, to); });
}

// Normalise each channel over all voxels, add a residual where there is one, and damp negative values by `slope`.
EXPORTED int nnturbo_normalise(Size voxels, Size channels, const float* scale, const float* shift, float epsilon,
                               const float* residual, float slope, float* values) {
  return guarded([&] { kernels().normalise(voxels, channels, scale, shift, epsilon, residual, slope, values); });
}
