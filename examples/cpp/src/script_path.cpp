#include <c10/core/DeviceGuard.h>
#include <nnturbo_torch/error.h>
#include <torch/csrc/jit/runtime/jit_exception.h>
#include <torch/script.h>
#include <torch/version.h>

#include <algorithm>

#include "network.h"
#include "path.h"

namespace nnturbo_torch {
namespace {

using torch::Tensor;
using torch::jit::IValue;

std::vector<std::string> texts(const IValue& list) {
  std::vector<std::string> values;
  for (const IValue& value : list.toListRef()) values.push_back(value.toStringRef());
  return values;
}

/// Number of tiles of a case. Its state is a named tuple, and in bundles of earlier versions a dictionary.
std::int64_t count_tiles(const IValue& state) {
  if (state.isGenericDict()) return state.toGenericDict().at("tiles").toTensor().size(0);
  const auto type = state.type()->expect<c10::TupleType>();
  const auto names = type->names().value();
  const auto index = std::find(names.begin(), names.end(), "tiles") - names.begin();
  return state.toTupleRef().elements().at(index).toTensor().size(0);
}

class ScriptPath final : public Path {
 public:
  ScriptPath(const Bundle& bundle, torch::Device device)
      : device_(device), network_(load_network(bundle, device)) {}

  void load(const std::string& file) {
    path_ = torch::jit::load(file, device_);
    class_names = texts(path_.attr("class_names"));
    label_names = texts(path_.attr("label_names"));
    channels = static_cast<std::size_t>(path_.attr("channels").toInt());
  }

  Answer run(const Tensor& scan, const std::array<double, 3>& spacing_mm, const Options& options) const override {
    const c10::List<double> spacing({spacing_mm[0], spacing_mm[1], spacing_mm[2]});
    IValue state = path_.get_method("start")({scan.to(device_), spacing, options.tile_step_size, options.mirror});
    const auto tiles = count_tiles(state);
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      const Tensor views = path_.get_method("views")({state, tile}).toTensor();
      const auto logits = network_->run(views);
      const IValue class_logits = logits.size() > 1 ? IValue(logits[1]) : IValue();
      state = path_.get_method("add")({state, tile, logits.at(0), class_logits});
    }
    const auto answer = path_.get_method("finish")({state});
    const auto& parts = answer.toTupleRef().elements();
    const Tensor probabilities = parts.at(1).toTensor().to(torch::kCPU, torch::kFloat).contiguous();
    const auto* first = probabilities.data_ptr<float>();
    return {parts.at(0).toTensor().cpu(), {first, first + probabilities.numel()}};
  }

 private:
  const torch::Device device_;
  const std::unique_ptr<const Network> network_;
  /// What lies between a scan and the network: resampling, normalisation, tiles, sums, labels; no weights.
  torch::jit::Module path_;
};

}  // namespace

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

std::unique_ptr<const Path> load_script_path(const Bundle& bundle, torch::Device device) {
  const c10::DeviceGuard on_device(device);
  auto file = bundle.network;
  try {
    auto path = std::make_unique<ScriptPath>(bundle, device);
    file = bundle.path;
    path->load(file.string());
    return path;
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    throw Error(file.string() + ": libtorch " TORCH_VERSION " cannot load this file: " + reason(error) +
                "; build the bundle again, with the version of torch that this program uses");
  }
}

}  // namespace nnturbo_torch
