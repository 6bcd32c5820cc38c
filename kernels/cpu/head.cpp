// Few numbers, so sums are in double precision.

#include "head.h"

#include <cmath>
#include <stdexcept>

namespace nnturbo {
namespace {

using Doubles = std::vector<double>;
using Numbers = std::vector<float>;

constexpr double SMALLEST_FOCUS = 1e-4, LAYER_NORM_EPSILON = 1e-5;
constexpr Size VOXELS_AT_ONCE = 4096, RIM = 2;
constexpr int FOR_EACH_FEATURE = 6;  // tensors of an attention head

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// The sums of channels over voxels, each of them times its share; (rows of shares, channels).
Doubles sums(const Map& map, const float* features, const Numbers* shares, Size rows) {
  const Size voxels = map.voxels(), tasks = (voxels + VOXELS_AT_ONCE - 1) / VOXELS_AT_ONCE, channels = map.channels;
  std::vector<Doubles> parts(tasks, Doubles(rows * channels, 0.0));
  in_parallel(tasks, [&](Size task) {
    for (Size voxel = task * VOXELS_AT_ONCE; voxel < std::min(voxels, (task + 1) * VOXELS_AT_ONCE); ++voxel)
      for (Size row = 0; row < rows; ++row) {
        const double share = shares ? shares[row][voxel] : 1.0;
        for (Size channel = 0; channel < channels; ++channel)
          parts[task][row * channels + channel] += share * features[voxel * map.padded + channel];
      }
  });
  Doubles total(rows * channels, 0.0);
  for (const Doubles& part : parts)
    for (std::size_t index = 0; index < total.size(); ++index) total[index] += part[index];
  return total;
}

double sum(const Numbers& values) {
  double total = 0;
  for (const float value : values) total += value;
  return total;
}

// Averages over the blocks of a finer map that belong to each voxel of a coarser one.
Numbers averaged(const Numbers& from, const Size* size, const Size* grid) {
  const Size block[3] = {size[0] / grid[0], size[1] / grid[1], size[2] / grid[2]};
  Numbers to(grid[0] * grid[1] * grid[2]);
  in_parallel(grid[0] * grid[1], [&](Size row) {
    const Size z = row / grid[1] * block[0], y = row % grid[1] * block[1];
    for (Size x = 0; x < grid[2]; ++x) {
      double total = 0;
      for (Size i = 0; i < block[0]; ++i)
        for (Size j = 0; j < block[1]; ++j)
          for (Size k = 0; k < block[2]; ++k)
            total += from[((z + i) * size[1] + y + j) * size[2] + x * block[2] + k];
      to[row * grid[2] + x] = static_cast<float>(total / (block[0] * block[1] * block[2]));
    }
  });
  return to;
}

// The rim of two voxels around a map: its dilation minus the map.
Numbers rim(const Numbers& map, const Size* grid) {
  Numbers dilated = map;
  const Size steps[3] = {grid[1] * grid[2], grid[2], 1};
  for (int axis = 0; axis < 3; ++axis) {
    const Numbers before = dilated;
    for (Size at = 0; at < static_cast<Size>(map.size()); ++at) {
      const Size place = at / steps[axis] % grid[axis];
      for (Size shift = std::max(-RIM, -place); shift <= std::min(RIM, grid[axis] - 1 - place); ++shift)
        dilated[at] = std::max(dilated[at], before[at + shift * steps[axis]]);
    }
  }
  for (std::size_t at = 0; at < map.size(); ++at) dilated[at] = std::max(0.0f, dilated[at] - map[at]);
  return dilated;
}

Doubles linear(const Numbers& weight, const Numbers& bias, const double* values, Size count) {
  Doubles result(bias.begin(), bias.end());
  for (std::size_t row = 0; row < result.size(); ++row)
    for (Size column = 0; column < count; ++column) result[row] += double(weight[row * count + column]) * values[column];
  return result;
}

Doubles layer_norm(const Numbers& weight, const Numbers& bias, Doubles values) {
  double mean = 0, variance = 0;
  for (const double value : values) mean += value / values.size();
  for (const double value : values) variance += (value - mean) * (value - mean) / values.size();
  const double factor = 1 / std::sqrt(variance + LAYER_NORM_EPSILON);
  for (std::size_t index = 0; index < values.size(); ++index)
    values[index] = (values[index] - mean) * factor * weight[index] + bias[index];
  return values;
}

double gelu(double value) { return 0.5 * value * (1 + std::erf(value / std::sqrt(2.0))); }

}  // namespace

Head::Head(const nnturbo_head& given, const std::vector<Map>& maps, Size logits)
    : kind_(given.kind),
      logits_(logits),
      classes_(given.classes),
      regions_(given.regions != 0),
      features_(given.features, given.features + given.feature_count),
      focus_channels_(given.focus_channels, given.focus_channels + given.focus_count) {
  for (Size index = 0; index < given.tensor_count; ++index)
    tensors_.emplace_back(given.tensors[index].data, given.tensors[index].data + given.tensors[index].count);
  for (const Size channel : focus_channels_)
    require(channel >= 0 && channel < maps[logits].channels, "the head's focus must be channels of the logits");
  Size width = 0, next = 0;
  const auto has = [&](Size count) {
    return next < given.tensor_count && static_cast<Size>(tensors_[next++].size()) == count;
  };
  bool fits = classes_ >= 1 && !features_.empty();
  for (const Size feature : features_) {
    const Map& map = maps[feature];
    for (int axis = 0; axis < 3; ++axis)
      require(maps[logits].size[axis] % map.size[axis] == 0, "the logits' size must be divisible by the features'");
    if (kind_ == NNTURBO_ATTENTION_HEAD) {
      require(next + FOR_EACH_FEATURE <= given.tensor_count, "the head must have six tensors for each feature");
      const Size hidden = tensors_[next + 1].size(), queries = tensors_[next + 5].size();
      fits = has(hidden * map.channels) && has(hidden) && has(hidden * map.channels) && has(hidden) &&
             has(queries * hidden) && has(queries) && fits;
      width += queries * hidden;
    } else {
      width += (kind_ == NNTURBO_FOCUS_POOLING_HEAD ? 3 : 1) * map.channels;
    }
  }
  if (kind_ != NNTURBO_FOCUS_POOLING_HEAD) fits = has(width) && has(width) && fits;
  if (kind_ == NNTURBO_POOLED_HEAD && given.tensor_count == 6) {
    const Size hidden = tensors_[3].size();
    fits = has(hidden * width) && has(hidden) && fits;
    width = hidden;
  }
  fits = has(classes_ * width) && has(classes_) && next == given.tensor_count && fits;
  require(fits && kind_ >= NNTURBO_POOLED_HEAD && kind_ <= NNTURBO_FOCUS_POOLING_HEAD,
          "the head's tensors must fit its features and classes");
  require(kind_ == NNTURBO_POOLED_HEAD || !focus_channels_.empty(), "the head must have a focus");
}

void Head::run(const Memory& memory, float* class_logits) const {
  for (Size image = 0; image < memory.images; ++image) {
    const Doubles answered = answer(memory, image);
    std::copy(answered.begin(), answered.end(), class_logits + image * classes_);
  }
}

Doubles Head::answer(const Memory& memory, Size image) const {
  const Map& logits = memory.maps[logits_];
  Numbers shown;
  if (kind_ != NNTURBO_POOLED_HEAD) shown = focus(memory.logits + image * logits.channels * logits.voxels(), logits);
  Doubles pooled;
  Size next = 0;
  for (const Size feature : features_) {
    const Map& map = memory.maps[feature];
    const float* const values = memory.from(feature) + image * map.voxels() * map.padded;
    if (kind_ == NNTURBO_POOLED_HEAD) {
      for (const double total : sums(map, values, nullptr, 1)) pooled.push_back(total / map.voxels());
    } else if (kind_ == NNTURBO_ATTENTION_HEAD) {
      attend(map, values, averaged(shown, logits.size, map.size), next, pooled);
      next += FOR_EACH_FEATURE;
    } else {
      pool(map, values, averaged(shown, logits.size, map.size), pooled);
    }
  }
  if (kind_ != NNTURBO_FOCUS_POOLING_HEAD) {
    pooled = layer_norm(tensors_[next], tensors_[next + 1], std::move(pooled));
    next += 2;
  }
  if (kind_ == NNTURBO_POOLED_HEAD && tensors_.size() == 6) {
    pooled = linear(tensors_[next], tensors_[next + 1], pooled.data(), pooled.size());
    for (double& value : pooled) value = gelu(value);
    next += 2;
  }
  return linear(tensors_[next], tensors_[next + 1], pooled.data(), pooled.size());
}

// Probability of each voxel to belong to the focus.
Numbers Head::focus(const float* logits, const Map& map) const {
  const Size voxels = map.voxels(), classes = map.channels;
  Numbers shown(voxels, 0.0f);
  in_parallel((voxels + VOXELS_AT_ONCE - 1) / VOXELS_AT_ONCE, [&](Size task) {
    for (Size voxel = task * VOXELS_AT_ONCE; voxel < std::min(voxels, (task + 1) * VOXELS_AT_ONCE); ++voxel) {
      const auto at = [&](Size channel) { return logits[channel * voxels + voxel]; };
      float highest = at(0), total = 0, of_focus = 0;
      for (Size channel = 1; channel < classes; ++channel) highest = std::max(highest, at(channel));
      if (!regions_)
        for (Size channel = 0; channel < classes; ++channel) total += std::exp(at(channel) - highest);
      for (const Size channel : focus_channels_)
        of_focus = regions_ ? std::max(of_focus, 1 / (1 + std::exp(-at(channel))))
                            : of_focus + std::exp(at(channel) - highest) / total;
      shown[voxel] = of_focus;
    }
  });
  return shown;
}

// Averages over the patch, the focus and its rim.
void Head::pool(const Map& map, const float* features, const Numbers& inside, Doubles& pooled) const {
  Numbers shares[3] = {Numbers(inside.size(), 1.0f), inside, rim(inside, map.size)};
  for (int row = 1; row < 3; ++row)
    for (float& share : shares[row]) share += static_cast<float>(SMALLEST_FOCUS / 100);
  const Doubles totals = sums(map, features, shares, 3);
  for (Size index = 0; index < 3 * map.channels; ++index) pooled.push_back(totals[index] / sum(shares[index / map.channels]));
}

// Learned queries choose voxels. A product of query and key is one of the key's weights, by the query, and the features.
void Head::attend(const Map& map, const float* features, const Numbers& inside, Size first, Doubles& pooled) const {
  const Numbers &key_weight = tensors_[first], &key_bias = tensors_[first + 1], &queries = tensors_[first + 4],
                &guidance = tensors_[first + 5];
  const Size hidden = key_bias.size(), rows = guidance.size(), voxels = map.voxels();
  std::vector<Numbers> shares(rows, Numbers(voxels));
  in_parallel(rows, [&](Size row) {
    Doubles wanted(map.channels, 0.0);
    double constant = 0, highest = -INFINITY, total = 0;
    for (Size unit = 0; unit < hidden; ++unit) {
      const double query = queries[row * hidden + unit];
      constant += query * key_bias[unit];
      for (Size channel = 0; channel < map.channels; ++channel)
        wanted[channel] += query * key_weight[unit * map.channels + channel];
    }
    Doubles scores(voxels);
    for (Size voxel = 0; voxel < voxels; ++voxel) {
      double score = constant;
      for (Size channel = 0; channel < map.channels; ++channel)
        score += wanted[channel] * features[voxel * map.padded + channel];
      scores[voxel] = score / std::sqrt(double(hidden)) +
                      guidance[row] * std::log(std::max(double(inside[voxel]), SMALLEST_FOCUS));
      highest = std::max(highest, scores[voxel]);
    }
    for (double& score : scores) total += score = std::exp(score - highest);
    for (Size voxel = 0; voxel < voxels; ++voxel) shares[row][voxel] = static_cast<float>(scores[voxel] / total);
  });
  const Doubles chosen = sums(map, features, shares.data(), rows);
  for (Size row = 0; row < rows; ++row)
    for (const double value :
         linear(tensors_[first + 2], tensors_[first + 3], chosen.data() + row * map.channels, map.channels))
      pooled.push_back(value);
}

}  // namespace nnturbo
