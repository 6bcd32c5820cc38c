// Makes programs of their descriptions, and runs them.

#include "program.h"

#include "check.h"
#include "head.h"
#include "operations.h"

#include <chrono>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

using nnturbo::Floats;
using nnturbo::Map;
using nnturbo::Memory;
using nnturbo::Operation;
using nnturbo::Size;

struct nnturbo_program {
  std::vector<Map> maps;
  std::vector<Operation> operations;
  Size logits;
  std::optional<nnturbo::Head> head;
  std::vector<Size> features;
  // Whether several tiles are computed at once: of a 2D network all maps have one plane, and nothing reaches beyond it. In
  // int16 tiles would change each other.
  bool shares_operations;

  // Floats of each buffer for so many tiles at once.
  std::vector<Size> buffer_sizes(Size images) const {
    std::vector<Size> sizes(maps.size(), 0);
    for (const Map& map : maps)
      if (map.buffer >= 0) sizes[map.buffer] = std::max(sizes[map.buffer], images * map.voxels() * map.padded);
    return sizes;
  }
};

namespace {

constexpr Size PLANES_AT_ONCE = 8;  // of 2D networks, which then read their weights once for all
constexpr Size VOXELS_AT_ONCE = 4096;

nnturbo_program* make(const nnturbo_description& description) {
  const nnturbo::Kernels* const kernels = nnturbo::kernels();
  if (!kernels) throw std::invalid_argument("this processor is too old for nnturbo's kernels, which need AVX2 and FMA");
  auto program = std::make_unique<nnturbo_program>();
  program->maps = nnturbo::maps_of(description, kernels->lanes);
  nnturbo::check(description, program->maps);
  for (Size index = 0; index < description.operation_count; ++index)
    program->operations.emplace_back(description.operations[index], program->maps, *kernels);
  program->logits = description.logits;
  program->features.assign(description.features, description.features + description.feature_count);
  if (description.head.kind != NNTURBO_NO_HEAD) program->head.emplace(description.head, program->maps, program->logits);
  program->shares_operations = true;
  for (const Map& map : program->maps) program->shares_operations &= map.size[0] == 1;
  for (Size index = 0; index < description.operation_count; ++index) {
    const nnturbo_operation& operation = description.operations[index];
    program->shares_operations &= operation.taps[0] <= 1 && operation.stride[0] <= 1 && !operation.in_int16;
  }
  return program.release();
}

// From channels first to channels last.
void interleave(const float* from, Size channels, Size voxels, float* to) {
  nnturbo::in_parallel((voxels + VOXELS_AT_ONCE - 1) / VOXELS_AT_ONCE, [&](Size task) {
    const Size end = std::min(voxels, (task + 1) * VOXELS_AT_ONCE);
    for (Size channel = 0; channel < channels; ++channel)
      for (Size voxel = task * VOXELS_AT_ONCE; voxel < end; ++voxel)
        to[voxel * channels + channel] = from[channel * voxels + voxel];
  });
}

// Without the channels that fill up vectors.
void give_out(const float* from, const Map& map, Size images, float* to) {
  for (Size voxel = 0; voxel < images * map.voxels(); ++voxel)
    std::memcpy(to + voxel * map.channels, from + voxel * map.padded, map.channels * sizeof(float));
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// With `seconds`, two numbers for each operation are written there.
void run(const nnturbo_program& program, Size tiles, const float* input, float* logits, float* class_logits,
         float* const* features, double* seconds) {
  const Map &tile = program.maps[0], &last = program.maps[program.logits];
  const Size at_once = program.shares_operations ? std::min(tiles, PLANES_AT_ONCE) : 1;
  const std::vector<Size> sizes = program.buffer_sizes(at_once);
  if (std::accumulate(sizes.begin(), sizes.end(), 0.0) * sizeof(float) > nnturbo::memory_bytes()) throw std::bad_alloc();
  std::vector<Floats> memory;
  std::vector<float*> buffers;
  for (const Size size : sizes) {
    memory.emplace_back(size);
    buffers.push_back(memory.back().data());
  }
  for (Size first = 0; first < tiles; first += at_once) {
    const Size images = std::min(at_once, tiles - first), values = tile.channels * tile.voxels();
    const float* given = input + first * values;
    if (tile.channels > 1) {
      for (Size image = 0; image < images; ++image)
        interleave(given + image * values, tile.channels, tile.voxels(), buffers[tile.buffer] + image * values);
      given = buffers[tile.buffer];
    }
    const Memory lies{program.maps.data(), given, buffers.data(), images,
                      logits + first * last.channels * last.voxels()};
    for (std::size_t index = 0; index < program.operations.size(); ++index) {
      const double start = now();
      program.operations[index].compute(lies);
      const double computed = now();
      program.operations[index].normalise(lies);
      if (!seconds) continue;
      seconds[2 * index] = computed - start;
      seconds[2 * index + 1] = now() - computed;
    }
    if (program.head && class_logits) program.head->run(lies, class_logits + first * program.head->classes());
    for (std::size_t index = 0; features && index < program.features.size(); ++index) {
      const Size value = program.features[index];
      const Map& map = program.maps[value];
      give_out(lies.from(value), map, images, features[index] + first * map.channels * map.voxels());
    }
  }
}

// Memory that was freed, and that the C library keeps: up to a third of all.
void give_back() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

// 0, or 1 where memory is short.
template <class Work>
int guarded(int threads, const Work& work) {
  try {
    const nnturbo::Threads working(threads);
    work();
    give_back();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace

nnturbo_program* nnturbo_program_create(const nnturbo_description* description, int threads, char* error,
                                        size_t error_size) {
  std::string reason;
  try {
    const nnturbo::Threads working(threads);
    nnturbo_program* const program = make(*description);
    give_back();
    return program;
  } catch (const std::bad_alloc&) {
    reason = "the network needs more memory than there is";
  } catch (const std::exception& failure) {
    reason = failure.what();
  }
  if (error_size > 0) {
    const std::size_t length = std::min(error_size - 1, reason.size());
    std::memcpy(error, reason.data(), length);
    error[length] = 0;
  }
  return nullptr;
}

void nnturbo_program_destroy(nnturbo_program* program) { delete program; }

void nnturbo_program_shapes(const nnturbo_program* program, nnturbo_shapes* shapes) {
  const Map& tile = program->maps[0];
  *shapes = {tile.channels, {tile.size[0], tile.size[1], tile.size[2]}, program->maps[program->logits].channels,
             program->head ? program->head->classes() : 0, 0, 0};
  for (const Operation& operation : program->operations) shapes->weight_bytes += operation.weight_bytes();
  for (const Size size : program->buffer_sizes(1)) shapes->buffer_bytes += size * static_cast<Size>(sizeof(float));
}

int nnturbo_program_run(const nnturbo_program* program, int64_t tiles, const float* input, float* logits,
                        float* class_logits, float* const* features, int threads) {
  return guarded(threads, [&] { run(*program, tiles, input, logits, class_logits, features, nullptr); });
}

int nnturbo_program_measure(const nnturbo_program* program, const float* input, float* logits, double* seconds,
                            int threads) {
  return guarded(threads, [&] { run(*program, 1, input, logits, nullptr, nullptr, seconds); });
}
