#include <c10/core/DeviceGuard.h>
#include <nnturbo_torch/engine.h>
#include <torch/cuda.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <sstream>

#include "bundle.h"
#include "path.h"

namespace nnturbo_torch {
namespace {

using torch::Tensor;

void check_device(const std::filesystem::path& folder, const Bundle& bundle, torch::Device device) {
  const std::string kind = c10::DeviceTypeName(device.type(), /*lower_case=*/true);
  if (kind != bundle.device) {
    throw Error(folder.string() + ": this bundle was built for device " + bundle.device + ", it cannot run on " + kind +
                "; choose device " + bundle.device + ", or build one on a machine with " + kind);
  }
  if (device.is_cuda() && (!torch::cuda::is_available() ||
                           std::max<int>(device.index(), 0) >= static_cast<int>(torch::cuda::device_count()))) {
    throw Error("device " + device.str() + " is not there: libtorch sees " +
                std::to_string(torch::cuda::device_count()) +
                " CUDA devices; use a bundle for the CPU, or a CUDA build of libtorch and a driver");
  }
}

void check_options(const Options& options) {
  if (!(options.tile_step_size > 0 && options.tile_step_size <= 1)) {
    throw Error("tile_step_size must be in (0, 1], got " + std::to_string(options.tile_step_size));
  }
}

void check_spacing(const std::array<double, 3>& spacing_mm) {
  for (const double step_mm : spacing_mm) {
    if (!std::isfinite(step_mm) || step_mm <= 0) {
      throw Error("spacing must be three finite numbers of mm above 0 (z, y, x), got " + std::to_string(step_mm));
    }
  }
}

/// The scan as (C, Z, Y, X), for a model of that many channels.
Tensor checked(const Tensor& image, std::size_t channels) {
  if (!image.defined() || (image.dim() != 3 && image.dim() != 4) || image.numel() == 0 || image.is_complex()) {
    std::ostringstream found;
    if (image.defined()) found << image.sizes() << " of " << image.scalar_type();
    throw Error("an image must be a tensor (C, Z, Y, X) or (Z, Y, X) of real numbers and not empty, got " +
                (image.defined() ? found.str() : "none"));
  }
  const Tensor scan = image.dim() == 3 ? image.unsqueeze(0) : image;
  if (scan.size(0) != static_cast<std::int64_t>(channels)) {
    throw Error("the model takes " + std::to_string(channels) + " channel(s), got " + std::to_string(scan.size(0)) +
                "; pass all channels in the order of training");
  }
  // Least and greatest value show NaN and infinity without a mask in memory.
  if (scan.is_floating_point() &&
      !(std::isfinite(scan.min().item<double>()) && std::isfinite(scan.max().item<double>()))) {
    throw Error("voxels must be finite, got NaN or infinity; replace them");
  }
  return scan;
}

}  // namespace

Engine::Engine(const std::filesystem::path& folder, torch::Device device) : device_(device) {
  const Bundle bundle = read_bundle(folder);
  check_device(folder, bundle, device);
  path_ = bundle.backend == NATIVE ? load_native_path(bundle) : load_script_path(bundle, device);
}

Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;
Engine::~Engine() = default;

Prediction Engine::predict(const Tensor& image, std::array<double, 3> spacing_mm, const Options& options) const {
  const torch::InferenceMode no_gradients;
  const c10::DeviceGuard on_device(device_);
  check_options(options);
  check_spacing(spacing_mm);
  const Tensor scan = checked(image, path_->channels);
  Prediction prediction;
  try {
    Answer answer = path_->run(scan, spacing_mm, options);
    prediction.segmentation = answer.segmentation;
    prediction.class_probabilities = std::move(answer.class_probabilities);
  } catch (const std::exception& error) {
    throw Error("the prediction failed: " + reason(error));
  }
  const auto& classes = prediction.class_probabilities;
  if (!classes.empty()) {
    prediction.class_label = std::max_element(classes.begin(), classes.end()) - classes.begin();
    prediction.class_name = class_names().at(*prediction.class_label);
  }
  return prediction;
}

const std::vector<std::string>& Engine::class_names() const { return path_->class_names; }
const std::vector<std::string>& Engine::label_names() const { return path_->label_names; }
const std::string& Engine::reader() const { return path_->reader; }
std::size_t Engine::channels() const { return path_->channels; }

}  // namespace nnturbo_torch
