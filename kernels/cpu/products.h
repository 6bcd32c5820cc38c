// Products of matrices whose sums stay in registers, in float32, and in int16 where the processor multiplies that.
//
// In int16 (AVX512-VNNI) each instruction does twice the products of one in float32, as in bfloat16, with 14 bits in place
// of 8. Each row, or all rows of a block, are divided by the largest of their values, and each column of the weights by
// its own; sums of CHUNK products are whole numbers, exact, and then added in float32. Weights are so small that no such
// sum leaves 32 bits, whatever the rows hold.

// A part of convolution.cpp, and like it local to each set of instructions: see kernels.h.

#pragma once

#include "kernels.h"

#include <cmath>
#include <cstring>

namespace nnturbo {
namespace {

// Sums of a product stay in registers, two for each row: AVX-512 has 32 for sixteen numbers each, AVX2 16 for eight, ARM 32
// for four, of which g++ needs more than clang for other things.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 10;
#endif
typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

constexpr int COLUMNS = 2 * LANES;
constexpr Size CHUNK = 96;     // products of int16 of which the sum is exact
constexpr float MOST = 16383;  // that a row holds in int16

constexpr Size least(Size a, Size b) { return a < b ? a : b; }
constexpr Size most(Size a, Size b) { return a < b ? b : a; }
constexpr Size within(Size value, Size low, Size high) { return least(most(value, low), high); }

// Call `task` with 0 to `tasks` - 1, with all threads.
template <class Task>
void in_parallel(Size tasks, const Task& task) {
  run(tasks, [](const void* given, Size index) { (*static_cast<const Task*>(given))(index); }, &task);
}

Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
Vector all(float value) { return value - Vector{}; }

// Panels of so many outputs, and outputs as the weights have them, in whole panels.
constexpr Size panels(Size outputs) { return (outputs + COLUMNS - 1) / COLUMNS; }
constexpr Size whole_panels(Size outputs) { return panels(outputs) * COLUMNS; }

// One panel of those that have `depth` values for each column.
Weights panel_of(const Weights& all, Size panel, Size depth) {
  Weights one = all;
  const Size skipped = panel * depth * COLUMNS;
  if (all.in_int16) {
    one.in_int16 += skipped;
    one.scales += panel * COLUMNS;
  } else {
    one.values += skipped;
  }
  return one;
}

// What is multiplied by weights: numbers, or whole numbers and what those are to be multiplied by.
struct Rows {
  const float* values;
  const std::int16_t* in_int16 = nullptr;
  float scale = 1;

  // Those that begin so many numbers later.
  Rows from(Size numbers) const {
    return {values ? values + numbers : nullptr, in_int16 ? in_int16 + numbers : nullptr, scale};
  }
};

// A product of matrices: c = sum over parts of a[part] b[part], with b (depth, COLUMNS) one part after the other.
struct Product {
  const Rows* a;
  Size parts, step;  // from one row of a to the next
  Weights b;
  Size depth;
  const float* start;  // (COLUMNS), what every sum starts with
  float* c;
  Size width;    // from one row of c to the next
  Size columns;  // that are wanted; all are computed if these are more than LANES
};

struct InFloat32 {
  template <int R, bool WHOLE>
  static inline void multiply(const Product& of, Size first) {
    Vector sums[R][2];
    const Vector start[2] = {load(of.start), WHOLE ? load(of.start + LANES) : Vector{}};
#pragma GCC unroll 12
    for (int row = 0; row < R; ++row) sums[row][0] = start[0], sums[row][1] = start[1];
    const float* b = of.b.values;
    for (Size part = 0; part < of.parts; ++part) {
      const float* a = of.a[part].values + first * of.step;
      for (Size k = 0; k < of.depth; ++k, b += COLUMNS) {
        const Vector left = load(b), right = load(b + LANES);
#pragma GCC unroll 12
        for (int row = 0; row < R; ++row) {
          const Vector value = all(a[row * of.step + k]);
          sums[row][0] += value * left;
          if constexpr (WHOLE) sums[row][1] += value * right;
        }
      }
    }
    float* c = of.c + first * of.width;
#pragma GCC unroll 12
    for (int row = 0; row < R; ++row) {
      store(c + row * of.width, sums[row][0]);
      if constexpr (WHOLE) store(c + row * of.width + LANES, sums[row][1]);
    }
  }
};

#if defined(__AVX512F__)

typedef std::int32_t Integers __attribute__((vector_size(LANES * sizeof(std::int32_t)), aligned(4), may_alias));
typedef std::int16_t Shorts __attribute__((vector_size(LANES * sizeof(std::int16_t)), aligned(2), may_alias));

Integers load_integers(const void* from) { return *static_cast<const Integers*>(from); }

// Two products of int16 for each sum. As an instruction by name, it needs no compiler that may use it elsewhere.
inline void add_products(Integers& sums, Integers one, Integers other) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(one), "v"(other));
}

inline Integers all_of_pair(const std::int16_t* from) {
  std::int32_t pair;
  std::memcpy(&pair, from, sizeof pair);
  return pair - Integers{};
}

struct InInt16 {
  template <int R, bool WHOLE>
  static inline void multiply(const Product& of, Size first) {
    const std::int16_t* b = of.b.in_int16;
    const Vector scales[2] = {load(of.b.scales), WHOLE ? load(of.b.scales + LANES) : Vector{}};
    const Vector start[2] = {load(of.start), WHOLE ? load(of.start + LANES) : Vector{}};
    float* const c = of.c + first * of.width;
    bool is_first = true;
    for (Size part = 0; part < of.parts; ++part) {
      const std::int16_t* a = of.a[part].in_int16 + first * of.step;
      const Vector by[2] = {scales[0] * of.a[part].scale, scales[1] * of.a[part].scale};
      for (Size chunk = 0; chunk < of.depth; chunk += CHUNK, is_first = false) {
        Integers sums[R][2];
#pragma GCC unroll 12
        for (int row = 0; row < R; ++row) sums[row][0] = sums[row][1] = Integers{};
        for (Size k = chunk; k < least(of.depth, chunk + CHUNK); k += 2, b += 2 * COLUMNS) {
          const Integers left = load_integers(b), right = load_integers(b + 2 * LANES);
#pragma GCC unroll 12
          for (int row = 0; row < R; ++row) {
            const Integers pair = all_of_pair(a + row * of.step + k);
            add_products(sums[row][0], pair, left);
            if constexpr (WHOLE) add_products(sums[row][1], pair, right);
          }
        }
#pragma GCC unroll 12
        for (int row = 0; row < R; ++row) {
          float* const to = c + row * of.width;
          const Vector left = __builtin_convertvector(sums[row][0], Vector);
          store(to, (is_first ? start[0] : load(to)) + left * by[0]);
          if constexpr (!WHOLE) continue;
          const Vector right = __builtin_convertvector(sums[row][1], Vector);
          store(to + LANES, (is_first ? start[1] : load(to + LANES)) + right * by[1]);
        }
      }
    }
  }
};

// Numbers in int16, so many as whole vectors hold; gives what these are to be multiplied by. That is no number where one
// of the numbers is infinite or none.
float narrow(const float* from, Size count, std::int16_t* to) {
  constexpr float TINY = 1e-30f, ROUNDING = 3 << 22;  // added to a number, this leaves it in whole numbers in the last bits
  Integers bits{};  // of the largest magnitude; not a number is larger than all
  for (Size at = 0; at < count; at += LANES) {
    const Integers magnitude = load_integers(from + at) & 0x7fffffff;
    bits = magnitude > bits ? magnitude : bits;
  }
  std::int32_t largest_bits = 0;
  for (int lane = 0; lane < LANES; ++lane) largest_bits = bits[lane] > largest_bits ? bits[lane] : largest_bits;
  float largest;
  std::memcpy(&largest, &largest_bits, sizeof largest);
  if (!(largest >= TINY && largest < INFINITY)) {
    std::memset(to, 0, count * sizeof *to);
    return largest < TINY ? 0.0f : NAN;
  }
  const float by = MOST / largest;
  for (Size at = 0; at < count; at += LANES) {
    const Vector whole = load(from + at) * by + ROUNDING;
    *reinterpret_cast<Shorts*>(to + at) = __builtin_convertvector(reinterpret_cast<const Integers&>(whole), Shorts);
  }
  return largest / MOST;
}

// Panels of (parts, depth, COLUMNS) in int16, pairs of rows together, and what each column is to be multiplied by.
void narrow_panels(Size panels, Size parts, Size depth, const float* from, std::int16_t* to, float* scales) {
  const Size rows = parts * depth;
  in_parallel(panels, [&](Size panel) {
    const float* const values = from + panel * rows * COLUMNS;
    for (int column = 0; column < COLUMNS; ++column) {
      double largest = 0, largest_sum = 0, all = 0;  // of one value, of the values of a chunk, and their sum
      for (Size part = 0; part < parts; ++part)
        for (Size chunk = 0; chunk < depth; chunk += CHUNK) {
          double sum = 0;
          for (Size k = chunk; k < least(depth, chunk + CHUNK); ++k) {
            const double value = std::fabs(values[(part * depth + k) * COLUMNS + column]);
            largest = value > largest ? value : largest;
            sum += value;
          }
          largest_sum = sum > largest_sum ? sum : largest_sum;
          all += sum;
        }
      // Rounding adds up to half of one to each.
      const double room = 2147483647.0 / MOST - CHUNK / 2.0, by_sum = room / largest_sum, by_value = 32767 / largest;
      const bool are_numbers = all < INFINITY, are_zero = largest == 0;
      const double by = by_sum < by_value ? by_sum : by_value;
      scales[panel * COLUMNS + column] = !are_numbers ? NAN : are_zero ? 0.0f : static_cast<float>(1 / by);
      for (Size row = 0; row < rows; ++row)
        to[panel * rows * COLUMNS + (row / 2 * COLUMNS + column) * 2 + row % 2] =
            are_numbers && !are_zero ? static_cast<std::int16_t>(std::lrint(values[row * COLUMNS + column] * by)) : 0;
    }
  });
}

constexpr auto NARROW_PANELS = narrow_panels;

#else

constexpr decltype(Kernels::narrow_panels) NARROW_PANELS = nullptr;

#endif

template <class Numbers, int R, bool WHOLE>
inline void multiply_rest(const Product& of, Size first, Size rows) {
  if constexpr (R > 0) {
    if (rows == R)
      Numbers::template multiply<R, WHOLE>(of, first);
    else
      multiply_rest<Numbers, R - 1, WHOLE>(of, first, rows);
  }
}

template <class Numbers, bool WHOLE>
void multiply_block(const Product& of, Size first, Size end) {
  Size row = first;
  for (; row + ROWS <= end; row += ROWS) Numbers::template multiply<ROWS, WHOLE>(of, row);
  multiply_rest<Numbers, ROWS - 1, WHOLE>(of, row, end - row);
}

template <class Numbers>
void multiply_columns(const Product& of, Size first, Size end) {
  of.columns > LANES ? multiply_block<Numbers, true>(of, first, end) : multiply_block<Numbers, false>(of, first, end);
}

void multiply_rows(const Product& of, Size first, Size end) {
#if defined(__AVX512F__)
  if (of.b.in_int16) return multiply_columns<InInt16>(of, first, end);
#endif
  multiply_columns<InFloat32>(of, first, end);
}

// Numbers as they are multiplied by weights; `room` is for as many int16.
Rows rows_for([[maybe_unused]] const Weights& weights, const float* values, [[maybe_unused]] Size count,
              [[maybe_unused]] void* room) {
#if defined(__AVX512F__)
  if (weights.in_int16) {
    auto* const in_int16 = static_cast<std::int16_t*>(room);
    const float scale = narrow(values, count, in_int16);
    return {nullptr, in_int16, scale};
  }
#endif
  return {values};
}

}  // namespace
}  // namespace nnturbo
