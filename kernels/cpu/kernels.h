// What the parts of the library of kernels for CPUs share: one table of functions for each set of instructions, compiled
// from convolution.cpp, and below them threads and memory, compiled once for all processors of a kind.
//
// Functions that are compiled for other instructions than the rest must not be shared by the linker: convolution.cpp has
// no functions and templates of the standard library, and all of its own are local to it.

#pragma once

#include <cstddef>
#include <cstdint>

namespace nnturbo {

using Size = std::int64_t;

// See dispatch.cpp for what each does; those that allocate throw std::bad_alloc.
struct Kernels {
  int lanes, columns;
  Size (*weights_size)(Size taps, Size inputs, Size outputs);
  void (*transform_weights)(Size taps, Size inputs, Size outputs, const float* from, float* to);
  void (*convolve)(Size taps, Size z, Size y, Size x, const float* one, Size channels_one, const float* other,
                   Size channels_other, Size outputs, const float* weights, const float* bias, float* to,
                   const float* coarse, Size channels_coarse, const Size* stride, const float* spread_weights,
                   const float* spread_bias);
  void (*convolve_directly)(const Size* size, const Size* taps, const Size* stride, Size inputs, Size outputs,
                            const float* from, const float* weights, const float* bias, float* to);
  void (*spread)(const Size* size, const Size* stride, Size inputs, Size outputs, const float* from,
                 const float* weights, const float* bias, float* to);
  void (*project)(Size voxels, Size inputs, Size outputs, const float* from, const float* weights, const float* bias,
                  float* to);
  void (*normalise)(Size voxels, Size channels, const float* scale, const float* shift, float epsilon,
                    const float* residual, float slope, float* values);
};

// Do tasks 0 to `tasks` - 1 with all threads; the first exception of one of them ends it.
void run(Size tasks, void (*task)(const void* context, Size index), const void* context);

// Threads that `run` works with; `resize` changes how many.
Size threads();
void resize(int count);

// Memory for the task that asks, kept for the next one of its thread.
float* scratch(std::size_t floats);

// Memory for a while; throws std::bad_alloc.
void* allocate(std::size_t bytes);
void release(void* memory) noexcept;

}  // namespace nnturbo
