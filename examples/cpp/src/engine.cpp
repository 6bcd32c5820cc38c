#include <c10/core/DeviceGuard.h>
#include <nnturbo/engine.h>
#include <torch/csrc/jit/runtime/jit_exception.h>
#include <torch/cuda.h>
#include <torch/script.h>
#include <torch/version.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <sstream>

#include "bundle.h"
#include "network.h"

namespace nnturbo {
namespace {

using torch::Tensor;
using torch::jit::IValue;

/// What torch says about a failure, without its stack traces.
std::string reason(const std::exception& error) {
  if (const auto* raised = dynamic_cast<const torch::jit::JITException*>(&error)) {
    if (const auto message = raised->getOriginalMsg()) return *message;
  }
  const auto* known = dynamic_cast<const c10::Error*>(&error);
  std::string text = known != nullptr ? known->what_without_backtrace() : error.what();
  // TorchScript puts the place in its code first, and what happened last.
  if (const auto last = text.find("Error: "); last != std::string::npos) text = text.substr(last + 7);
  return text.substr(0, text.find('\n'));
}

std::vector<std::string> texts(const IValue& list) {
  std::vector<std::string> values;
  for (const IValue& value : list.toListRef()) values.push_back(value.toStringRef());
  return values;
}

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

/// Number of tiles of a case. Its state is a named tuple, and in bundles of earlier versions a dictionary.
std::int64_t count_tiles(const IValue& state) {
  if (state.isGenericDict()) return state.toGenericDict().at("tiles").toTensor().size(0);
  const auto type = state.type()->expect<c10::TupleType>();
  const auto names = type->names().value();
  const auto index = std::find(names.begin(), names.end(), "tiles") - names.begin();
  return state.toTupleRef().elements().at(index).toTensor().size(0);
}

}  // namespace

struct Engine::Loaded {
  torch::Device device;
  std::unique_ptr<const Network> network;
  /// What lies between a scan and the network: resampling, normalisation, tiles, sums, labels; no weights.
  torch::jit::Module path;
  std::vector<std::string> class_names, label_names;
  std::size_t channels;

  static std::unique_ptr<const Loaded> load(const Bundle& bundle, torch::Device device);
  std::pair<Tensor, Tensor> run(const Tensor& scan, const std::array<double, 3>& spacing_mm,
                                const Options& options) const;
};

std::unique_ptr<const Engine::Loaded> Engine::Loaded::load(const Bundle& bundle, torch::Device device) {
  const c10::DeviceGuard on_device(device);
  auto file = bundle.network;
  try {
    auto network = load_network(bundle, device);
    file = bundle.path;
    auto path = torch::jit::load(file.string(), device);
    auto class_names = texts(path.attr("class_names")), label_names = texts(path.attr("label_names"));
    const auto channels = static_cast<std::size_t>(path.attr("channels").toInt());
    return std::unique_ptr<const Loaded>(new Loaded{device, std::move(network), std::move(path), std::move(class_names),
                                                    std::move(label_names), channels});
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    throw Error(file.string() + ": libtorch " TORCH_VERSION " cannot load this file: " + reason(error) +
                "; build the bundle again, with the version of torch that this program uses");
  }
}

/// The whole path from a scan to its labels and class probabilities.
std::pair<Tensor, Tensor> Engine::Loaded::run(const Tensor& scan, const std::array<double, 3>& spacing_mm,
                                              const Options& options) const {
  const c10::List<double> spacing({spacing_mm[0], spacing_mm[1], spacing_mm[2]});
  IValue state = path.get_method("start")({scan.to(device), spacing, options.tile_step_size, options.mirror});
  const auto tiles = count_tiles(state);
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const Tensor views = path.get_method("views")({state, tile}).toTensor();
    const auto logits = network->run(views);
    const IValue class_logits = logits.size() > 1 ? IValue(logits[1]) : IValue();
    state = path.get_method("add")({state, tile, logits.at(0), class_logits});
  }
  const auto answer = path.get_method("finish")({state});
  const auto& parts = answer.toTupleRef().elements();
  return {parts.at(0).toTensor().cpu(), parts.at(1).toTensor().to(torch::kCPU, torch::kFloat).contiguous()};
}

Engine::Engine(const std::filesystem::path& bundle, torch::Device device) {
  const Bundle verified = read_bundle(bundle);
  check_device(bundle, verified, device);
  loaded_ = Loaded::load(verified, device);
}

Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;
Engine::~Engine() = default;

Prediction Engine::predict(const Tensor& image, std::array<double, 3> spacing_mm, const Options& options) const {
  const torch::InferenceMode no_gradients;
  const c10::DeviceGuard on_device(loaded_->device);
  check_options(options);
  check_spacing(spacing_mm);
  const Tensor scan = checked(image, loaded_->channels);
  Prediction prediction;
  try {
    const auto [labels, probabilities] = loaded_->run(scan, spacing_mm, options);
    const auto* first = probabilities.data_ptr<float>();
    prediction.segmentation = labels;
    prediction.class_probabilities.assign(first, first + probabilities.numel());
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

const std::vector<std::string>& Engine::class_names() const { return loaded_->class_names; }
const std::vector<std::string>& Engine::label_names() const { return loaded_->label_names; }
std::size_t Engine::channels() const { return loaded_->channels; }

}  // namespace nnturbo
