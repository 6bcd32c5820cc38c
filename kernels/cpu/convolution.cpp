// What a U-Net's time goes into, in float32 on CPUs: convolutions, transposed convolutions, instance norms.
//
// Convolutions of 3 x 3 x 3 taps with stride 1 go by Winograd's minimal filtering along z and y, those of 1 x 3 x 3 along y
// and x: 4 outputs need 6 products instead of 12 along each of the two (Lavin and Gray, arXiv:1509.09308), so that 36
// products of matrices take the place of 144. All others are sums over taps of products of matrices.
//
// Layout: channels last, (z, y, x, channel). A task is a block of output planes and rows; its transformed tiles and its
// products stay in the cache.

// Compiled once for each set of instructions, with VARIANT as the name of the table of its functions. It keeps to
// functions of its own, local to it: see kernels.h.

#include "products.h"

namespace nnturbo {
namespace {

constexpr int OUT = 4, IN = 6;  // F(4, 3)
constexpr int ROWS_AT_ONCE = 192;
constexpr Size TILES_AT_ONCE = 24;
constexpr Size SHORT = 2;  // so many times ROWS
constexpr Size PART_X = 48;  // about; of more, what a block transforms of few channels does not stay in the cache
constexpr Size TASKS_PER_THREAD = 16;  // at least, between two waits for all of them

void copy_floats(const float* from, Size count, float* to) { std::memcpy(to, from, count * sizeof(float)); }
void clear_floats(float* to, Size count) { std::memset(to, 0, count * sizeof(float)); }

// Memory that goes with the block.
template <class Value>
class Array {
 public:
  explicit Array(Size count) : memory_(static_cast<Value*>(allocate(count * sizeof(Value)))) {}
  ~Array() { release(memory_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  Value* data() const { return memory_; }
  Value& operator[](Size index) const { return memory_[index]; }

 private:
  Value* memory_;
};

// Six values of an input row become the six that are multiplied.
inline void transform_input(const Vector d[IN], Vector v[IN]) {
  v[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
  const Vector a = d[4] - 4.0f * d[2], b = d[3] - 4.0f * d[1];
  v[1] = a + b;
  v[2] = a - b;
  const Vector c = d[4] - d[2], e = 2.0f * (d[3] - d[1]);
  v[3] = c + e;
  v[4] = c - e;
  v[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
}

// Six products become four outputs.
inline void transform_output(const Vector m[IN], Vector y[OUT]) {
  const Vector a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
  y[0] = m[0] + a + c;
  y[1] = b + 2.0f * e;
  y[2] = a + 4.0f * c;
  y[3] = b + 8.0f * e + m[5];
}

// Size of each of so many parts, so that only the last has less than whole blocks of rows.
constexpr Size whole_rows(Size count, Size parts) {
  const Size each = (count + parts - 1) / parts;
  return parts == 1 ? count : (each + ROWS - 1) / ROWS * ROWS;
}

// So many parts, or a few more, so that all threads have as many. In int16 a part shares what its numbers are divided by,
// which must not depend on threads, nor on how many planes are computed at once.
Size shared_among_threads(Size parts, const Weights& weights) {
  return weights.in_int16 ? parts : (parts + threads() - 1) / threads() * threads();
}

const float NOTHING[COLUMNS] = {};

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

// One block: OUT planes of `tiles` times OUT rows, of which `width` voxels from x0 on. Taps along x are summed directly.
void block(const Convolution& of, Size z0, Size y0, Size tiles, Size x0, Size width) {
  const Size depth = of.depth(), tile_in = (width + 2) * depth, tile_out = width * of.outputs;
  float* transformed = scratch(IN * IN * tiles * (tile_in + tile_out) + tiles * tile_in);
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
      for (Size x = x0 - 1; x <= x0 + width; ++x) {
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
  for (int position = 0; position < IN * IN; ++position) {
    const Rows all = rows_for(of.weights, transformed + position * tiles * tile_in, tiles * tile_in, room);
    for (Size panel = 0; panel < panels(of.outputs); ++panel)
      for (Size tile = 0; tile < tiles; ++tile) {
        // Three taps along x: rows of 3 * depth values that overlap.
        const Rows rows = all.from(tile * tile_in);
        const Size column = panel * COLUMNS;
        multiply_rows({&rows, 1, depth, panel_of(of.weights, position * panels(of.outputs) + panel, 3 * depth),
                       3 * depth, NOTHING, products + (position * tiles + tile) * tile_out + column, of.outputs,
                       of.outputs - column},
                      0, width);
      }
  }
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

// A transposed convolution whose kernel equals its stride; weights are (stride, panels, inputs, COLUMNS).
struct Spread {
  const float* from;
  Size size[3], stride[3], inputs, outputs;  // size of what it comes from
  Weights weights;
  const float* bias;
};

// Planes from `first` to `end` of what it becomes, each voxel of the input as `stride` voxels.
void spread(const Spread& of, Size first, Size end, float* to) {
  const Size width = of.size[2] * of.stride[2];
  in_parallel((end - first) * of.size[1], [&](Size index) {
    const Size plane = index / of.size[1], y = index % of.size[1], z = first + plane;
    const Size count = of.size[2] * of.inputs;
    const Rows row = rows_for(of.weights, of.from + (z / of.stride[0] * of.size[1] + y) * count, count, scratch(count));
    for (Size j = 0; j < of.stride[1]; ++j)
      for (Size i = 0; i < of.stride[2]; ++i) {
        const Size position = (z % of.stride[0] * of.stride[1] + j) * of.stride[2] + i;
        float* start = to + (((plane * of.size[1] + y) * of.stride[1] + j) * width + i) * of.outputs;
        for (Size panel = 0; panel < panels(of.outputs); ++panel)
          multiply_rows({&row, 1, of.inputs, panel_of(of.weights, position * panels(of.outputs) + panel, of.inputs),
                         of.inputs, of.bias + panel * COLUMNS, start + panel * COLUMNS, of.stride[2] * of.outputs,
                         of.outputs - panel * COLUMNS},
                        0, of.size[2]);
      }
  });
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
  const Size tiles_y = (of.y + OUT - 1) / OUT, tiles = within(ROWS_AT_ONCE / of.x, 1, tiles_y);
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

// A convolution with any odd number of taps and any strides, zeros around it.
struct Direct {
  const float* from;
  Size size[3], channels, taps[3], stride[3], outputs;
  Weights weights;
  const float* bias;
  float* to;
  const float* zeros;  // as many as a line has values
  const Rows* lines;   // of the input, as they are multiplied, and after them zeros; none where all lines are short
  Size out(int axis) const { return (size[axis] + 2 * (taps[axis] / 2) - taps[axis]) / stride[axis] + 1; }
  Size line() const { return size[2] * channels; }
  bool is_short() const { return out(2) < SHORT * ROWS; }
};

// Some lines along x of outputs, plane by plane. Rows of a product are voxels of the input as they lie; where taps reach
// beyond its ends, they are copied, and so are those of short lines, which make whole blocks of rows together.
void direct_lines(const Direct& of, Size first_line, Size end_line) {
  const Size parts = of.taps[0] * of.taps[1], depth = of.taps[2] * of.channels, width = of.out(2);
  const Size padding = of.taps[2] / 2, stride = of.stride[2], lines = end_line - first_line;
  const Size first = of.is_short() ? width : least(width, (padding + stride - 1) / stride);
  const Size end = most(first, least(width, (of.size[2] + padding - of.taps[2]) / stride + 1));
  const Size outside = width - (end - first), copies = lines * outside;
  float* const copied = scratch(copies * (2 * parts * depth + COLUMNS));
  float* const products = copied + copies * parts * depth;
  const Array<Rows> rows(lines * parts), of_copies(parts);
  for (Size line = 0; line < lines; ++line)
    for (Size part = 0; part < parts; ++part) {
      const Size z = (first_line + line) / of.out(1), y = (first_line + line) % of.out(1);
      const Size from_z = z * of.stride[0] + part / of.taps[1] - of.taps[0] / 2;
      const Size from_y = y * of.stride[1] + part % of.taps[1] - of.taps[1] / 2;
      const bool inside = from_z >= 0 && from_z < of.size[0] && from_y >= 0 && from_y < of.size[1];
      const Size at_line = inside ? from_z * of.size[1] + from_y : of.size[0] * of.size[1];
      const float* const row = inside ? of.from + at_line * of.line() : of.zeros;
      if (!of.is_short()) rows[line * parts + part] = of.lines[at_line].from(-padding * of.channels);
      for (Size index = 0; index < outside; ++index) {
        const Size x = index < first ? index : end + index - first;
        float* const to = copied + ((line * outside + index) * parts + part) * depth;
        for (Size tap = 0; tap < of.taps[2]; ++tap) {
          const Size at = x * stride + tap - padding;
          if (at >= 0 && at < of.size[2])
            copy_floats(row + at * of.channels, of.channels, to + tap * of.channels);
          else
            clear_floats(to + tap * of.channels, of.channels);
        }
      }
    }
  const Rows all = rows_for(of.weights, copied, copies * parts * depth, products + copies * COLUMNS);
  for (Size part = 0; part < parts; ++part) of_copies[part] = all.from(part * depth);
  for (Size column = 0; column < of.outputs; column += COLUMNS) {
    const Weights weights = panel_of(of.weights, column / COLUMNS, parts * depth);
    const float* const bias = of.bias + column;
    float* const to = of.to + first_line * width * of.outputs + column;
    const Size columns = of.outputs - column;
    for (Size line = 0; line < lines; ++line)
      multiply_rows({rows.data() + line * parts, parts, stride * of.channels, weights, depth, bias,
                     to + line * width * of.outputs, of.outputs, columns},
                    first, end);
    multiply_rows({of_copies.data(), parts, parts * depth, weights, depth, bias, products, COLUMNS, columns}, 0, copies);
    for (Size copy = 0; copy < copies; ++copy) {
      const Size index = copy % outside, x = index < first ? index : end + index - first;
      copy_floats(products + copy * COLUMNS, least(columns, COLUMNS), to + (copy / outside * width + x) * of.outputs);
    }
  }
}

constexpr Size VOXELS_AT_ONCE = 1024;

Size weights_size(Size taps, Size inputs, Size outputs) { return IN * IN * taps * inputs * whole_panels(outputs); }

void transform_weights(Size taps, Size inputs, Size outputs, const float* from, float* to) {
  static const double G[IN][3] = {{1.0 / 4, 0, 0},           {-1.0 / 6, -1.0 / 6, -1.0 / 6}, {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                                  {1.0 / 24, 1.0 / 12, 1.0 / 6}, {1.0 / 24, -1.0 / 12, 1.0 / 6}, {0, 0, 1}};
  double factors[IN * IN][9];
  for (int position = 0; position < IN * IN; ++position)
    for (int at = 0; at < 9; ++at) factors[position][at] = G[position / IN][at / 3] * G[position % IN][at % 3];
  const Size panels = whole_panels(outputs) / COLUMNS;
  in_parallel(panels, [&](Size panel) {
    // With three taps along z, those along x are left; with one, none are.
    double kernels[3][9][COLUMNS] = {};
    for (Size input = 0; input < inputs; ++input) {
      for (Size lane = 0; lane < least(COLUMNS, outputs - panel * COLUMNS); ++lane) {
        const float* kernel = from + ((panel * COLUMNS + lane) * inputs + input) * taps * 9;
        for (int at = 0; at < taps * 9; ++at) kernels[at % taps][at / taps][lane] = kernel[at];
      }
      for (Size position = 0; position < IN * IN; ++position)
        for (Size tap = 0; tap < taps; ++tap) {
          float* const place = to + (((position * panels + panel) * taps + tap) * inputs + input) * COLUMNS;
          for (int lane = 0; lane < COLUMNS; ++lane) {
            double sum = 0;
            for (int at = 0; at < 9; ++at) sum += factors[position][at] * kernels[tap][at][lane];
            place[lane] = static_cast<float>(sum);
          }
        }
    }
  });
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

void convolve_directly(const Size* size, const Size* taps, const Size* stride, Size inputs, Size outputs,
                       const float* from, const Weights& weights, const float* bias, float* to) {
  Direct of{from, {size[0], size[1], size[2]}, inputs, {taps[0], taps[1], taps[2]},
            {stride[0], stride[1], stride[2]}, outputs, weights, bias, to, nullptr, nullptr};
  const Size lines = of.is_short() ? 0 : size[0] * size[1], line = of.line();
  const Array<float> zeros(line);
  const Array<std::int16_t> room(weights.in_int16 ? (lines + 1) * line : 0);
  const Array<Rows> as_multiplied(lines + 1);
  clear_floats(zeros.data(), line);
  in_parallel(lines + 1, [&](Size index) {
    as_multiplied[index] =
        rows_for(weights, index < lines ? from + index * line : zeros.data(), line, room.data() + index * line);
  });
  of.zeros = zeros.data();
  of.lines = as_multiplied.data();
  const Size all = of.out(0) * of.out(1), at_once = most(1, ROWS_AT_ONCE / of.out(2));
  const Size blocks = least(all, shared_among_threads((all + at_once - 1) / at_once, weights));
  in_parallel(blocks, [&](Size index) { direct_lines(of, index * all / blocks, (index + 1) * all / blocks); });
}

void spread(const Size* size, const Size* stride, Size inputs, Size outputs, const float* from, const Weights& weights,
            const float* bias, float* to) {
  const Spread of{from, {size[0], size[1], size[2]}, {stride[0], stride[1], stride[2]}, inputs, outputs, weights, bias};
  spread(of, 0, size[0] * stride[0], to);
}

void project(Size voxels, Size inputs, Size outputs, const float* from, const Weights& weights, const float* bias,
             float* to) {
  in_parallel((voxels + VOXELS_AT_ONCE - 1) / VOXELS_AT_ONCE, [&](Size task) {
    const Size start = task * VOXELS_AT_ONCE, count = least(voxels - start, VOXELS_AT_ONCE);
    float* const rows = scratch(count * COLUMNS);
    const Rows values{from + start * inputs};
    for (Size column = 0; column < outputs; column += COLUMNS) {
      multiply_rows({&values, 1, inputs, panel_of(weights, column / COLUMNS, inputs), inputs, bias + column, rows,
                     COLUMNS, outputs - column},
                    0, count);
      for (Size lane = 0; lane < least(COLUMNS, outputs - column); ++lane)
        for (Size voxel = 0; voxel < count; ++voxel)
          to[(column + lane) * voxels + start + voxel] = rows[voxel * COLUMNS + lane];
    }
  });
}

void normalise(Size voxels, Size channels, const float* scale, const float* shift, float epsilon, const float* residual,
               float slope, float* values) {
  const Size tasks = (voxels + VOXELS_AT_ONCE - 1) / VOXELS_AT_ONCE;
  const Array<float> partial_sums(tasks * 2 * channels), around(channels), by(channels), plus(channels);
  // Around the first voxel's value, so that large means do not drown small variances.
  copy_floats(values, channels, around.data());
  in_parallel(tasks, [&](Size task) {
    float* partial = partial_sums.data() + task * 2 * channels;
    const Size end = least(voxels, (task + 1) * VOXELS_AT_ONCE);
    for (Size channel = 0; channel < channels; channel += LANES) {
      const Vector middle = load(around.data() + channel);
      Vector sum{}, squares{};
      for (Size voxel = task * VOXELS_AT_ONCE; voxel < end; ++voxel) {
        const Vector value = load(values + voxel * channels + channel) - middle;
        sum += value;
        squares += value * value;
      }
      store(partial + channel, sum);
      store(partial + channels + channel, squares);
    }
  });
  for (Size channel = 0; channel < channels; ++channel) {
    double sum = 0, squares = 0;
    for (Size task = 0; task < tasks; ++task) {
      sum += partial_sums[task * 2 * channels + channel];
      squares += partial_sums[(task * 2 + 1) * channels + channel];
    }
    const double mean = sum / voxels, variance = squares / voxels - mean * mean;
    const double factor = scale[channel] / std::sqrt((variance > 0 ? variance : 0) + epsilon);
    by[channel] = static_cast<float>(factor);
    plus[channel] = static_cast<float>(shift[channel] - (mean + around[channel]) * factor);
  }
  in_parallel(tasks, [&](Size task) {
    const Size end = least(voxels, (task + 1) * VOXELS_AT_ONCE);
    for (Size voxel = task * VOXELS_AT_ONCE; voxel < end; ++voxel)
      for (Size channel = 0; channel < channels; channel += LANES) {
        const Size at = voxel * channels + channel;
        Vector value = load(values + at) * load(by.data() + channel) + load(plus.data() + channel);
        if (residual) value += load(residual + at);
        store(values + at, value > 0.0f ? value : value * slope);
      }
  });
}

}  // namespace

extern const Kernels VARIANT;
const Kernels VARIANT{LANES, COLUMNS, weights_size, transform_weights, NARROW_PANELS, convolve, convolve_directly, spread,
                      project, normalise};

}  // namespace nnturbo
