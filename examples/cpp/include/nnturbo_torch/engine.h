#pragma once

#include <nnturbo_torch/error.h>
#include <torch/types.h>

#include <array>
#include <cstddef>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace nnturbo_torch {

/// How a scan is covered; the defaults are nnU-Net's.
struct Options {
  /// Distance of neighbouring tiles as a fraction of the patch, in (0, 1].
  double tile_step_size = 0.5;
  /// Average over mirrored views, along the axes the model was trained with.
  bool mirror = true;
};

/// What the model says about one scan.
struct Prediction {
  /// Labels (Z, Y, X) on the scan's own grid: an integer tensor on the CPU.
  torch::Tensor segmentation;
  /// One per class, adding up to 1; empty for models without classification.
  std::vector<float> class_probabilities;
  /// Index of the most probable class; nothing for models without classification.
  std::optional<std::size_t> class_label;
  /// Its name; empty for models without classification.
  std::string class_name;
};

class Path;

/// A bundle that `nnturbo build` made, loaded once and ready for any number of scans.
///
/// Engines can be moved but not copied. `predict` may be called from several threads at once: nothing
/// in an engine changes after its construction, and each call keeps its sums to itself. On a CPU torch
/// already spreads one scan over all cores, so threads gain little there. AOTInductor packages run
/// one tile at a time, for any number of threads. Native bundles run with as many threads as torch.
class Engine {
 public:
  /// Opens a bundle, after checking each of its files against the SHA-256 in its manifest.
  ///
  /// @param bundle  Folder with `engine.json`, for backend torchscript, inductor or native.
  /// @param device  The kind of device the bundle was built for.
  /// @throws Error  Where the bundle is incomplete, damaged, too new, or made for another machine or device.
  explicit Engine(const std::filesystem::path& bundle, torch::Device device = torch::kCPU);
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;
  ~Engine();

  /// Segments one scan.
  ///
  /// @param image  (C, Z, Y, X), or (Z, Y, X) for one channel: raw values as stored in the file (CT numbers), of
  ///     any real type, on any device.
  /// @param spacing_mm  Distance between voxels along z, y, x.
  /// @throws Error  Where scan or options are out of range, or the network fails.
  Prediction predict(const torch::Tensor& image, std::array<double, 3> spacing_mm, const Options& options = {}) const;

  /// Classes of a case, in the order of `Prediction::class_probabilities`; empty without classification.
  const std::vector<std::string>& class_names() const;

  /// Names of the labels in the order of their values, the background first; empty for models of regions.
  const std::vector<std::string>& label_names() const;

  /// nnU-Net's class that read the training scans, such as SimpleITKIO; empty where the bundle does not say.
  const std::string& reader() const;

  /// Number of channels a scan must have.
  std::size_t channels() const;

 private:
  torch::Device device_;
  std::unique_ptr<const Path> path_;
};

}  // namespace nnturbo_torch
