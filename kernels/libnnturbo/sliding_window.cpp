#include "sliding_window.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "error.h"
#include "fused.h"

namespace nnturbo {
namespace {

// The input of each row of tiles in turn, padded along z; planes that rows share are kept.
class RowInputs {
 public:
  RowInputs(const Case& scan, const Window& window, Size depth)
      : scan_(scan), window_(window), depth_(depth), buffer_(scan.scan.channels, {depth, window.shape[1], window.shape[2]}) {}

  const Array& advance() {
    const Size top = window_.starts[0][row_];
    const Size held = row_ == 0 ? top : window_.starts[0][row_ - 1] + depth_;  // planes above are there
    const Size start = std::max(top, held), stop = top + depth_;
    ++row_;
    shift_planes(buffer_, stop - start);
    const Size before = window_.before[0];
    const Size first = std::max<Size>(start - before, 0), last = std::min(stop - before, window_.shape[0]);
    if (first < last) {
      const Array planes = scan_.planes(first, last);
      for (Size channel = 0; channel < buffer_.channels; ++channel)
        std::memcpy(buffer_.plane(channel, first + before - top), planes.plane(channel, 0),
                    (last - first) * buffer_.plane_size() * sizeof(float));
    }
    return buffer_;
  }

 private:
  const Case& scan_;
  const Window& window_;
  const Size depth_;
  Array buffer_;
  Size row_ = 0;
};

FUSED void add_line(const float* logits, Size step, float weight, const float* weights, Size count, float* sums) {
  if (step == 1)
    for (Size x = 0; x < count; ++x) sums[x] = __builtin_fmaf(logits[x], weight * weights[x], sums[x]);
  else
    for (Size x = 0; x < count; ++x) sums[x] = __builtin_fmaf(logits[-x], weight * weights[x], sums[x]);
}

void require_finite(const Array& sums, Size first, Size last) {
  for (Size channel = 0; channel < sums.channels; ++channel) {
    const float *from = sums.plane(channel, first), *to = from + (last - first) * sums.plane_size();
    if (!std::all_of(from, to, [](float value) { return std::isfinite(value); }))
      throw Error(NNTURBO_BAD_NETWORK, "the network's logits must be finite, got NaN or infinity: its weights are damaged");
  }
}

}  // namespace

void predict_logits(const Case& scan, const Network& network, const Plan& plan, const Window& window, Size views,
                    LabelPlanes& labels, Votes* votes, const Progress& progress) {
  const Triple& patch = plan.patch_size;
  const Size outputs = plan.labels.num_outputs;
  RowInputs inputs(scan, window, patch[0]);
  const Size all = window.rows() * window.tiles_of_row() * views;
  const bool is_alone = all == 1;  // all weights of the only tile are 1
  Array sums(outputs, {patch[0], window.padded[1], window.padded[2]});
  Array tile(scan.scan.channels, patch), of_view(is_alone ? 0 : outputs, patch);
  Array& logits = is_alone ? sums : of_view;
  Size done = 0;
  progress(done, all);
  for (Size row = 0; row < window.rows(); ++row) {
    const Array& volume = inputs.advance();
    for (std::size_t y = 0; y < window.starts[1].size(); ++y)
      for (std::size_t x = 0; x < window.starts[2].size(); ++x) {
        const Triple place{0, window.starts[1][y], window.starts[2][x]};
        const Triple read_from{0, place[1] - window.before[1], place[2] - window.before[2]};
        for (Size view = 0; view < views; ++view) {
          gather_tile(volume, read_from, patch, plan.views[view], tile.values.data());
          network.run(tile.values.data(), logits.values.data(), votes ? votes->next_logits() : nullptr);
          if (votes) votes->add(logits);
          if (!is_alone)
            accumulate_view(logits.values.data(), plan.views[view],
                            {window.weights[0][row].data(), window.weights[1][y].data(), window.weights[2][x].data()},
                            place, patch, sums);
          progress(++done, all);
        }
      }
    // The planes that no later row adds to, without padding along z.
    const Size top = window.starts[0][row];
    const Size bottom = row + 1 < window.rows() ? window.starts[0][row + 1] : window.padded[0];
    const Size first = std::max<Size>(window.before[0] - top, 0);
    const Size last = std::min(window.before[0] + window.shape[0], bottom) - top;
    if (first < last) {
      require_finite(sums, first, last);
      labels.add(sums, first, last, window.before);
    }
    shift_planes(sums, bottom - top);
  }
}

void gather_tile(const Array& volume, const Triple& corner, const Triple& size, const View& view, float* to) {
  parallel(volume.channels * size[0], [&](Size task) {
    const Size channel = task / size[0], row = task % size[0];
    const Size z = corner[0] + (view[0] ? size[0] - 1 - row : row);
    float* plane = to + task * size[1] * size[2];
    std::fill_n(plane, size[1] * size[2], 0.0f);
    if (z < 0 || z >= volume.shape[0]) return;
    const Size low = std::max<Size>(corner[2], 0), high = std::min(corner[2] + size[2], volume.shape[2]);
    for (Size i = 0; i < size[1]; ++i) {
      const Size y = corner[1] + (view[1] ? size[1] - 1 - i : i);
      if (y < 0 || y >= volume.shape[1] || low >= high) continue;
      const float* from = volume.plane(channel, z) + y * volume.shape[2];
      float* line = plane + i * size[2];
      if (view[2])
        std::reverse_copy(from + low, from + high, line + corner[2] + size[2] - high);
      else
        std::copy(from + low, from + high, line + low - corner[2]);
    }
  });
}

void accumulate_view(const float* logits, const View& view, const std::array<const float*, 3>& weights,
                     const Triple& corner, const Triple& size, Array& sums) {
  parallel(sums.channels * size[0], [&](Size task) {
    const Size channel = task / size[0], z = task % size[0];
    std::vector<float> plane_weights(size[2]);
    for (Size y = 0; y < size[1]; ++y) {
      for (Size x = 0; x < size[2]; ++x) plane_weights[x] = weights[1][y] * weights[2][x];
      const Size from_z = view[0] ? size[0] - 1 - z : z, from_y = view[1] ? size[1] - 1 - y : y;
      const float* from = logits + ((channel * size[0] + from_z) * size[1] + from_y) * size[2];
      float* to = sums.plane(channel, corner[0] + z) + (corner[1] + y) * sums.shape[2] + corner[2];
      add_line(view[2] ? from + size[2] - 1 : from, view[2] ? -1 : 1, weights[0][z], plane_weights.data(), size[2], to);
    }
  });
}

void shift_planes(Array& buffer, Size planes) {
  const Size depth = buffer.shape[0], dropped = std::min(planes, depth);
  for (Size channel = 0; channel < buffer.channels; ++channel) {
    float* first = buffer.plane(channel, 0);
    const Size kept = (depth - dropped) * buffer.plane_size();
    std::memmove(first, first + dropped * buffer.plane_size(), kept * sizeof(float));
    std::fill_n(first + kept, dropped * buffer.plane_size(), 0.0f);
  }
}

}  // namespace nnturbo
