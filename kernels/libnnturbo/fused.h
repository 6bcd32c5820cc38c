// Functions that multiply and add with one rounding, as torch does; the processor has been asked before they are called.

#pragma once

#if defined(__x86_64__)
#define FUSED __attribute__((target("avx2,fma")))
#else
#define FUSED
#endif
