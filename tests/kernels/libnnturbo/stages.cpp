// The stages of libnnturbo as functions of C, for ctypes. Each gives 0, or a status and a text.

#include <algorithm>
#include <cstring>
#include <new>
#include <string>

#include "error.h"
#include "prediction.h"

#define STAGE extern "C" __attribute__((visibility("default"))) int

using namespace nnturbo;

namespace {

template <class Work>
int guarded(char* text, const Work& work) {
  try {
    work();
    return 0;
  } catch (const Error& error) {
    std::strncpy(text, error.what(), 1023);
    return error.status;
  } catch (const std::bad_alloc&) {
    return NNTURBO_NO_MEMORY;
  }
}

const Resampling& resampling_of(const Plan& plan, int logits) {
  return logits ? plan.resampling_logits : plan.resampling_data;
}

// A network that Python runs.
class Callback : public Network {
 public:
  using Function = void (*)(const float* tile, float* seg_logits, float* class_logits);
  explicit Callback(Function function) : function_(function) {}
  void run(const float* tile, float* seg_logits, float* class_logits) const override {
    function_(tile, seg_logits, class_logits);
  }

 private:
  Function function_;
};

Triple triple(const Size* from) { return {from[0], from[1], from[2]}; }
Spacing spacing(const double* from) { return {from[0], from[1], from[2]}; }

}  // namespace

// An operator, as a matrix (n_out, n_in); `mode` is "" for the spline of an order.
STAGE stage_operator(Size n_in, Size n_out, Size order, const char* mode, float* matrix, char* text) {
  return guarded(text, [&] {
    const AxisOperator axis = *mode ? torch_operator(n_in, n_out, mode) : spline_operator(n_in, n_out, order);
    for (Size i = 0; i < n_out; ++i)
      for (Size t = 0; t < axis.taps; ++t) matrix[i * n_in + axis.first[i] + t] = axis.weights[i * axis.taps + t];
  });
}

// Resample (C, Z, Y, X) to the planes [start, stop) of another grid.
STAGE stage_resample(const char* plan_text, int logits, const float* data, Size channels, const Size* shape,
                     const Size* new_shape, const double* old_spacing, const double* new_spacing, Size start, Size stop,
                     float* out, char* text) {
  return guarded(text, [&] {
    const Threads threads(2);
    const Plan plan = parse_plan(plan_text);
    const GridMap grid = grid_map(resampling_of(plan, logits), triple(shape), triple(new_shape), spacing(old_spacing),
                                  spacing(new_spacing));
    Array whole(channels, triple(shape));
    std::copy_n(data, whole.values.size(), whole.values.begin());
    Limits limits(channels, grid);
    limits.include(whole, 0, grid);
    const Range needed = grid.axes[0].inputs_of(start, stop);
    Array part(channels, {needed.stop - needed.start, whole.shape[1], whole.shape[2]});
    for (Size channel = 0; channel < channels; ++channel)
      std::copy_n(whole.plane(channel, needed.start), part.shape[0] * part.plane_size(), part.plane(channel, 0));
    const Array planes = resample_rows(part, grid, start, stop, needed.start, limits);
    std::copy(planes.values.begin(), planes.values.end(), out);
  });
}

// Find the grid, and where `planes` is not null, make all planes; also what was cropped and the filled mask.
STAGE stage_preprocess(const char* plan_text, const nnturbo_scan* scan, Size* shape, Size* box, float* numbers,
                       float* planes, char* text) {
  return guarded(text, [&] {
    const Threads threads(2);
    const Plan plan = parse_plan(plan_text);
    const Case made = preprocess(*scan, plan);
    for (int axis = 0; axis < 3; ++axis) {
      shape[axis] = made.shape()[axis];
      box[2 * axis] = made.box[axis].start;
      box[2 * axis + 1] = made.box[axis].stop;
    }
    for (const Normalization& each : made.normalizations)
      for (const float number : {each.low, each.high, each.shift, each.scale}) *numbers++ = number;
    if (!planes) return;
    const Array all = made.planes(0, made.shape()[0]);
    std::copy(all.values.begin(), all.values.end(), planes);
  });
}

STAGE stage_filled_mask(const nnturbo_scan* scan, std::uint8_t* mask, char* text) {
  return guarded(text, [&] {
    const auto filled = filled_mask(ScanView::of(*scan));
    std::copy(filled.begin(), filled.end(), mask);
  });
}

// First voxels of tiles; `count` is how many fit, and becomes how many there are.
STAGE stage_tile_positions(Size length, Size patch, double step, Size* positions, Size* count, char* text) {
  return guarded(text, [&] {
    const auto found = tile_positions(length, patch, step);
    std::copy_n(found.begin(), std::min<Size>(*count, static_cast<Size>(found.size())), positions);
    *count = static_cast<Size>(found.size());
  });
}

STAGE stage_axis_weights(Size length, Size patch, const Size* positions, Size count, float* weights, char* text) {
  return guarded(text, [&] {
    for (const auto& of_tile : axis_weights(length, patch, {positions, positions + count}))
      weights = std::copy(of_tile.begin(), of_tile.end(), weights);
  });
}

// Copy a tile of (C, Z, Y, X), and add it to sums (C, Z, Y, X) at another place, as if it were logits of that view.
STAGE stage_gather_and_add(const float* volume, Size channels, const Size* shape, const Size* corner, const Size* size,
                           const int* flips, const float* weights, const Size* place, const Size* sums_shape,
                           float* tile, float* sums, char* text) {
  return guarded(text, [&] {
    const Threads threads(2);
    Array from(channels, triple(shape)), to(channels, triple(sums_shape));
    std::copy_n(volume, from.values.size(), from.values.begin());
    std::copy_n(sums, to.values.size(), to.values.begin());
    const View view{flips[0] != 0, flips[1] != 0, flips[2] != 0};
    gather_tile(from, triple(corner), triple(size), view, tile);
    accumulate_view(tile, view, {weights, weights + size[0], weights + size[0] + size[1]}, triple(place), triple(size),
                    to);
    std::copy(to.values.begin(), to.values.end(), sums);
  });
}

STAGE stage_mean_focus(const float* logits, Size outputs, const Size* shape, const Size* channels, Size count,
                       int regions, float* mean, char* text) {
  return guarded(text, [&] {
    const Threads threads(2);
    Array all(outputs, triple(shape));
    std::copy_n(logits, all.values.size(), all.values.begin());
    *mean = mean_focus(all, {channels, channels + count}, regions);
  });
}

// The whole path around a network that Python runs; `runs` counts its calls, and cancels after so many.
STAGE stage_predict(const char* plan_text, const nnturbo_scan* scan, double step, int mirror, Callback::Function network,
                    Size* runs, std::uint8_t* labels, double* volumes, double* probabilities, char* text) {
  return guarded(text, [&] {
    const Threads threads(2);
    const Plan plan = parse_plan(plan_text);
    const Size most = *runs;
    const Prediction found = predict(*scan, plan, Callback(network), {step, mirror != 0}, [&](Size done, Size) {
      *runs = done;
      if (done == most) throw Error(NNTURBO_CANCELLED, "cancelled");
    });
    std::copy(found.labels.begin(), found.labels.end(), labels);
    std::copy(found.volumes_ml.begin(), found.volumes_ml.end(), volumes);
    std::copy(found.class_probabilities.begin(), found.class_probabilities.end(), probabilities);
  });
}
