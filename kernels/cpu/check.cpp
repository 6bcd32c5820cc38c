// Checks programs: whoever reads one from a file may have been given any numbers.

#include "check.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace nnturbo {
namespace {

constexpr Size MOST = 1 << 16, MOST_NUMBERS = Size{1} << 40, MOST_TAPS = 31;  // so that sizes in bytes are numbers that fit

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

bool within(const int64_t* sizes, Size most) {
  for (int axis = 0; axis < 3; ++axis)
    if (sizes[axis] < 1 || sizes[axis] > most) return false;
  return true;
}

bool are_zero(const int64_t* sizes) { return sizes[0] == 0 && sizes[1] == 0 && sizes[2] == 0; }

Size product(const int64_t* sizes) { return sizes[0] * sizes[1] * sizes[2]; }

// Follows a program and knows which value each buffer holds.
class Check {
 public:
  Check(const nnturbo_description& of, const std::vector<Map>& maps)
      : of_(of), maps_(maps), holds_(maps.size(), -1) {
    require(of.operation_count >= 1, "a program must have operations");
    holds_[maps[0].buffer] = 0;
  }

  void run() {
    for (Size index = 0; index < of_.operation_count; ++index) {
      where_ = "operation " + std::to_string(index) + ": ";
      follow(of_.operations[index]);
    }
    where_.clear();
    require(logits_, "the last operations of a program must give its logits");
    for (Size index = 0; index < of_.feature_count; ++index) read(of_.features[index]);
    for (Size index = 0; index < of_.head.feature_count; ++index) read(of_.head.features[index]);
  }

 private:
  void require(bool holds, const std::string& what) const { nnturbo::require(holds, where_ + what); }

  const Map& read(Size value) const {
    require(value >= 0 && value < static_cast<Size>(maps_.size()) && value != of_.logits &&
                holds_[maps_[value].buffer] == value,
            "it reads value " + std::to_string(value) + ", which is not there then");
    return maps_[value];
  }

  const Map& written(const nnturbo_operation& operation) {
    const Size value = operation.output;
    require(value > 0 && value < static_cast<Size>(maps_.size()), "its output must be a value, but not the tile");
    require((value == of_.logits) == (operation.kind == NNTURBO_PROJECTION), "projections give the logits");
    if (value == of_.logits) {
      logits_ = true;
      return maps_[value];
    }
    for (const Size input : operation.inputs)
      require(input < 0 || maps_[input].buffer != maps_[value].buffer || may_overwrite(operation),
              "it may not write over its input");
    require(operation.residual < 0 || maps_[operation.residual].buffer != maps_[value].buffer,
            "it may not write over what it adds");
    holds_[maps_[value].buffer] = value;
    return maps_[value];
  }

  bool may_overwrite(const nnturbo_operation& operation) const {
    const Size last = operation.inputs[1] >= 0 ? operation.inputs[1] : operation.inputs[0];
    const Size other = operation.inputs[1] >= 0 ? operation.inputs[0] : -1;
    const Map& to = maps_[operation.output];
    return may_have_two(operation) && operation.kind == NNTURBO_CONVOLUTION &&
           (last != operation.inputs[0] || are_zero(operation.upsampling)) &&
           (other < 0 || maps_[other].buffer != to.buffer) && maps_[last].channels == to.channels &&
           same_size(maps_[last], to);
  }

  static bool may_have_two(const nnturbo_operation& operation) {
    return operation.kind == NNTURBO_CONCATENATION ||
           (operation.kind == NNTURBO_CONVOLUTION && operation.transformed && !goes_along_z(operation));
  }

  static bool same_size(const Map& one, const Map& other) { return std::equal(one.size, one.size + 3, other.size); }

  void follow(const nnturbo_operation& operation) {
    const Map first = read(operation.inputs[0]);
    const bool two = operation.inputs[1] >= 0;
    if (two) read(operation.inputs[1]);
    require(!two || may_have_two(operation), "it must have one input");
    require(operation.residual < 0 || operation.kind == NNTURBO_CONVOLUTION, "only convolutions add a residual");
    if (operation.in_int16) multiplies_in_int16(operation);
    switch (operation.kind) {
      case NNTURBO_CONVOLUTION:
        return convolution(operation);
      case NNTURBO_TRANSPOSED_CONVOLUTION:
        require(within(operation.stride, MOST_TAPS), "its stride must be 1 to 31 along each axis");
        weights(operation, first.channels, written(operation), product(operation.stride));
        return scaled(first, operation.stride, maps_[operation.output]);
      case NNTURBO_CONCATENATION: {
        const Map& to = written(operation);
        require(two, "it must have two inputs");
        const Map& second = maps_[operation.inputs[1]];
        return require(first.channels + second.channels == to.channels && same_size(first, to) &&
                           same_size(second, to),
                       "what is concatenated must have the size of its output, and its channels together");
      }
      case NNTURBO_AVERAGE_POOLING: {
        const Map& to = written(operation);
        require(within(operation.stride, MOST_TAPS), "its stride must be 1 to 31 along each axis");
        require(first.channels == to.channels && first.padded == to.padded, "it must keep the channels");
        for (int axis = 0; axis < 3; ++axis)
          require(first.size[axis] / operation.stride[axis] == to.size[axis], "its output has another size");
        return;
      }
      case NNTURBO_PROJECTION: {
        const Map& to = written(operation);
        weights(operation, first.channels, to, 1);
        return require(same_size(first, to), "logits must have the size of what they are made from");
      }
      default:
        require(false, "kind " + std::to_string(operation.kind) + " is unknown");
    }
  }

  void multiplies_in_int16(const nnturbo_operation& operation) const {
    const bool has_weights =
        operation.kind == NNTURBO_CONVOLUTION || operation.kind == NNTURBO_TRANSPOSED_CONVOLUTION;
    require(has_weights && operation.inputs[0] != 0,
            "only convolutions multiply in int16, transposed or not, and none from the tile");
    require(multiplies_int16(),
            "it multiplies in int16, which needs a processor with AVX512-VNNI; use fp32 on this one");
  }

  void convolution(const nnturbo_operation& operation) {
    require(within(operation.taps, MOST_TAPS) && within(operation.stride, MOST_TAPS),
            "taps and strides must be 1 to 31 along each axis");
    for (int axis = 0; axis < 3; ++axis) require(operation.taps[axis] % 2 == 1, "taps must be odd");
    const Map first = finer(operation);
    Size channels = first.channels;
    if (operation.inputs[1] >= 0) {
      const Map& second = maps_[operation.inputs[1]];
      require(same_size(first, second), "two inputs must have the same size");
      channels += second.channels;
    }
    if (operation.residual >= 0) {
      const Map& residual = read(operation.residual);
      require(operation.scale.count > 0 && operation.output >= 0 &&
                  operation.output < static_cast<Size>(maps_.size()) &&
                  residual.padded == maps_[operation.output].padded &&
                  residual.channels == maps_[operation.output].channels && same_size(residual, maps_[operation.output]),
              "what it adds after its norm must have the size of its output");
    }
    const Map& to = written(operation);
    if (operation.transformed) {
      const bool along_all = operation.taps[0] == 1 || operation.taps[0] == 3;
      const bool along_z = operation.taps[0] == 3 && operation.stride[0] == 1 && !operation.in_int16 &&
                           operation.stride[1] <= operation.taps[1] && operation.stride[2] <= operation.taps[2];
      require((goes_along_z(operation) ? along_z : along_all) && operation.inputs[0] != 0 && operation.inputs[1] != 0,
              "it can only be transformed with 1 or 3 x 3 x 3 taps and stride 1, or in float32 with 3 taps and stride 1 "
              "along z and strides up to its taps along y and x, and not from the tile");
    }
    for (int axis = 0; axis < 3; ++axis)
      require((first.size[axis] - 1) / operation.stride[axis] + 1 == to.size[axis], "its output has another size");
    weights(operation, channels, to, product(operation.taps));
    for (const nnturbo_tensor* each : {&operation.scale, &operation.shift})
      require(each->count == 0 || each->count == to.channels, "a norm must have a number for each channel");
    require(operation.shift.count == operation.scale.count, "a norm must have scale and shift");
  }

  Map finer(const nnturbo_operation& operation) const {
    const Map& coarse = maps_[operation.inputs[0]];
    if (are_zero(operation.upsampling)) return coarse;
    require(may_have_two(operation) && within(operation.upsampling, MOST_TAPS),
            "only convolutions that are transformed, but not along z alone, take what is upsampled, by 1 to 31 along each axis");
    const Size each = coarse.channels * product(operation.upsampling), all = operation.upsampling_weight.count;
    require(all > 0 && all % each == 0 && all / each <= MOST, "the weights of the upsampling do not fit its input");
    const Size biases = operation.upsampling_bias.count;
    require(biases == 0 || biases == all / each, "there must be a bias for each channel");
    return first_input(operation, maps_, 1);
  }

  void weights(const nnturbo_operation& operation, Size inputs, const Map& to, Size taps) const {
    require(operation.weight.count == inputs * to.channels * taps, "its weights do not fit inputs and outputs");
    require(operation.bias.count == 0 || operation.bias.count == to.channels, "there must be a bias for each channel");
  }

  void scaled(const Map& from, const int64_t* stride, const Map& to) const {
    for (int axis = 0; axis < 3; ++axis)
      require(from.size[axis] * stride[axis] == to.size[axis], "its output has another size");
  }

  const nnturbo_description& of_;
  const std::vector<Map>& maps_;
  std::vector<Size> holds_;  // by buffer
  std::string where_;
  bool logits_ = false;
};

}  // namespace

std::vector<Map> maps_of(const nnturbo_description& description, Size lanes) {
  const Size count = description.value_count;
  require(count >= 2 && count <= MOST, "a program must have 2 to 65536 values");
  require(description.logits > 0 && description.logits < count, "the logits must be a value, but not the tile");
  std::vector<Map> maps;
  for (Size index = 0; index < count; ++index) {
    const nnturbo_value& value = description.values[index];
    const std::string which = "value " + std::to_string(index);
    require(value.channels >= 1 && value.channels <= MOST && within(value.size, MOST) &&
                product(value.size) <= MOST_NUMBERS / value.channels,
            which + " must have 1 to 65536 channels and voxels along each axis, and at most 2^40 numbers");
    const bool in_buffer = index != description.logits;
    require(value.buffer >= (in_buffer ? 0 : -1) && value.buffer < (in_buffer ? count : 0),
            which + " must be in one of as many buffers as values, and logits in none");
    const bool exact = index == 0 || !in_buffer;
    maps.push_back({value.buffer, value.channels, {value.size[0], value.size[1], value.size[2]},
                    exact ? value.channels : (value.channels + lanes - 1) / lanes * lanes});
  }
  return maps;
}

void check(const nnturbo_description& description, const std::vector<Map>& maps) { Check(description, maps).run(); }

}  // namespace nnturbo
