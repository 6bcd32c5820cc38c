// What a U-Net's time goes into, in float32 on CPUs: convolutions, transposed convolutions, instance norms.
//
// Layout: channels last, (z, y, x, channel).

// Compiled once for each set of instructions, with VARIANT as the name of the table of its functions. It keeps to
// functions of its own, local to it: see kernels.h.

#include "along_z.h"
#include "direct.h"
#include "transformed.h"

namespace nnturbo {
namespace {

constexpr Size VOXELS_AT_ONCE = 1024;

void project(Size voxels, Size inputs, Size outputs, const float* from, const Weights& weights, const float* bias,
             float* to) {
  in_parallel((voxels + VOXELS_AT_ONCE - 1) / VOXELS_AT_ONCE, [&](Size task) {
    const Size start = task * VOXELS_AT_ONCE, count = least(voxels - start, VOXELS_AT_ONCE);
    float* const rows = scratch(count * COLUMNS);
    const Rows values{from + start * inputs};
    for (Size column = 0; column < outputs; column += COLUMNS) {
      multiply_rows({&values, 1, inputs, panel_of(weights, column / COLUMNS, inputs), inputs, bias + column, rows,
                     COLUMNS, outputs - column},
                    0, count);
      for (Size lane = 0; lane < least(COLUMNS, outputs - column); ++lane)
        for (Size voxel = 0; voxel < count; ++voxel)
          to[(column + lane) * voxels + start + voxel] = rows[voxel * COLUMNS + lane];
    }
  });
}

void normalise(Size voxels, Size channels, const float* scale, const float* shift, float epsilon, const float* residual,
               float slope, float* values) {
  const Size tasks = (voxels + VOXELS_AT_ONCE - 1) / VOXELS_AT_ONCE;
  const Array<float> partial_sums(tasks * 2 * channels), around(channels), by(channels), plus(channels);
  // Around the first voxel's value, so that large means do not drown small variances.
  copy_floats(values, channels, around.data());
  in_parallel(tasks, [&](Size task) {
    float* partial = partial_sums.data() + task * 2 * channels;
    const Size end = least(voxels, (task + 1) * VOXELS_AT_ONCE);
    for (Size channel = 0; channel < channels; channel += LANES) {
      const Vector middle = load(around.data() + channel);
      Vector sum{}, squares{};
      for (Size voxel = task * VOXELS_AT_ONCE; voxel < end; ++voxel) {
        const Vector value = load(values + voxel * channels + channel) - middle;
        sum += value;
        squares += value * value;
      }
      store(partial + channel, sum);
      store(partial + channels + channel, squares);
    }
  });
  for (Size channel = 0; channel < channels; ++channel) {
    double sum = 0, squares = 0;
    for (Size task = 0; task < tasks; ++task) {
      sum += partial_sums[task * 2 * channels + channel];
      squares += partial_sums[(task * 2 + 1) * channels + channel];
    }
    const double mean = sum / voxels, variance = squares / voxels - mean * mean;
    const double factor = scale[channel] / std::sqrt((variance > 0 ? variance : 0) + epsilon);
    by[channel] = static_cast<float>(factor);
    plus[channel] = static_cast<float>(shift[channel] - (mean + around[channel]) * factor);
  }
  in_parallel(tasks, [&](Size task) {
    const Size end = least(voxels, (task + 1) * VOXELS_AT_ONCE);
    for (Size voxel = task * VOXELS_AT_ONCE; voxel < end; ++voxel)
      for (Size channel = 0; channel < channels; channel += LANES) {
        const Size at = voxel * channels + channel;
        Vector value = load(values + at) * load(by.data() + channel) + load(plus.data() + channel);
        if (residual) value += load(residual + at);
        store(values + at, value > 0.0f ? value : value * slope);
      }
  });
}

}  // namespace

extern const Kernels VARIANT;
const Kernels VARIANT{LANES, COLUMNS, weights_size, transform_weights, NARROW_PANELS, convolve, convolve_along_z,
                      convolve_directly, spread, project, normalise};

}  // namespace nnturbo
