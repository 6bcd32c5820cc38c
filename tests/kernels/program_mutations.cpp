// Makes programs of which some numbers are wrong, and runs those that are accepted, for sanitizers to watch; the
// instructions to use are the program's argument, and where they are not here it ends with status 77.

#include "../../kernels/cpu/program.h"

#include <cstdio>
#include <random>
#include <vector>

namespace {

std::mt19937 luck(20261127);
const std::vector<float> numbers(1 << 16, 0.01f);

nnturbo_tensor tensor(std::int64_t count) { return {numbers.data(), count}; }

nnturbo_operation operation(std::int64_t kind, std::int64_t one, std::int64_t other, std::int64_t output) {
  nnturbo_operation made{};
  made.kind = kind;
  made.inputs[0] = one;
  made.inputs[1] = other;
  made.output = output;
  made.residual = -1;
  for (int axis = 0; axis < 3; ++axis) made.taps[axis] = made.stride[axis] = 1;
  return made;
}

void set(std::int64_t* three, std::int64_t z, std::int64_t y, std::int64_t x) { three[0] = z, three[1] = y, three[2] = x; }

// Every kind of operation, and a head.
struct Example {
  std::vector<nnturbo_value> values{{0, 1, {4, 6, 8}}, {1, 5, {4, 6, 8}}, {0, 7, {2, 3, 8}}, {2, 5, {4, 6, 8}},
                                    {3, 10, {4, 6, 8}}, {1, 5, {4, 6, 8}}, {2, 5, {2, 3, 4}}, {4, 5, {4, 6, 8}},
                                    {-1, 3, {4, 6, 8}}, {5, 6, {4, 3, 4}}};
  std::vector<nnturbo_operation> operations;
  std::vector<std::int64_t> features{6}, of_head{6}, focus{1};
  std::vector<nnturbo_tensor> tensors;

  Example() {
    operations.push_back(operation(NNTURBO_CONVOLUTION, 0, -1, 1));
    set(operations.back().taps, 3, 3, 5);
    operations.back().weight = tensor(5 * 45);
    operations.back().bias = operations.back().scale = operations.back().shift = tensor(5);
    operations.push_back(operation(NNTURBO_CONVOLUTION, 1, -1, 2));
    set(operations.back().stride, 2, 2, 1);
    operations.back().weight = tensor(5 * 7);
    operations.push_back(operation(NNTURBO_TRANSPOSED_CONVOLUTION, 2, -1, 3));
    set(operations.back().stride, 2, 2, 1);
    operations.back().weight = tensor(7 * 5 * 4);
    operations.push_back(operation(NNTURBO_CONCATENATION, 3, 1, 4));
    operations.push_back(operation(NNTURBO_CONVOLUTION, 2, 1, 5));
    set(operations.back().taps, 3, 3, 3);
    set(operations.back().upsampling, 2, 2, 1);
    operations.back().transformed = 1;
    operations.back().upsampling_weight = tensor(7 * 5 * 4);
    operations.back().upsampling_bias = tensor(5);
    operations.back().weight = tensor(10 * 5 * 27);
    operations.back().bias = operations.back().scale = operations.back().shift = tensor(5);
    operations.back().residual = 3;
    operations.push_back(operation(NNTURBO_AVERAGE_POOLING, 5, -1, 6));
    set(operations.back().stride, 2, 2, 2);
    operations.push_back(operation(NNTURBO_CONVOLUTION, 4, -1, 9));  // along z alone
    set(operations.back().taps, 3, 3, 5);
    set(operations.back().stride, 1, 2, 2);
    operations.back().transformed = 1;
    operations.back().weight = tensor(10 * 6 * 45);
    operations.push_back(operation(NNTURBO_CONVOLUTION, 4, 5, 7));
    set(operations.back().taps, 1, 3, 3);
    operations.back().transformed = 1;
    operations.back().weight = tensor(15 * 5 * 9);
    operations.push_back(operation(NNTURBO_PROJECTION, 7, -1, 8));
    operations.back().weight = tensor(15);
    if (nnturbo_multiplies_int16() && luck() % 2)
      for (const int index : {1, 2, 4, 7}) operations[index].in_int16 = 1;
    for (const std::int64_t count : {4 * 5, 4, 4 * 5, 4, 2 * 4, 2, 8, 8, 2 * 8, 2}) tensors.push_back(tensor(count));
  }

  nnturbo_description description() const {
    return {values.data(), static_cast<std::int64_t>(values.size()), operations.data(),
            static_cast<std::int64_t>(operations.size()), 8,
            {NNTURBO_ATTENTION_HEAD, of_head.data(), 1, focus.data(), 1, 0, tensors.data(), 10, 2}, features.data(), 1};
  }

  void change() {
    const auto random = [](std::int64_t end) { return static_cast<std::int64_t>(luck() % end); };
    const std::int64_t wrong[] = {-1, 0, 1, 2, 3, 4, 5, 7, 9, 100, 65536, 1 << 20, -(std::int64_t{1} << 62), INT64_MAX};
    const std::int64_t number = wrong[random(14)];
    nnturbo_operation& of = operations[random(operations.size())];
    nnturbo_value& value = values[random(values.size())];
    std::int64_t* const places[] = {&of.kind, &of.inputs[random(2)], &of.output, &of.taps[random(3)], &of.stride[random(3)],
                                    &of.transformed, &of.upsampling[random(3)], &of.residual, &value.buffer,
                                    &value.channels, &value.size[random(3)], &features[0], &of_head[0], &focus[0],
                                    &of.in_int16};
    *places[random(15)] = number;
    if (random(4) == 0) of.weight.count = random(of.weight.count + 1);
    if (random(8) == 0) tensors[random(10)].count = random(4);
    if (random(4) == 0) std::swap(operations[random(operations.size())], operations[random(operations.size())]);
  }
};

}  // namespace

int main(int, char** arguments) {
  if (nnturbo_use(arguments[1])) return 77;
  int accepted = 0;
  for (int round = 0; round < 1500; ++round) {
    Example example;
    for (int changes = round % 3; changes > 0; --changes) example.change();
    const nnturbo_description description = example.description();
    char error[200];
    nnturbo_program* const program = nnturbo_program_create(&description, 1 + round % 2, error, sizeof error);
    if (!program && round % 3 == 0) {
      std::fprintf(stderr, "%s\n", error);
      return 1;
    }
    if (!program) continue;
    nnturbo_shapes shapes;
    nnturbo_program_shapes(program, &shapes);
    if (shapes.buffer_bytes < 1 << 24) {
      const std::int64_t voxels = shapes.size[0] * shapes.size[1] * shapes.size[2], tiles = 2;
      const nnturbo_value& feature = example.values[example.features[0]];
      std::vector<float> input(tiles * voxels * shapes.channels, 1.0f), logits(tiles * voxels * shapes.outputs),
          classes(tiles * shapes.classes),
          given(tiles * feature.channels * feature.size[0] * feature.size[1] * feature.size[2]);
      float* features[1] = {given.data()};
      nnturbo_program_run(program, tiles, input.data(), logits.data(), classes.data(), features, 1 + round % 2);
      accepted += round % 3 > 0;
    }
    nnturbo_program_destroy(program);
  }
  std::puts(accepted > 10 ? "done" : "too few were accepted");
}
