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
  Floats weight_, bias_, scale_, shift_, upsampling_weight_, upsampling_bias_;
};

// The first input of a convolution as it is read, which may be made from a coarser one.
Map first_input(const nnturbo_operation& operation, const std::vector<Map>& maps, Size lanes);

}  // namespace nnturbo
