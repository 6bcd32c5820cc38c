#include "program_network.h"

#include <algorithm>
#include <new>

#include "../cpu/program.h"
#include "error.h"
#include "json.h"
#include "safetensors.h"

namespace nnturbo {
namespace {

constexpr int FORMAT = 1;
constexpr std::array<const char*, 5> KINDS = {"convolution", "transposed_convolution", "concatenation",
                                              "average_pooling", "projection"};
constexpr std::array<const char*, 4> HEADS = {"none", "pooled", "attention", "focus_pooling"};
constexpr std::size_t MOST_FOLDS = 1000;

[[noreturn]] void fail(const std::string& what) {
  throw Error(NNTURBO_BAD_BUNDLE, "network.json: " + what + "; build the bundle again");
}

struct Destroy {
  void operator()(nnturbo_program* program) const { nnturbo_program_destroy(program); }
};
using Program = std::unique_ptr<nnturbo_program, Destroy>;

// Reads a program with the weights of one fold.
class Reader {
 public:
  Reader(const Json& from, const std::map<std::string, Tensor>& tensors, const std::string& fold)
      : from_(from), tensors_(tensors), fold_(fold) {}

  Program program() {
    for (const Json& value : from_.at("values")) values_.push_back(read_value(value));
    for (const Json& operation : from_.at("operations")) operations_.push_back(read_operation(operation));
    if (!from_.at("features").empty()) fail("its head must be one that this library runs; use nnturbo predict");
    nnturbo_description description{};
    description.values = values_.data();
    description.value_count = static_cast<Size>(values_.size());
    description.operations = operations_.data();
    description.operation_count = static_cast<Size>(operations_.size());
    description.logits = whole(from_.at("logits"));
    if (const Json& head = from_.at("head"); !head.is_null()) description.head = read_head(head);
    char reason[400] = "";
    // The caller's threads do it.
    Program program(nnturbo_program_create(&description, 1, reason, sizeof reason));
    if (!program) fail(std::string("it cannot be run: ") + reason);
    return program;
  }

 private:
  static Size whole(const Json& value) {
    if (!value.is_number_integer()) fail("sizes and numbers of values must be whole numbers");
    return value.get<Size>();
  }

  static std::vector<Size> wholes(const Json& values) {
    std::vector<Size> read;
    for (const Json& value : values) read.push_back(whole(value));
    return read;
  }

  static void copy_triple(const Json& values, std::int64_t* to) {
    const auto read = wholes(values);
    if (read.size() != 3) fail("sizes must be three numbers");
    std::copy(read.begin(), read.end(), to);
  }

  template <std::size_t COUNT>
  static Size number_of(const std::string& kind, const std::array<const char*, COUNT>& known) {
    const auto found = std::find(known.begin(), known.end(), kind);
    if (found == known.end()) fail("kind " + kind + " is unknown: this library is older than the nnturbo that built it");
    return found - known.begin();
  }

  nnturbo_tensor tensor(const Json& name) const {
    if (name.is_null()) return {nullptr, 0};
    const auto found = tensors_.find(fold_ + "/" + name.get<std::string>());
    if (found == tensors_.end()) fail("weights.safetensors must hold " + fold_ + "/" + name.get<std::string>());
    return {found->second.data, found->second.count};
  }

  static nnturbo_value read_value(const Json& from) {
    nnturbo_value value{whole(from.at("buffer")), whole(from.at("channels")), {}};
    copy_triple(from.at("size"), value.size);
    return value;
  }

  nnturbo_operation read_operation(const Json& from) const {
    nnturbo_operation operation{};
    operation.kind = number_of(from.at("kind").get<std::string>(), KINDS);
    const auto inputs = wholes(from.at("inputs"));
    if (inputs.empty() || inputs.size() > 2) fail("an operation must have one or two inputs");
    operation.inputs[0] = inputs[0];
    operation.inputs[1] = inputs.size() > 1 ? inputs[1] : -1;
    operation.output = whole(from.at("output"));
    copy_triple(from.at("taps"), operation.taps);
    copy_triple(from.at("stride"), operation.stride);
    operation.transformed = from.at("transformed").get<bool>();
    operation.in_int16 = from.at("in_int16").get<bool>();
    operation.weight = tensor(from.at("weight"));
    operation.bias = tensor(from.at("bias"));
    operation.residual = -1;
    operation.slope = 1;
    if (const Json& norm = from.at("norm"); !norm.is_null()) {
      operation.scale = tensor(norm.at("scale"));
      operation.shift = tensor(norm.at("shift"));
      operation.epsilon = norm.at("epsilon").get<float>();
      operation.slope = norm.at("slope").get<float>();
      if (const Json& residual = norm.at("residual"); !residual.is_null()) operation.residual = whole(residual);
    }
    if (const Json& upsampling = from.at("upsampling"); !upsampling.is_null()) {
      copy_triple(upsampling.at("stride"), operation.upsampling);
      operation.upsampling_weight = tensor(upsampling.at("weight"));
      operation.upsampling_bias = tensor(upsampling.at("bias"));
    }
    return operation;
  }

  nnturbo_head read_head(const Json& from) {
    features_ = wholes(from.at("features"));
    focus_ = wholes(from.at("focus_channels"));
    for (const Json& name : from.at("tensors")) of_head_.push_back(tensor(name));
    nnturbo_head head{};
    head.kind = number_of(from.at("kind").get<std::string>(), HEADS);
    head.features = features_.data();
    head.feature_count = static_cast<Size>(features_.size());
    head.focus_channels = focus_.data();
    head.focus_count = static_cast<Size>(focus_.size());
    head.regions = from.at("regions").get<bool>();
    head.tensors = of_head_.data();
    head.tensor_count = static_cast<Size>(of_head_.size());
    head.classes = whole(from.at("classes"));
    return head;
  }

  const Json& from_;
  const std::map<std::string, Tensor>& tensors_;
  const std::string fold_;
  std::vector<nnturbo_value> values_;
  std::vector<nnturbo_operation> operations_;
  std::vector<Size> features_, focus_;
  std::vector<nnturbo_tensor> of_head_;
};

// The mean of all folds.
class ProgramNetwork : public Network {
 public:
  ProgramNetwork(std::vector<Program> folds, const Plan& plan) : folds_(std::move(folds)) {
    nnturbo_program_shapes(folds_[0].get(), &shapes_);
    const Triple size{shapes_.size[0], shapes_.size[1], shapes_.size[2]};
    const Size classes = plan.classification ? static_cast<Size>(plan.classification->class_names.size()) : 0;
    if (size != plan.patch_size || shapes_.channels != static_cast<Size>(plan.channels.size()) ||
        shapes_.outputs != plan.labels.num_outputs || shapes_.classes != classes)
      fail("the network's tiles, outputs and classes must be those of path.json");
  }

  void run(const float* tile, float* seg_logits, float* class_logits) const override {
    const Size voxels = shapes_.size[0] * shapes_.size[1] * shapes_.size[2], count = shapes_.outputs * voxels;
    run_fold(0, tile, seg_logits, class_logits);
    if (folds_.size() == 1) return;
    std::vector<float> seg(count_that_fits({count})), of_case(shapes_.classes);
    for (std::size_t fold = 1; fold < folds_.size(); ++fold) {
      run_fold(fold, tile, seg.data(), of_case.data());
      for (Size i = 0; i < count; ++i) seg_logits[i] += seg[i];
      for (Size i = 0; i < shapes_.classes; ++i) class_logits[i] += of_case[i];
    }
    const auto folds = static_cast<float>(folds_.size());
    for (Size i = 0; i < count; ++i) seg_logits[i] /= folds;
    for (Size i = 0; i < shapes_.classes; ++i) class_logits[i] /= folds;
  }

 private:
  void run_fold(std::size_t fold, const float* tile, float* seg_logits, float* class_logits) const {
    float* const of_case = shapes_.classes ? class_logits : nullptr;
    if (nnturbo_program_run(folds_[fold].get(), 1, tile, seg_logits, of_case, nullptr, 1)) throw std::bad_alloc();
  }

  const std::vector<Program> folds_;
  nnturbo_shapes shapes_{};
};

}  // namespace

std::unique_ptr<const Network> read_network(const std::string& text, const MappedFile& weights, const Plan& plan) {
  const auto tensors = read_tensors(weights, "weights.safetensors");
  try {
    const Json from = Json::parse(text);
    if (from.at("format") != FORMAT)
      fail("its format must be " + std::to_string(FORMAT) + ": this library is older or newer than the nnturbo that built it");
    std::vector<Program> folds;
    for (const auto& fold : from.at("folds").get<std::vector<std::string>>()) {
      if (folds.size() == MOST_FOLDS) fail("there must be at most " + std::to_string(MOST_FOLDS) + " folds");
      folds.push_back(Reader(from, tensors, fold).program());
    }
    if (folds.empty()) fail("there must be one fold or more");
    return std::make_unique<ProgramNetwork>(std::move(folds), plan);
  } catch (const Json::exception& error) {
    fail(std::string("it must have the form that nnturbo writes: ") + error.what());
  }
}

}  // namespace nnturbo
