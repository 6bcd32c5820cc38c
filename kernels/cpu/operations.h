// One operation of a program, with its weights packed for the instructions that are used.

#pragma once

#include "floats.h"
#include "program.h"

#include <vector>

namespace nnturbo {

// A value of a program.
struct Map {
  Size buffer, channels, size[3];
  Size padded;  // channels in memory
  Size voxels() const { return size[0] * size[1] * size[2]; }
};

// Where the values lie while a program runs: those of `images` tiles, one after the other. More than one share their
// operations as planes, so only where all maps have one plane.
struct Memory {
  const Map* maps;
  const float* input;
  float* const* buffers;
  Size images;
  float* logits;
  const float* from(Size value) const { return value ? to(value) : input; }
  float* to(Size value) const { return buffers[maps[value].buffer]; }
};

// Panels of weights, in float32 or in int16.
class Panels {
 public:
  Panels() = default;
  explicit Panels(Floats numbers) : numbers_(std::move(numbers)) {}

  // Multiply in int16 from now on, with as many parts as a direct convolution has taps along z and y.
  void narrow(Size parts, Size depth, const Kernels& kernels);

  Weights weights() const;
  Size bytes() const { return numbers_.bytes() + in_int16_.bytes() + scales_.bytes(); }

 private:
  Floats numbers_, scales_;
  Values<std::int16_t> in_int16_;
};

class Operation {
 public:
  // What it is given must fit, see check.h.
  Operation(const nnturbo_operation& given, const std::vector<Map>& maps, const Kernels& kernels);

  // Compute its output but for the norm, and then that.
  void compute(const Memory& memory) const;
  void normalise(const Memory& memory) const;
  Size weight_bytes() const;

 private:
  void pack_convolution(const std::vector<Map>& maps);
  void convolve(const Memory& memory) const;
  void concatenate(const Memory& memory) const;
  void pool(const Memory& memory) const;

  const Kernels* kernels_;
  nnturbo_operation of_;  // without its tensors, which are not kept
  bool normalises_;
  Map finer_{};  // what the first input is made into, where it is
  Panels weight_, upsampling_weight_;
  Floats bias_, scale_, shift_, upsampling_bias_;
};

// Whether a convolution goes by fewer products along z alone, with one input that stays as it is.
bool goes_along_z(const nnturbo_operation& operation);

// The first input of a convolution as it is read, which may be made from a coarser one.
Map first_input(const nnturbo_operation& operation, const std::vector<Map>& maps, Size lanes);

}  // namespace nnturbo
