// Segments two made-up scans at the same time with one model, and prints the volume of each label.

#include <nnturbo.h>

#include <array>
#include <future>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

using Model = std::unique_ptr<nnturbo_model, decltype(&nnturbo_close)>;
using Prediction = std::unique_ptr<nnturbo_prediction, decltype(&nnturbo_free)>;

Model open(const std::string& bundle) {
  nnturbo_model* model = nullptr;
  nnturbo_error error;
  if (nnturbo_open(bundle.c_str(), &model, &error) != NNTURBO_DONE) throw std::runtime_error(error.text);
  return Model(model, &nnturbo_close);
}

Prediction segment(const nnturbo_model& model, const std::vector<float>& voxels, std::array<int64_t, 3> shape) {
  const int64_t channels = nnturbo_describe(&model)->channels;
  const nnturbo_scan scan{voxels.data(), NNTURBO_FLOAT32, channels, shape[0], shape[1], shape[2], {2.5, 0.8, 0.8}};
  nnturbo_options options = nnturbo_defaults();
  options.threads = 1;  // of each of the two
  nnturbo_prediction* prediction = nullptr;
  nnturbo_error error;
  if (nnturbo_predict(&model, &scan, &options, &prediction, &error) != NNTURBO_DONE)
    throw std::runtime_error(error.text);
  return Prediction(prediction, &nnturbo_free);
}

int main(int, char** arguments) {
  try {
    const Model model = open(arguments[1]);
    const nnturbo_information& about = *nnturbo_describe(model.get());
    const std::array<int64_t, 3> shape{32, 96, 96};
    std::vector<float> voxels(about.channels * shape[0] * shape[1] * shape[2]);
    for (std::size_t i = 0; i < voxels.size(); ++i) voxels[i] = static_cast<float>(i % 96 * 3) - 100;  // CT numbers

    auto predict = [&] { return segment(*model, voxels, shape); };
    auto one = std::async(std::launch::async, predict), other = std::async(std::launch::async, predict);
    for (auto* waiting : {&one, &other}) {
      const Prediction prediction = waiting->get();
      for (int64_t i = 0; i < about.labels; ++i)
        std::cout << about.label_names[i] << ": " << prediction->volumes_ml[i] << " ml\n";
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
