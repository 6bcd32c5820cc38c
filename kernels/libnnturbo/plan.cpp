#include "plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "error.h"
#include "json.h"

namespace nnturbo {
namespace {

constexpr int SCHEMA = 1;
constexpr Size MOST_CHANNELS = 1024, MOST_OUTPUTS = 65536, MOST_CLASSES = 1024;
constexpr Size LARGEST_PATCH_VOXELS = Size{1} << 31;

[[noreturn]] void fail(const std::string& what) {
  throw Error(NNTURBO_BAD_BUNDLE, "path.json: " + what + "; build the bundle again");
}

void require(bool holds, const std::string& what) {
  if (!holds) fail(what);
}

Size whole_number(const Json& value, Size least, Size most, const std::string& what) {
  require(value.is_number_integer() && (!value.is_number_unsigned() || value.get<std::uint64_t>() <= INT64_MAX),
          what + " must be a whole number");
  const auto number = value.get<Size>();
  require(least <= number && number <= most,
          what + " must be from " + std::to_string(least) + " to " + std::to_string(most));
  return number;
}

std::vector<Size> whole_numbers(const Json& values, Size least, Size most, const std::string& what) {
  require(values.is_array(), what + " must be a list");
  std::vector<Size> numbers;
  for (const Json& value : values) numbers.push_back(whole_number(value, least, most, what));
  return numbers;
}

double number(const Json& value, const std::string& what) {
  require(value.is_number() && std::isfinite(value.get<double>()), what + " must be a finite number");
  return value.get<double>();
}

bool is_among(const std::string& text, std::initializer_list<const char*> known) {
  return std::any_of(known.begin(), known.end(), [&](const char* each) { return text == each; });
}

NormalizationScheme parse_channel(const Json& from) {
  NormalizationScheme channel;
  channel.scheme = from.at("scheme").get<std::string>();
  channel.use_mask = from.at("use_mask").get<bool>();
  require(is_among(channel.scheme, {"CTNormalization", "ZScoreNormalization", "NoNormalization",
                                    "RescaleTo01Normalization", "RGBTo01Normalization"}),
          "normalization " + channel.scheme + " must be one of nnU-Net's");
  if (channel.scheme != "CTNormalization") return channel;
  channel.low = number(from.at("low"), "low");
  channel.high = number(from.at("high"), "high");
  channel.mean = number(from.at("mean"), "mean");
  channel.std = number(from.at("std"), "std");
  return channel;
}

Resampling parse_resampling(const Json& from) {
  using Separate = Resampling::Separate;
  Resampling resampling;
  resampling.function = from.at("function").get<std::string>();
  require(is_among(resampling.function, {"spline", "torch", "torch_simple", "none"}),
          "resampling function " + resampling.function + " must be a known one");
  resampling.order = whole_number(from.at("order"), 0, 5, "order");
  resampling.order_coarse = whole_number(from.at("order_coarse"), 0, 5, "order_coarse");
  const Json& separate = from.at("separate");
  resampling.separate = separate.is_null() ? Separate::by_spacing : separate.get<bool>() ? Separate::yes : Separate::no;
  // Python's JSON writes infinity as a word that is no JSON; such a threshold is null here.
  const Json& threshold = from.at("threshold");
  resampling.threshold =
      threshold.is_null() ? std::numeric_limits<double>::infinity() : number(threshold, "threshold");
  resampling.mode = from.at("mode").get<std::string>();
  resampling.mode_coarse = from.at("mode_coarse").get<std::string>();
  for (const std::string& mode : {resampling.mode, resampling.mode_coarse})
    require(is_among(mode, {"linear", "nearest", "nearest-exact"}), "mode " + mode + " must be a known one");
  return resampling;
}

LabelScheme parse_labels(const Json& from) {
  LabelScheme labels;
  labels.num_outputs = whole_number(from.at("num_outputs"), 1, MOST_OUTPUTS, "num_outputs");
  const Size bits = whole_number(from.at("bits"), 8, 16, "bits");
  require(bits == 8 || bits == 16, "bits must be 8 or 16");
  labels.type = bits == 8 ? NNTURBO_UINT8 : NNTURBO_UINT16;
  const Size highest = (Size{1} << bits) - 1;
  if (const Json& order = from.at("regions_class_order"); !order.is_null()) {
    labels.regions_class_order = whole_numbers(order, 0, highest, "regions_class_order");
    require(static_cast<Size>(labels.regions_class_order->size()) == labels.num_outputs,
            "regions_class_order must have a label for each output");
  } else {
    require(labels.num_outputs - 1 <= highest, "there must be no more outputs than labels");
  }
  for (const Json& each : from.at("names")) {
    labels.names.push_back(each.at("name").get<std::string>());
    labels.values.push_back(whole_numbers(each.at("values"), 1, highest, "values"));
  }
  return labels;
}

std::vector<View> parse_views(const Json& from) {
  std::vector<View> views;
  for (const Json& axes : from) {
    View view{};
    for (const Size axis : whole_numbers(axes, 0, 2, "views")) view[axis] = true;
    views.push_back(view);
  }
  require(!views.empty() && views.size() <= 8 && views[0] == View{}, "views must be 1 to 8, the unflipped one first");
  return views;
}

ClassificationScheme parse_classification(const Json& from, Size num_outputs) {
  ClassificationScheme scheme;
  scheme.class_names = from.at("class_names").get<std::vector<std::string>>();
  require(2 <= scheme.class_names.size() && scheme.class_names.size() <= MOST_CLASSES,
          "class_names must be 2 to " + std::to_string(MOST_CLASSES));
  scheme.focus_channels = whole_numbers(from.at("focus_channels"), 0, num_outputs - 1, "focus_channels");
  require(!scheme.focus_channels.empty(), "focus_channels must be one or more");
  return scheme;
}

// Sizes, spacings and the order of axes.
void parse_grid(const Json& from, Plan& plan) {
  std::vector<Size> patch = whole_numbers(from.at("patch_size"), 1, LARGEST_PATCH_VOXELS, "patch_size");
  require(patch.size() == 2 || patch.size() == 3, "patch_size must have 2 or 3 numbers");
  plan.slicewise = patch.size() == 2;
  if (plan.slicewise) patch.insert(patch.begin(), 1);
  std::copy(patch.begin(), patch.end(), plan.patch_size.begin());
  require(1.0 * patch[0] * patch[1] * patch[2] <= 1.0 * LARGEST_PATCH_VOXELS, "patch_size must be at most 2^31 voxels");
  for (const Json& value : from.at("spacing")) {
    plan.spacing.push_back(number(value, "spacing"));
    require(plan.spacing.back() > 0, "spacing must be above 0");
  }
  require(plan.spacing.size() == (plan.slicewise ? 2 : 3), "spacing must have as many numbers as patch_size");
  const auto order = whole_numbers(from.at("transpose_forward"), 0, 2, "transpose_forward");
  require(order.size() == 3 && std::set<Size>(order.begin(), order.end()).size() == 3,
          "transpose_forward must be an order of the axes 0, 1, 2");
  std::copy(order.begin(), order.end(), plan.transpose_forward.begin());
}

Plan plan_of(const Json& from) {
  Plan plan;
  const Size schema = whole_number(from.at("schema"), 1, INT64_MAX, "schema");
  require(schema == SCHEMA, "schema must be " + std::to_string(SCHEMA) + ", it is " + std::to_string(schema) +
                                ": this library is older or newer than the nnturbo that built it");
  parse_grid(from, plan);
  for (const Json& channel : from.at("channels")) plan.channels.push_back(parse_channel(channel));
  require(!plan.channels.empty() && static_cast<Size>(plan.channels.size()) <= MOST_CHANNELS,
          "channels must be 1 to " + std::to_string(MOST_CHANNELS));
  plan.views = parse_views(from.at("views"));
  plan.resampling_data = parse_resampling(from.at("resampling_data"));
  plan.resampling_logits = parse_resampling(from.at("resampling_logits"));
  plan.labels = parse_labels(from.at("labels"));
  if (const Json& classification = from.at("classification"); !classification.is_null())
    plan.classification = parse_classification(classification, plan.labels.num_outputs);
  plan.reader = from.at("reader").get<std::string>();
  return plan;
}

}  // namespace

Spacing Plan::spacing_3d(double slice_spacing) const {
  if (slicewise) return {slice_spacing, spacing[0], spacing[1]};
  return {spacing[0], spacing[1], spacing[2]};
}

Plan parse_plan(const std::string& text) {
  try {
    return plan_of(Json::parse(text));
  } catch (const Json::exception& error) {
    fail(std::string("it must have the form that nnturbo writes: ") + error.what());
  }
}

}  // namespace nnturbo
