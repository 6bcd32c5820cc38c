// A program around nnturbo_torch::Engine, for test_cpp.py: prints what differs from what it expects, and nothing else.

#include <nnturbo_torch/engine.h>
#include <torch/torch.h>

#include <array>
#include <cmath>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr std::array<double, 3> kSpacing = {3.0, 1.1, 1.2};

void expect(bool holds, const std::string& what) {
  if (!holds) std::cout << "it does not hold that " << what << "\n";
}

template <typename Call>
void expect_error(const std::string& text, const Call& call) {
  try {
    call();
    std::cout << "no error: " << text << "\n";
  } catch (const nnturbo_torch::Error& error) {
    expect(std::string(error.what()).find(text) != std::string::npos, text + " is said by: " + error.what());
  }
}

void check_arguments(const nnturbo_torch::Engine& engine) {
  const auto predict = [&](const torch::Tensor& image, std::array<double, 3> spacing = kSpacing, double step = 0.5) {
    return [=, &engine] { engine.predict(image, spacing, {step, true}); };
  };
  const torch::Tensor scan = torch::zeros({9, 10, 11});
  expect_error("not empty, got none", predict(torch::Tensor()));
  expect_error("got [3] of Float", predict(torch::zeros({3})));
  expect_error("got [9, 0, 9] of Float", predict(torch::zeros({9, 0, 9})));
  expect_error("of ComplexFloat", predict(torch::zeros({9, 9, 9}, torch::kComplexFloat)));
  expect_error("takes 1 channel(s), got 2", predict(torch::stack({scan, scan})));
  expect_error("voxels must be finite", predict(scan / 0));
  expect_error("spacing must be three finite numbers", predict(scan, {1, 0, 1}));
  expect_error("spacing must be three finite numbers", predict(scan, {1, 1, NAN}));
  expect_error("tile_step_size must be in (0, 1]", predict(scan, kSpacing, 0));
  expect_error("tile_step_size must be in (0, 1]", predict(scan, kSpacing, 2));
}

/// Smooth CT numbers (Z, Y, X), of another shape for each seed.
torch::Tensor scan_of(int seed) {
  namespace F = torch::nn::functional;
  torch::manual_seed(seed);
  const auto size = F::InterpolateFuncOptions()
                        .size(std::vector<std::int64_t>{9 + seed, 24, 26})
                        .mode(torch::kTrilinear)
                        .align_corners(true);
  const auto smooth = F::interpolate(torch::randn({1, 1, 3, 5, 5}), size);
  return (50 + 120 * smooth)[0][0].round();
}

void check_types(const nnturbo_torch::Engine& engine) {
  const torch::Tensor scan = scan_of(0).clamp(0, 250);
  const torch::Tensor expected = engine.predict(scan, kSpacing).segmentation;
  for (const auto type : {torch::kByte, torch::kShort, torch::kUInt16, torch::kLong, torch::kHalf, torch::kDouble}) {
    const auto prediction = engine.predict(scan.to(type).unsqueeze(0), kSpacing);
    expect(torch::equal(prediction.segmentation, expected), std::string("labels are the same of ") + toString(type));
  }
}

void check_threads(const nnturbo_torch::Engine& engine) {
  constexpr int kThreads = 4;
  std::vector<torch::Tensor> expected, found(kThreads);
  for (int i = 0; i < kThreads; ++i) expected.push_back(engine.predict(scan_of(i), kSpacing).segmentation);
  std::vector<torch::Tensor> scans;
  for (int i = 0; i < kThreads; ++i) scans.push_back(scan_of(i));
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] { found[i] = engine.predict(scans[i], kSpacing).segmentation; });
  }
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < kThreads; ++i) {
    expect(torch::equal(found[i], expected[i]), "threads give the labels that one call after the other gives");
    expect(found[i].max().item<int>() > found[i].min().item<int>(), "there are several labels");
  }
}

}  // namespace

int main(int, char** arguments) {
  nnturbo_torch::Engine opened(arguments[1]);
  const nnturbo_torch::Engine engine = std::move(opened);
  expect(engine.channels() == 1, "the model takes one channel");
  expect(engine.class_names() == std::vector<std::string>({"0", "1", "2"}), "there are three classes");
  expect(engine.label_names() == std::vector<std::string>({"background", "pancreas", "lesion"}), "labels have names");
  const auto prediction = engine.predict(scan_of(0), kSpacing, {1.0, false});
  expect(prediction.class_name == engine.class_names().at(*prediction.class_label), "the class has its name");
  expect(prediction.segmentation.sizes() == torch::IntArrayRef({9, 24, 26}), "labels lie on the scan's grid");
  check_arguments(engine);
  check_types(engine);
  check_threads(engine);
}
