// nnturbo-native: segments one scan with a bundle, on a machine that has nothing else.

#include <nnturbo.h>

#include <filesystem>
#include <iostream>
#include <memory>
#include <new>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "nifti_file.h"

namespace {

constexpr int DONE = 0, FAILED = 1, UNUSABLE = 2;

constexpr char USAGE[] =
    "usage: nnturbo-native BUNDLE INPUT.nii.gz OUTPUT.nii.gz [--step-size S] [--disable-tta] [--threads N]\n"
    "\n"
    "  BUNDLE         folder that `nnturbo build --backend native` made\n"
    "  INPUT          the scan; several channels as CHANNEL0.nii.gz,CHANNEL1.nii.gz,...\n"
    "  OUTPUT         labels on the scan's grid\n"
    "  --step-size S  distance of tiles as a fraction of the patch, in (0, 1]; 0.5 by default\n"
    "  --disable-tta  without mirrored views: faster, a little less accurate\n"
    "  --threads N    one for each core by default\n"
    "\n"
    "The class of the scan, for models with classes, is one line of JSON on standard output.\n"
    "Exit status: 0 done; 1 the scan failed; 2 wrong usage or unusable bundle.\n";

// What ends the program; the status says how.
struct Failure : std::runtime_error {
  Failure(int status, const std::string& text) : std::runtime_error(text), status(status) {}
  const int status;
};

// Wrong words on the command line.
struct UsageError : Failure {
  explicit UsageError(const std::string& text) : Failure(UNUSABLE, text) {}
};

struct Arguments {
  std::string bundle, input, output;
  nnturbo_options options = nnturbo_defaults();
  bool help = false;
};

using Model = std::unique_ptr<nnturbo_model, decltype(&nnturbo_close)>;
using Prediction = std::unique_ptr<nnturbo_prediction, decltype(&nnturbo_free)>;

double parse_number(const std::string& flag, const std::string& text, double most) {
  std::istringstream stream(text);
  double value = 0;
  if (!(stream >> value) || !stream.eof() || !(value > 0 && value <= most))
    throw UsageError(flag + " must be a number above 0 and up to " + std::to_string(static_cast<int>(most)) +
                     ", got '" + text + "'");
  return value;
}

// The names of the channels' files, which the command line joins by commas.
std::vector<std::string> split(const std::string& input) {
  std::vector<std::string> names;
  std::istringstream joined(input);
  for (std::string name; std::getline(joined, name, ',');) names.push_back(name);
  return names;
}

// Labels would take the place of the scan.
void refuse_own_input(const std::string& input, const std::string& output) {
  for (const std::string& name : split(input)) {
    std::error_code absent;
    if (std::filesystem::equivalent(name, output, absent))
      throw UsageError("OUTPUT must be another file than INPUT, got " + output + " for both");
  }
}

Arguments parse(const std::vector<std::string>& words) {
  Arguments arguments;
  std::vector<std::string> paths;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    const bool has_value = word == "--step-size" || word == "--threads";
    if (has_value && i + 1 == words.size()) throw UsageError(word + " needs a value");
    if (word == "--help" || word == "-h") {
      arguments.help = true;
      return arguments;
    }
    if (word == "--step-size")
      arguments.options.tile_step_size = parse_number(word, words[++i], 1);
    else if (word == "--threads")
      arguments.options.threads = static_cast<int>(std::max(1.0, parse_number(word, words[++i], 1024)));
    else if (word == "--disable-tta")
      arguments.options.mirror = 0;
    else if (word.rfind("-", 0) == 0)
      throw UsageError("there is no option " + word);
    else
      paths.push_back(word);
  }
  if (paths.size() != 3)
    throw UsageError("BUNDLE, INPUT and OUTPUT must be given, got " + std::to_string(paths.size()) + " path(s)");
  arguments.bundle = paths[0];
  arguments.input = paths[1];
  arguments.output = paths[2];
  refuse_own_input(paths[1], paths[2]);
  return arguments;
}

Model open(const std::string& bundle) {
  nnturbo_model* model = nullptr;
  nnturbo_error error;
  if (nnturbo_open(bundle.c_str(), &model, &error) != NNTURBO_DONE) throw Failure(UNUSABLE, error.text);
  return Model(model, &nnturbo_close);
}

std::vector<nnturbo::NiftiScan> read_channels(const std::string& input, const std::string& reader) {
  std::vector<nnturbo::NiftiScan> channels;
  for (const std::string& name : split(input)) {
    channels.push_back(nnturbo::read_nifti(name, reader));
    nnturbo::check_same_grid(name, channels.back(), channels.front());
  }
  if (channels.empty()) throw Failure(FAILED, "the input must name at least one file, got none");
  return channels;
}

// The voxels of all channels, one after the other; the channels no longer have them.
std::vector<float> take_voxels(std::vector<nnturbo::NiftiScan>& channels) {
  std::vector<float> voxels = std::move(channels.front().voxels);
  for (std::size_t i = 1; i < channels.size(); ++i) {
    voxels.insert(voxels.end(), channels[i].voxels.begin(), channels[i].voxels.end());
    channels[i].voxels = {};
  }
  return voxels;
}

Prediction predict(const Model& model, const nnturbo::NiftiScan& grid, const std::vector<float>& voxels,
                   std::int64_t channels, const nnturbo_options& options) {
  const auto [z, y, x] = grid.shape;
  const auto [z_mm, y_mm, x_mm] = grid.spacing_mm;
  const nnturbo_scan scan{voxels.data(), NNTURBO_FLOAT32, channels, z, y, x, {z_mm, y_mm, x_mm}};
  nnturbo_prediction* prediction = nullptr;
  nnturbo_error error;
  if (nnturbo_predict(model.get(), &scan, &options, &prediction, &error) != NNTURBO_DONE)
    throw Failure(FAILED, error.text);
  return Prediction(prediction, &nnturbo_free);
}

// The class in the form of `predictions.json`.
std::string describe(const nnturbo_prediction& prediction, const nnturbo_information& model) {
  nlohmann::ordered_json probabilities;  // in the order of the classes
  for (std::int64_t i = 0; i < model.classes; ++i)
    probabilities[model.class_names[i]] = prediction.class_probabilities[i];
  const nlohmann::ordered_json answer = {{"label", prediction.class_label},
                                         {"name", model.class_names[prediction.class_label]},
                                         {"probabilities", probabilities}};
  return answer.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

void segment(const Arguments& arguments) {
  const Model model = open(arguments.bundle);
  const nnturbo_information& about = *nnturbo_describe(model.get());
  auto channels = read_channels(arguments.input, about.reader);
  const std::vector<float> voxels = take_voxels(channels);
  const Prediction prediction =
      predict(model, channels.front(), voxels, static_cast<std::int64_t>(channels.size()), arguments.options);
  const int bytes = prediction->type == NNTURBO_UINT8 ? 1 : 2;
  nnturbo::write_nifti_labels(arguments.output, prediction->labels, bytes, channels.front());
  if (prediction->class_label >= 0) std::cout << describe(*prediction, about) << std::endl;
}

int run(const std::vector<std::string>& words) {
  auto fail = [](const std::string& text, int status) {
    std::cerr << "nnturbo-native: " << text << std::endl;
    return status;
  };
  try {
    const Arguments arguments = parse(words);
    if (arguments.help)
      std::cout << USAGE;
    else
      segment(arguments);
    return DONE;
  } catch (const UsageError& error) {
    return fail(std::string(error.what()) + "\n\n" + USAGE, error.status);
  } catch (const Failure& error) {
    return fail(error.what(), error.status);
  } catch (const std::bad_alloc&) {
    return fail("there is too little memory for this scan; is its header right?", FAILED);
  } catch (const std::exception& error) {
    return fail(error.what(), FAILED);
  }
}

}  // namespace

int main(int argc, char** argv) { return run({argv + 1, argv + argc}); }
