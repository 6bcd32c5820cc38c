// Chooses the widest instructions that this processor has.

#include "kernels.h"
#include "program.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
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
// Whether the processor has these bits of its seventh leaf, in ebx and ecx, and the system saves those registers.
bool has(unsigned wanted, unsigned saved, unsigned wanted_too = 0) {
  constexpr unsigned FMA = 1u << 12, OSXSAVE = 1u << 27, AVX = 1u << 28;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & (FMA | OSXSAVE | AVX)) != (FMA | OSXSAVE | AVX)) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & saved) != saved || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (b & wanted) == wanted && (c & wanted_too) == wanted_too;
}

constexpr unsigned AVX2 = 1u << 5, AVX512 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;  // F, DQ, CD, BW, VL
constexpr unsigned VNNI = 1u << 11;
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

}  // namespace

const Kernels* kernels() { return chosen()->kernels; }

bool multiplies_int16() {
#if defined(__x86_64__)
  return kernels() && kernels()->narrow_panels && has(AVX2 | AVX512, ZMM, VNNI);
#else
  return false;
#endif
}

}  // namespace nnturbo

const char* nnturbo_variant() { return nnturbo::chosen()->name; }

int nnturbo_multiplies_int16() { return nnturbo::multiplies_int16(); }

int nnturbo_use(const char* name) {
  for (const nnturbo::Variant* each = nnturbo::variants(); each->name; ++each)
    if (std::strcmp(each->name, name) == 0 && each->runs_here) {
      nnturbo::chosen() = each;
      return 0;
    }
  return 1;
}
