// Runs one program, and others beside it, from several threads at once, each with threads of its own, for sanitizers to
// watch; the instructions to use are the program's argument, and where they are not here it ends with status 77.

#include "../../kernels/cpu/program.h"

#include <atomic>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

namespace {

constexpr int CALLERS = 4, ROUNDS = 6, MOST_THREADS = 3;
constexpr std::int64_t CHANNELS = 5, SIZE[3] = {6, 9, 26}, VOXELS = SIZE[0] * SIZE[1] * SIZE[2];

using Program = std::unique_ptr<nnturbo_program, decltype(&nnturbo_program_destroy)>;
using Floats = std::vector<float>;

Floats numbers(std::int64_t count, int seed) {
  Floats made(count);
  for (std::int64_t index = 0; index < count; ++index) made[index] = static_cast<float>((index * 37 + seed * 11) % 101 - 50);
  return made;
}

nnturbo_operation operation(std::int64_t kind, std::int64_t input, std::int64_t output, const Floats& weight) {
  nnturbo_operation made{};
  made.kind = kind;
  made.inputs[0] = input;
  made.inputs[1] = made.residual = -1;
  made.output = output;
  for (int axis = 0; axis < 3; ++axis) made.taps[axis] = made.stride[axis] = 1;
  made.weight = {weight.data(), static_cast<std::int64_t>(weight.size())};
  return made;
}

// A direct convolution, one by fewer products, which multiplies in int16 where that is here, and a projection.
Program made(int threads) {
  const Floats first = numbers(CHANNELS * 45, 1), second = numbers(CHANNELS * CHANNELS * 27, 2),
               last = numbers(2 * CHANNELS, 3), scale(CHANNELS, 1.0f);
  std::vector<nnturbo_value> values;
  for (const std::int64_t channels : {std::int64_t{1}, CHANNELS, CHANNELS, std::int64_t{2}})
    values.push_back({channels == 2 ? -1 : static_cast<std::int64_t>(values.size()), channels, {SIZE[0], SIZE[1], SIZE[2]}});
  std::vector<nnturbo_operation> operations{operation(NNTURBO_CONVOLUTION, 0, 1, first),
                                            operation(NNTURBO_CONVOLUTION, 1, 2, second),
                                            operation(NNTURBO_PROJECTION, 2, 3, last)};
  operations[0].taps[0] = operations[0].taps[1] = 3;
  operations[0].taps[2] = 5;
  for (std::int64_t& taps : operations[1].taps) taps = 3;
  operations[1].transformed = 1;
  operations[1].in_int16 = nnturbo_multiplies_int16();
  operations[1].epsilon = 1e-5f;
  operations[1].scale = operations[1].shift = {scale.data(), CHANNELS};
  const nnturbo_description description{values.data(), 4, operations.data(), 3, 3, {}, nullptr, 0};
  char error[200] = "";
  Program program(nnturbo_program_create(&description, threads, error, sizeof error), &nnturbo_program_destroy);
  if (!program) std::fprintf(stderr, "%s\n", error);
  return program;
}

Floats logits_of(const nnturbo_program* program, int seed, int threads) {
  const Floats tile = numbers(VOXELS, seed);
  Floats logits(2 * VOXELS);
  if (!program || nnturbo_program_run(program, 1, tile.data(), logits.data(), nullptr, nullptr, threads)) logits.clear();
  return logits;
}

}  // namespace

int main(int, char** arguments) {
  if (nnturbo_use(arguments[1])) return 77;
  const Program shared = made(2);
  std::vector<Floats> expected;
  for (int caller = 0; caller < CALLERS; ++caller) expected.push_back(logits_of(shared.get(), caller, 1));
  std::atomic<int> faults{expected[0].empty() || expected[0] == expected[1]};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < CALLERS; ++caller)
    callers.emplace_back([&, caller] {
      for (int round = 0; round < ROUNDS; ++round) {
        const int threads = 1 + (caller + round) % MOST_THREADS;
        faults += logits_of(shared.get(), caller, threads) != expected[caller];
        faults += logits_of(made(threads).get(), caller, threads) != expected[caller];
      }
    });
  for (std::thread& caller : callers) caller.join();
  std::puts(faults ? "results differ" : "done");
}
