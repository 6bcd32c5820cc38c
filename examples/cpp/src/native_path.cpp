#include <ATen/Parallel.h>
#include <nnturbo.h>
#include <nnturbo_torch/error.h>

#include <utility>

#include "path.h"

namespace nnturbo_torch {
namespace {

using torch::Tensor;

using Model = std::unique_ptr<nnturbo_model, decltype(&nnturbo_close)>;
using Found = std::unique_ptr<nnturbo_prediction, decltype(&nnturbo_free)>;

/// The scan in memory as libnnturbo reads it; types that it does not know become float32.
std::pair<Tensor, nnturbo_type> readable(const Tensor& scan) {
  const Tensor dense = scan.cpu().contiguous();
  switch (dense.scalar_type()) {
    case torch::kChar:
      return {dense, NNTURBO_INT8};
    case torch::kByte:
      return {dense, NNTURBO_UINT8};
    case torch::kShort:
      return {dense, NNTURBO_INT16};
    case torch::kUInt16:
      return {dense, NNTURBO_UINT16};
    case torch::kInt:
      return {dense, NNTURBO_INT32};
    case torch::kUInt32:
      return {dense, NNTURBO_UINT32};
    case torch::kLong:
      return {dense, NNTURBO_INT64};
    case torch::kUInt64:
      return {dense, NNTURBO_UINT64};
    case torch::kDouble:
      return {dense, NNTURBO_FLOAT64};
    default:
      return {dense.to(torch::kFloat), NNTURBO_FLOAT32};
  }
}

class NativePath final : public Path {
 public:
  explicit NativePath(const std::string& folder) : model_(nullptr, &nnturbo_close) {
    nnturbo_model* model = nullptr;
    nnturbo_error error;
    if (nnturbo_open(folder.c_str(), &model, &error) != NNTURBO_DONE) throw Error(error.text);
    model_.reset(model);
    const nnturbo_information& about = *nnturbo_describe(model);
    channels = static_cast<std::size_t>(about.channels);
    reader = about.reader;
    class_names.assign(about.class_names, about.class_names + about.classes);
    if (about.regions) return;
    label_names = {"background"};
    label_names.insert(label_names.end(), about.label_names, about.label_names + about.labels);
  }

  Answer run(const Tensor& scan, const std::array<double, 3>& spacing_mm, const Options& options) const override {
    const auto [voxels, type] = readable(scan);
    const auto& [z_mm, y_mm, x_mm] = spacing_mm;
    const nnturbo_scan given{voxels.data_ptr(), type,           voxels.size(0),      voxels.size(1),
                             voxels.size(2),    voxels.size(3), {z_mm, y_mm, x_mm}};
    nnturbo_options chosen = nnturbo_defaults();
    chosen.tile_step_size = options.tile_step_size;
    chosen.mirror = options.mirror;
    chosen.threads = at::get_num_threads();
    nnturbo_prediction* made = nullptr;
    nnturbo_error error;
    if (nnturbo_predict(model_.get(), &given, &chosen, &made, &error) != NNTURBO_DONE) throw Error(error.text);
    const Found found(made, &nnturbo_free);
    const bool few = made->type == NNTURBO_UINT8;
    const Tensor labels = torch::from_blob(const_cast<void*>(made->labels), {made->z, made->y, made->x},
                                           few ? torch::kByte : torch::kUInt16);
    // A copy outlives what libnnturbo holds.
    return {labels.to(few ? torch::kByte : torch::kInt, /*non_blocking=*/false, /*copy=*/true), {made->class_probabilities, made->class_probabilities + class_names.size()}};
  }

 private:
  Model model_;
};

}  // namespace

std::unique_ptr<const Path> load_native_path(const Bundle& bundle) {
  return std::make_unique<NativePath>(bundle.network.u8string());
}

}  // namespace nnturbo_torch
