// nnturbo_predict: segments one scan with a bundle.

#include <nnturbo_torch/engine.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <iostream>
#include <new>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "command/nifti_file.h"

namespace {

constexpr int kDone = 0, kFailed = 1, kUnusable = 2;

constexpr char kUsage[] =
    "usage: nnturbo_predict BUNDLE INPUT.nii.gz OUTPUT.nii.gz [--step-size S] [--disable-tta] [--device cpu|cuda]\n"
    "\n"
    "  BUNDLE         folder that `nnturbo build --backend torchscript` (or inductor, native) made\n"
    "  INPUT          the scan; several channels as CHANNEL0.nii.gz,CHANNEL1.nii.gz,...\n"
    "  OUTPUT         labels on the scan's grid\n"
    "  --step-size S  distance of tiles as a fraction of the patch, in (0, 1]; 0.5 by default\n"
    "  --disable-tta  without mirrored views: faster, a little less accurate\n"
    "  --device D     cpu (default), cuda or cuda:N; what the bundle was built for\n"
    "\n"
    "The class of the scan, for models with classes, is one line of JSON on standard output.\n"
    "Exit status: 0 done; 1 the scan failed; 2 wrong usage or unusable bundle.\n";

/// Wrong words on the command line.
class UsageError : public nnturbo_torch::Error {
 public:
  using Error::Error;
};

struct Arguments {
  std::string bundle, input, output;
  torch::Device device = torch::kCPU;
  nnturbo_torch::Options options;
  bool help = false;
};

double parse_step_size(const std::string& text) {
  std::istringstream stream(text);
  double value = 0;
  if (!(stream >> value) || !stream.eof() || !(value > 0 && value <= 1)) {
    throw UsageError("--step-size must be a number in (0, 1], got '" + text + "'");
  }
  return value;
}

torch::Device parse_device(const std::string& text) {
  try {
    return torch::Device(text);
  } catch (const std::exception&) {
    throw UsageError("--device must be cpu, cuda or cuda:N, got '" + text + "'");
  }
}

/// The names of the channels' files, which the command line joins by commas.
std::vector<std::string> split(const std::string& input) {
  std::vector<std::string> names;
  std::istringstream joined(input);
  for (std::string name; std::getline(joined, name, ',');) names.push_back(name);
  return names;
}

/// Labels would take the place of the scan.
void refuse_own_input(const std::string& input, const std::string& output) {
  for (const std::string& name : split(input)) {
    std::error_code absent;
    if (std::filesystem::equivalent(name, output, absent)) {
      throw UsageError("OUTPUT must be another file than INPUT, got " + output + " for both");
    }
  }
}

Arguments parse(const std::vector<std::string>& words) {
  Arguments arguments;
  std::vector<std::string> paths;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    const bool has_value = word == "--step-size" || word == "--device";
    if (has_value && i + 1 == words.size()) throw UsageError(word + " needs a value");
    if (word == "--help" || word == "-h") {
      arguments.help = true;
      return arguments;
    }
    if (word == "--step-size") {
      arguments.options.tile_step_size = parse_step_size(words[++i]);
    } else if (word == "--device") {
      arguments.device = parse_device(words[++i]);
    } else if (word == "--disable-tta") {
      arguments.options.mirror = false;
    } else if (word.rfind("-", 0) == 0) {
      throw UsageError("there is no option " + word);
    } else {
      paths.push_back(word);
    }
  }
  if (paths.size() != 3) {
    throw UsageError("BUNDLE, INPUT and OUTPUT must be given, got " + std::to_string(paths.size()) + " path(s)");
  }
  arguments.bundle = paths[0];
  arguments.input = paths[1];
  arguments.output = paths[2];
  refuse_own_input(paths[1], paths[2]);
  return arguments;
}

std::vector<nnturbo::NiftiScan> read_channels(const std::string& input, const std::string& reader) {
  std::vector<nnturbo::NiftiScan> channels;
  for (const std::string& name : split(input)) {
    channels.push_back(nnturbo::read_nifti(name, reader));
    nnturbo::check_same_grid(name, channels.back(), channels.front());
  }
  if (channels.empty()) throw nnturbo_torch::Error("the input must name at least one file, got none");
  return channels;
}

/// All channels as (C, Z, Y, X) float32.
torch::Tensor to_tensor(const std::vector<nnturbo::NiftiScan>& channels) {
  const auto [z, y, x] = channels.front().shape;
  torch::Tensor image = torch::empty({static_cast<std::int64_t>(channels.size()), z, y, x});
  float* to = image.data_ptr<float>();
  for (const nnturbo::NiftiScan& channel : channels) {
    to = std::copy(channel.voxels.begin(), channel.voxels.end(), to);
  }
  return image;
}

/// The class in the form of `predictions.json`.
std::string describe(const nnturbo_torch::Prediction& prediction, const std::vector<std::string>& class_names) {
  nlohmann::ordered_json probabilities;  // in the order of the classes
  for (std::size_t i = 0; i < class_names.size(); ++i) {
    probabilities[class_names[i]] = prediction.class_probabilities.at(i);
  }
  const nlohmann::ordered_json answer = {
      {"label", *prediction.class_label}, {"name", prediction.class_name}, {"probabilities", probabilities}};
  return answer.dump();
}

void predict(const nnturbo_torch::Engine& engine, const Arguments& arguments) {
  const auto channels = read_channels(arguments.input, engine.reader());
  const auto prediction = engine.predict(to_tensor(channels), channels.front().spacing_mm, arguments.options);
  const bool few = prediction.segmentation.scalar_type() == torch::kByte;
  const torch::Tensor labels = prediction.segmentation.to(few ? torch::kByte : torch::kUInt16).contiguous();
  nnturbo::write_nifti_labels(arguments.output, labels.data_ptr(), few ? 1 : 2, channels.front());
  if (prediction.class_label) std::cout << describe(prediction, engine.class_names()) << std::endl;
}

int run(const std::vector<std::string>& words) {
  int status = kUnusable;  // of what fails before there is an engine
  try {
    const Arguments arguments = parse(words);
    if (arguments.help) {
      std::cout << kUsage;
      return kDone;
    }
    const nnturbo_torch::Engine engine(arguments.bundle, arguments.device);
    status = kFailed;
    predict(engine, arguments);
    return kDone;
  } catch (const UsageError& error) {
    std::cerr << "nnturbo_predict: " << error.what() << "\n\n" << kUsage;
  } catch (const std::bad_alloc&) {
    std::cerr << "nnturbo_predict: there is too little memory for this scan; is its header right?" << std::endl;
  } catch (const std::exception& error) {
    std::cerr << "nnturbo_predict: " << error.what() << std::endl;
  }
  return status;
}

}  // namespace

int main(int argc, char** argv) { return run({argv + 1, argv + argc}); }
