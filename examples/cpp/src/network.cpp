#include "network.h"

#include <ATen/Version.h>
#include <nnturbo_torch/error.h>
#include <sys/utsname.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>
#include <torch/version.h>

#include <map>

namespace nnturbo_torch {
namespace {

using torch::Tensor;
using torch::inductor::AOTIModelPackageLoader;

/// Joins what several calls gave for a few views each.
std::vector<Tensor> join(const std::vector<std::vector<Tensor>>& calls) {
  std::vector<Tensor> joined;
  for (std::size_t output = 0; output < calls.front().size(); ++output) {
    std::vector<Tensor> parts;
    for (const auto& outputs : calls) parts.push_back(outputs.at(output).to(torch::kFloat));
    joined.push_back(torch::cat(parts));
  }
  return joined;
}

class ScriptNetwork final : public Network {
 public:
  ScriptNetwork(const std::filesystem::path& file, torch::Device device)
      : module_(torch::jit::load(file.string(), device)), all_at_once_(!device.is_cpu()) {
    module_.eval();
  }

  std::vector<Tensor> run(const Tensor& views) const override {
    // On a CPU more views at once take memory and no less time.
    std::vector<std::vector<Tensor>> calls;
    for (const Tensor& batch : views.split(all_at_once_ ? views.size(0) : 1)) calls.push_back(call(batch));
    return join(calls);
  }

 private:
  std::vector<Tensor> call(const Tensor& batch) const {
    const auto output = module_.get_method("forward")({batch});
    if (output.isTensor()) return {output.toTensor()};
    std::vector<Tensor> tensors;
    for (const auto& element : output.toTupleRef().elements()) tensors.push_back(element.toTensor());
    return tensors;
  }

  torch::jit::Module module_;
  bool all_at_once_;
};

class CompiledNetwork final : public Network {
 public:
  CompiledNetwork(const std::filesystem::path& file, torch::Device device)
      : package_(std::make_unique<AOTIModelPackageLoader>(file.string(), "model", /*run_single_threaded=*/false,
                                                          /*num_runners=*/1, device.index())) {}

  std::vector<Tensor> run(const Tensor& views) const override {
    // The code was compiled for one tile.
    std::vector<std::vector<Tensor>> calls;
    for (const Tensor& view : views.split(1)) calls.push_back(package_->run({view.contiguous()}));
    return join(calls);
  }

 private:
  // Behind a pointer because its `run` is not const, although it may be called from several threads.
  std::unique_ptr<AOTIModelPackageLoader> package_;
};

std::string architecture_here() {
  utsname name{};
  uname(&name);
  return name.machine;
}

/// Whether code for one level of vector instructions runs where torch finds another.
bool runs_on(const std::string& built_for, const std::string& here) {
  static const std::map<std::string, int> levels = {{"NO AVX", 0}, {"DEFAULT", 0}, {"AVX2", 1}, {"AVX512", 2}};
  const auto needed = levels.find(built_for), found = levels.find(here);
  if (needed == levels.end() || found == levels.end()) return built_for.empty() || built_for == here;
  return needed->second <= found->second;
}

/// Native code for other instructions, or for another libtorch, would end the process, so it is not even loaded.
void check_machine(const Bundle& bundle) {
  const std::string architecture = architecture_here(), cpu = at::get_cpu_capability();
  if (bundle.architecture != architecture || !runs_on(bundle.cpu, cpu)) {
    throw Error(bundle.network.string() + ": this network was compiled for " + bundle.architecture + " " + bundle.cpu +
                ", this machine is " + architecture + " " + cpu +
                "; build the bundle on this machine, or one that runs anywhere: `nnturbo build --backend torchscript`");
  }
  const std::string release = bundle.torch_version.substr(0, bundle.torch_version.find('+'));
  if (!release.empty() && release != TORCH_VERSION) {
    throw Error(bundle.network.string() + ": this network was compiled with torch " + release +
                ", this program uses libtorch " TORCH_VERSION
                "; build the bundle with that version, or one for any: `nnturbo build --backend torchscript`");
  }
}

}  // namespace

std::unique_ptr<const Network> load_network(const Bundle& bundle, torch::Device device) {
  if (bundle.backend == "torchscript") return std::make_unique<ScriptNetwork>(bundle.network, device);
  check_machine(bundle);
  return std::make_unique<CompiledNetwork>(bundle.network, device);
}

}  // namespace nnturbo_torch
