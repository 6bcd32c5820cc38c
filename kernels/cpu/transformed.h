// Convolutions by Winograd's minimal filtering (Lavin and Gray, arXiv:1509.09308), which need fewer products: 4 outputs of
// three taps take 6 in place of 12, and 2 outputs 4 in place of 6.
//
// Those of 3 x 3 x 3 taps go by fours along z and y and by pairs along x, those of 1 x 3 x 3 by fours along y and x: 144
// products of matrices take the place of 864, or 36 that of 144. In int16 taps along x are summed. With three taps along z
// and others, or strides, along y and x, convolutions go by fours along z alone, see along_z.h.
//
// A task is a block of output planes and rows; its transformed tiles and its products stay in the cache.

// A part of convolution.cpp, and like it local to each set of instructions: see kernels.h.

#pragma once

#include "direct.h"
#include "transforms.h"

namespace nnturbo {
namespace {

constexpr Size ROWS_OF_BLOCK = 12 * LANES;  // about, of transformed values, for each matrix of weights
constexpr Size TILES_AT_ONCE = 24;
constexpr Size PART_X = 48;  // about; of more, what a block transforms of few channels does not stay in the cache
constexpr Size TASKS_PER_THREAD = 16;  // at least, between two waits for all of them

struct Input {
  const float* values;
  Size channels, first = 0;  // the plane that values begin with
  const float* before = nullptr;     // the plane before those that are computed, where it is no longer in values
  const float* plane(Size z, Size voxels) const { return values + (z - first) * voxels * channels; }
};

struct Convolution {
  Input inputs[2];
  Size z, y, x, outputs;
  Weights weights;
  const float* bias;
  float* to;           // of plane `first`
  Size first, end;     // planes to compute
  Size depth() const { return inputs[0].channels + inputs[1].channels; }
};

// Some tiles of rows of transformed values, of which each has two voxels more than it has results.
struct Lines {
  Size tiles, across, depth, outputs;
  Size in() const { return (across + 2) * depth; }
  Size out() const { return across * outputs; }
  Size pairs() const { return tiles * across / PAIR_OUT; }
};

// Their products with one position's weights, three taps along x by pairs; `room` is for pairs and their products.
void multiply_pairs(const Lines& of, const Weights& weights, Size position, const float* from, float* to, float* room) {
  float* const products = room + of.pairs() * of.depth;
  const Size count = of.pairs() * of.outputs;
  for (int index = 0; index < PAIR_IN; ++index) {
    float* pair = room;
    for (Size tile = 0; tile < of.tiles; ++tile)
      for (Size x = 0; x < of.across; x += PAIR_OUT, pair += of.depth)
        for (Size channel = 0; channel < of.depth; channel += LANES)
          store(pair + channel, pair_input(from + tile * of.in() + x * of.depth + channel, of.depth, index));
    const Rows rows{room};
    for (Size panel = 0; panel < panels(of.outputs); ++panel)
      multiply_rows({&rows, 1, of.depth,
                     panel_of(weights, (position * PAIR_IN + index) * panels(of.outputs) + panel, of.depth), of.depth,
                     NOTHING, products + index * count + panel * COLUMNS, of.outputs, of.outputs - panel * COLUMNS},
                    0, of.pairs());
  }
  for (Size pair = 0; pair < of.pairs(); ++pair)
    for (Size channel = 0; channel < of.outputs; channel += LANES)
      pair_output(products + pair * of.outputs + channel, count, to + PAIR_OUT * pair * of.outputs + channel, of.outputs);
}

// The same tap by tap: in int16, rows of 3 * depth values that overlap share what they are divided by.
void multiply_taps(const Lines& of, const Weights& weights, Size position, const float* from, float* to, float* room) {
  const Rows all = rows_for(weights, from, of.tiles * of.in(), room);
  for (Size panel = 0; panel < panels(of.outputs); ++panel)
    for (Size tile = 0; tile < of.tiles; ++tile) {
      const Rows rows = all.from(tile * of.in());
      multiply_rows({&rows, 1, of.depth, panel_of(weights, position * panels(of.outputs) + panel, 3 * of.depth),
                     3 * of.depth, NOTHING, to + tile * of.out() + panel * COLUMNS, of.outputs,
                     of.outputs - panel * COLUMNS},
                    0, of.across);
    }
}

// One block: OUT planes of `tiles` times OUT rows, of which `width` voxels from x0 on.
void block(const Convolution& of, Size z0, Size y0, Size tiles, Size x0, Size width) {
  const bool by_pairs = !of.weights.in_int16;
  const Size depth = of.depth(), across = by_pairs ? (width + 1) / PAIR_OUT * PAIR_OUT : width;
  const Lines lines{tiles, across, depth, of.outputs};
  const Size tile_in = lines.in(), tile_out = lines.out();
  const Size in_room = by_pairs ? lines.pairs() * (depth + PAIR_IN * of.outputs) : tiles * tile_in;
  float* transformed = scratch(IN * IN * tiles * (tile_in + tile_out) + in_room);
  float* products = transformed + IN * IN * tiles * tile_in;
  float* const room = products + IN * IN * tiles * tile_out;
  Size offset = 0;
  for (const Input& input : of.inputs) {
    const float* planes[IN];  // none outside of the scan
    for (int i = 0; i < IN; ++i) {
      const Size z = z0 + i - 1;
      const bool gone = input.before && z == of.first - 1;
      planes[i] = z < 0 || z >= of.z ? nullptr : gone ? input.before : input.plane(z, of.y * of.x);
    }
    for (Size tile = 0; tile < tiles; ++tile)
      for (Size x = x0 - 1; x <= x0 + across; ++x) {
        float* to = transformed + tile * tile_in + (x - x0 + 1) * depth + offset;
        for (Size channel = 0; channel < input.channels; channel += LANES) {
          Vector along_z[IN][IN], d[IN], v[IN];
          for (int j = 0; j < IN; ++j) {
            const Size y = y0 + tile * OUT + j - 1;
            const bool inside = x >= 0 && x < of.x && y >= 0 && y < of.y;
            const Size at = (y * of.x + x) * input.channels + channel;
            for (int i = 0; i < IN; ++i) d[i] = inside && planes[i] ? load(planes[i] + at) : Vector{};
            transform_input(d, v);
            for (int i = 0; i < IN; ++i) along_z[i][j] = v[i];
          }
          for (int i = 0; i < IN; ++i) {
            transform_input(along_z[i], v);
            for (int j = 0; j < IN; ++j) store(to + (i * IN + j) * tiles * tile_in + channel, v[j]);
          }
        }
      }
    offset += input.channels;
  }
  for (int position = 0; position < IN * IN; ++position)
    (by_pairs ? multiply_pairs : multiply_taps)(lines, of.weights, position, transformed + position * tiles * tile_in,
                                                products + position * tiles * tile_out, room);
  for (Size tile = 0; tile < tiles; ++tile) {
    const Size rows = least(OUT, of.y - (y0 + tile * OUT));
    const Size planes = least(OUT, of.end - z0);
    for (Size x = 0; x < width; ++x)
      for (Size channel = 0; channel < of.outputs; channel += LANES) {
        const float* from = products + tile * tile_out + x * of.outputs + channel;
        Vector along_y[IN][OUT], m[IN], y[OUT];
        for (int i = 0; i < IN; ++i) {
          for (int j = 0; j < IN; ++j) m[j] = load(from + (i * IN + j) * tiles * tile_out);
          transform_output(m, along_y[i]);
        }
        const Vector bias = load(of.bias + channel);
        for (int row = 0; row < rows; ++row) {
          for (int i = 0; i < IN; ++i) m[i] = along_y[i][row];
          transform_output(m, y);
          for (int plane = 0; plane < planes; ++plane)
            store(of.to + (((z0 - of.first + plane) * of.y + y0 + tile * OUT + row) * of.x + x0 + x) * of.outputs + channel,
                  y[plane] + bias);
        }
      }
  }
}

// The same where there are no taps along z: some tiles, row by row and plane by plane, which are transformed along y and
// x. Small planes share a block, and so the weights.
void flat_block(const Convolution& of, Size first_tile, Size count) {
  const Size depth = of.depth(), tiles_x = (of.x + OUT - 1) / OUT, tiles_y = (of.y + OUT - 1) / OUT;
  float* transformed = scratch(IN * IN * count * (depth + of.outputs) + count * depth);
  float* products = transformed + IN * IN * count * depth;
  float* const room = products + IN * IN * count * of.outputs;
  Size offset = 0;
  for (const Input& input : of.inputs) {
    for (Size tile = 0; tile < (input.channels ? count : 0); ++tile) {
      const Size row = (first_tile + tile) / tiles_x;
      const float* const plane = input.plane(of.first + row / tiles_y, of.y * of.x);
      const Size first_y = row % tiles_y * OUT - 1, first_x = (first_tile + tile) % tiles_x * OUT - 1;
      for (Size channel = 0; channel < input.channels; channel += LANES) {
        Vector along_y[IN][IN], d[IN], v[IN];
        for (int i = 0; i < IN; ++i) {
          const Size x = first_x + i;
          for (int j = 0; j < IN; ++j) {
            const Size y = first_y + j;
            const bool inside = x >= 0 && x < of.x && y >= 0 && y < of.y;
            d[j] = inside ? load(plane + (y * of.x + x) * input.channels + channel) : Vector{};
          }
          transform_input(d, v);
          for (int j = 0; j < IN; ++j) along_y[j][i] = v[j];
        }
        float* to = transformed + tile * depth + offset + channel;
        for (int j = 0; j < IN; ++j) {
          transform_input(along_y[j], v);
          for (int i = 0; i < IN; ++i) store(to + (j * IN + i) * count * depth, v[i]);
        }
      }
    }
    offset += input.channels;
  }
  for (int position = 0; position < IN * IN; ++position) {
    const Rows rows = rows_for(of.weights, transformed + position * count * depth, count * depth, room);
    for (Size panel = 0; panel < panels(of.outputs); ++panel)
      multiply_rows({&rows, 1, depth, panel_of(of.weights, position * panels(of.outputs) + panel, depth), depth, NOTHING,
                     products + position * count * of.outputs + panel * COLUMNS, of.outputs,
                     of.outputs - panel * COLUMNS},
                    0, count);
  }
  for (Size tile = 0; tile < count; ++tile) {
    const Size row = (first_tile + tile) / tiles_x, plane = row / tiles_y;
    const Size first_y = row % tiles_y * OUT, first_x = (first_tile + tile) % tiles_x * OUT;
    for (Size channel = 0; channel < of.outputs; channel += LANES) {
      const float* from = products + tile * of.outputs + channel;
      Vector along_x[IN][OUT], m[IN], y[OUT];
      for (int j = 0; j < IN; ++j) {
        for (int i = 0; i < IN; ++i) m[i] = load(from + (j * IN + i) * count * of.outputs);
        transform_output(m, along_x[j]);
      }
      const Vector bias = load(of.bias + channel);
      for (int column = 0; column < least(OUT, of.x - first_x); ++column) {
        for (int j = 0; j < IN; ++j) m[j] = along_x[j][column];
        transform_output(m, y);
        for (int line = 0; line < least(OUT, of.y - first_y); ++line)
          store(of.to + ((plane * of.y + first_y + line) * of.x + first_x + column) * of.outputs + channel,
                y[line] + bias);
      }
    }
  }
}

void copy(const float* from, Size count, float* to) {
  constexpr Size AT_ONCE = 1 << 16;
  in_parallel((count + AT_ONCE - 1) / AT_ONCE, [&](Size index) {
    copy_floats(from + index * AT_ONCE, least(AT_ONCE, count - index * AT_ONCE), to + index * AT_ONCE);
  });
}

// Some planes after the others. The first input may be spread from coarser voxels, which then never is there as a whole,
// and `to` may be the last input, which is overwritten as soon as it is not needed any more.
template <bool ALONG_Z>
void convolve(Convolution of, const Spread* coarse) {
  constexpr Size PLANES = ALONG_Z ? OUT : 1, HALO = ALONG_Z ? 1 : 0;
  const Size tiles_y = (of.y + OUT - 1) / OUT, tiles = within(ROWS_OF_BLOCK / of.x, 1, tiles_y);
  const Size blocks_y = (tiles_y + tiles - 1) / tiles, plane = of.y * of.x;
  const Size part_x = whole_rows(of.x, most(1, (of.x + PART_X / 2) / PART_X)), parts_x = (of.x + part_x - 1) / part_x;
  Input& last = of.inputs[of.inputs[1].channels ? 1 : 0];
  float* const to = of.to;
  const bool overwrites = to == last.values;
  const Size fewest = most(2, (TASKS_PER_THREAD * threads() + blocks_y - 1) / blocks_y);
  const Size slab = coarse || overwrites ? least(of.z, fewest * PLANES) : of.z;
  const Array<float> finer(coarse ? least(of.z, slab + 2 * HALO) * plane * coarse->outputs : 0);
  const Array<float> aside(overwrites ? slab * plane * of.outputs : 0);
  const Array<float> before(overwrites && ALONG_Z ? plane * of.outputs : 0);
  for (of.first = 0; of.first < of.z; of.first = of.end) {
    of.end = least(of.z, of.first + slab);
    if (coarse) {
      const Size from = most(0, of.first - HALO);
      spread(*coarse, from, least(of.z, of.end + HALO), finer.data());
      of.inputs[0] = {finer.data(), coarse->outputs, from};
    }
    of.to = overwrites ? aside.data() : to + of.first * plane * of.outputs;
    if constexpr (ALONG_Z) {
      in_parallel((of.end - of.first + PLANES - 1) / PLANES * blocks_y * parts_x, [&](Size index) {
        const Size row = index / parts_x % blocks_y * tiles, part = index % parts_x;
        block(of, of.first + index / (blocks_y * parts_x) * PLANES, row * OUT, least(tiles, tiles_y - row), part * part_x,
              least(part_x, of.x - part * part_x));
      });
    } else {
      const Size in_plane = tiles_y * ((of.x + OUT - 1) / OUT), all = (of.end - of.first) * in_plane;
      const Size in_group = of.weights.in_int16 ? in_plane : all;  // which may share a block
      const Size each = whole_rows(in_group, shared_among_threads((in_group + TILES_AT_ONCE - 1) / TILES_AT_ONCE, of.weights));
      const Size blocks = (in_group + each - 1) / each;
      in_parallel(all / in_group * blocks, [&](Size index) {
        const Size within_group = index % blocks * each;
        flat_block(of, index / blocks * in_group + within_group, least(each, in_group - within_group));
      });
    }
    if (overwrites) {
      if constexpr (ALONG_Z) {
        copy(last.values + (of.end - 1) * plane * of.outputs, plane * of.outputs, before.data());
        last.before = before.data();
      }
      copy(aside.data(), (of.end - of.first) * plane * of.outputs, to + of.first * plane * of.outputs);
    }
  }
}

void convolve(Size taps, Size z, Size y, Size x, const float* one, Size channels_one, const float* other,
              Size channels_other, Size outputs, const Weights& weights, const float* bias, float* to,
              const float* coarse, Size channels_coarse, const Size* stride, const Weights& spread_weights,
              const float* spread_bias) {
  const Convolution of{{{one, channels_one}, {other, channels_other}}, z, y, x, outputs, weights, bias, to, 0, z};
  Spread finer{nullptr, {}, {}, 0, 0, nullptr, nullptr};
  if (coarse)
    finer = {coarse, {z / stride[0], y / stride[1], x / stride[2]}, {stride[0], stride[1], stride[2]}, channels_coarse,
             channels_one, spread_weights, spread_bias};
  taps == 3 ? convolve<true>(of, coarse ? &finer : nullptr) : convolve<false>(of, coarse ? &finer : nullptr);
}

}  // namespace
}  // namespace nnturbo
