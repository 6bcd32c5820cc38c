// What the parts of the library of kernels for CPUs share: one table of functions for each set of instructions, compiled
// from convolution.cpp, and below them threads and memory, compiled once for all processors of a kind. Programs that call
// the library see program.h alone.
//
// Functions that are compiled for other instructions than the rest must not be shared by the linker: convolution.cpp has
// no functions and templates of the standard library, and all of its own are local to it.

#pragma once

#include <cstddef>
#include <cstdint>

namespace nnturbo {

using Size = std::int64_t;

// Of a convolution, in panels: numbers, or whole numbers, pairs of rows together, and what each column of them is to be
// multiplied by.
struct Weights {
  Weights(const float* numbers) : values(numbers) {}
  Weights(const std::int16_t* whole_numbers, const float* of_columns) : in_int16(whole_numbers), scales(of_columns) {}
  const float* values = nullptr;
  const std::int16_t* in_int16 = nullptr;
  const float* scales = nullptr;
};

// Maps are (z, y, x, channel) in memory. Those that allocate throw std::bad_alloc.
struct Kernels {
  // Channels come in multiples of `lanes`, but those of a direct convolution's input and of logits; weights in panels of
  // as many `columns`, the last filled up.
  int lanes, columns;

  // Floats of transformed weights: of three taps along each of 1 to 3 axes that convolutions by fewer products go along,
  // with so many taps along the others.
  Size (*weights_size)(Size axes, Size taps, Size inputs, Size outputs);

  // From (outputs, inputs, three for each of those axes, taps) to panels of columns for each position.
  void (*transform_weights)(Size axes, Size taps, Size inputs, Size outputs, const float* from, float* to);

  // Make panels of (parts, depth, columns) whole numbers, with a scale for each column; null for instructions that do not
  // multiply int16. A direct convolution has as many parts as taps along z and y, all others one. What is multiplied by
  // them must have an even number of channels.
  void (*narrow_panels)(Size panels, Size parts, Size depth, const float* from, std::int16_t* to, float* scales);

  // Convolve (z, y, x, inputs), taken from two tensors one after the other, with zeros around it, by fewer products. Of
  // `taps`, those along z, 1 go along y and x; 3 along all axes, and in int16 along z and y. The first tensor may be none
  // and `coarse` in its place, to be spread by `stride` (see below); `to` may be the last one.
  void (*convolve)(Size taps, Size z, Size y, Size x, const float* one, Size channels_one, const float* other,
                   Size channels_other, Size outputs, const Weights& weights, const float* bias, float* to,
                   const float* coarse, Size channels_coarse, const Size* stride, const Weights& spread_weights,
                   const float* spread_bias);

  // Convolve one tensor by fewer products along z alone, with three taps and stride 1 along it, any odd number of taps
  // along y and x, and strides up to those; weights are in float32, and `to` is another tensor.
  void (*convolve_along_z)(const Size* size, const Size* taps, const Size* stride, Size inputs, Size outputs,
                           const float* from, const Weights& weights, const float* bias, float* to);

  // With any odd number of taps and any strides, zeros around; weights are (panels, taps, inputs, columns).
  void (*convolve_directly)(const Size* size, const Size* taps, const Size* stride, Size inputs, Size outputs,
                            const float* from, const Weights& weights, const float* bias, float* to);

  // Each input voxel becomes `stride` output voxels; weights are (stride, panels, inputs, columns).
  void (*spread)(const Size* size, const Size* stride, Size inputs, Size outputs, const float* from,
                 const Weights& weights, const float* bias, float* to);

  // One output channel after the other, (outputs, z, y, x), of each voxel by itself; weights are (panels, inputs,
  // columns), biases as many as panels have columns.
  void (*project)(Size voxels, Size inputs, Size outputs, const float* from, const Weights& weights, const float* bias,
                  float* to);

  // Normalise each channel over all voxels, add a residual where there is one, and damp negative values by `slope`.
  void (*normalise)(Size voxels, Size channels, const float* scale, const float* shift, float epsilon,
                    const float* residual, float slope, float* values);
};

// Those of the instructions that are used; null where this processor has too few.
const Kernels* kernels();

// Whether they and this processor multiply int16.
bool multiplies_int16();

// Threads that work for the one that makes this, as long as it lives; what follows needs them. Whoever has some already
// keeps these.
class Threads {
 public:
  explicit Threads(int count);
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  const bool outer_;
};

// Do tasks 0 to `tasks` - 1 with all threads; the first exception of one of them ends it.
void run(Size tasks, void (*task)(const void* context, Size index), const void* context);

// How many there are.
Size threads();

// Memory for the task that asks, kept for the next one of its thread.
float* scratch(std::size_t floats);

// How much memory this machine has: systems promise more, and end a program that uses it.
double memory_bytes();

// Memory for a while; throws std::bad_alloc.
void* allocate(std::size_t bytes);
void release(void* memory) noexcept;

}  // namespace nnturbo
