// What a U-Net's time goes into, in float32 on CPUs: convolutions, transposed convolutions, instance norms.
//
// Convolutions of 3 x 3 x 3 taps with stride 1 go by Winograd's minimal filtering along z and y, those of 1 x 3 x 3 along y
// and x: 4 outputs need 6 products instead of 12 along each of the two (Lavin and Gray, arXiv:1509.09308), so that 36
// products of matrices take the place of 144. All others are sums over taps of products of matrices.
//
// Layout: channels last, (z, y, x, channel). A task is a block of output planes and rows; its transformed tiles and its
// products stay in the cache.

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#else
constexpr int LANES = 8, ROWS = 6;
#endif
typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

constexpr int COLUMNS = 2 * LANES;
constexpr int OUT = 4, IN = 6;  // F(4, 3)
constexpr int ROWS_AT_ONCE = 192;
constexpr std::int64_t TASKS_PER_THREAD = 16;  // at least, between two waits for all of them

Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
Vector all(float value) { return value - Vector{}; }

// Threads that wait for work; each takes the next task until there is none.
class Crew {
 public:
  void resize(int count) {
    std::lock_guard<std::mutex> one_at_a_time(running_);
    if (static_cast<int>(threads_.size()) == count - 1) return;
    stop();
    stopped_ = false;
    try {
      for (int index = 1; index < count; ++index) threads_.emplace_back([this, seen = turn_] { wait(seen); });
    } catch (const std::system_error&) {
      // The system gives no more threads: those that are there do the work.
    }
  }

  void run(std::int64_t tasks, const std::function<void(std::int64_t)>& task) {
    std::lock_guard<std::mutex> one_at_a_time(running_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      tasks_ = tasks;
      next_ = 0;
      busy_ = static_cast<int>(threads_.size());
      ++turn_;
    }
    woken_.notify_all();
    take(task, tasks);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

  std::int64_t size() const { return static_cast<std::int64_t>(threads_.size()) + 1; }

  ~Crew() { stop(); }

 private:
  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopped_ = true;
    }
    woken_.notify_all();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
  }

  void take(const std::function<void(std::int64_t)>& task, std::int64_t tasks) {
    try {
      for (std::int64_t index; (index = next_.fetch_add(1)) < tasks;) task(index);
    } catch (...) {
      next_ = tasks;  // nobody goes on
      std::lock_guard<std::mutex> lock(mutex_);
      failure_ = std::current_exception();
    }
  }

  void wait(std::uint64_t seen) {
    for (;;) {
      const std::function<void(std::int64_t)>* task;
      std::int64_t tasks;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        woken_.wait(lock, [&] { return stopped_ || turn_ != seen; });
        if (stopped_) return;
        seen = turn_;
        task = task_;
        tasks = tasks_;
      }
      take(*task, tasks);
      {
        std::lock_guard<std::mutex> lock(mutex_);
        --busy_;
      }
      done_.notify_one();
    }
  }

  std::mutex running_, mutex_;
  std::condition_variable woken_, done_;
  std::vector<std::thread> threads_;
  const std::function<void(std::int64_t)>* task_ = nullptr;
  std::int64_t tasks_ = 0;
  std::atomic<std::int64_t> next_{0};
  int busy_ = 0;
  std::uint64_t turn_ = 0;
  std::exception_ptr failure_;
  bool stopped_ = false;
};

// Never ended: threads may outlive static objects. A process that was forked has none of the threads, and starts new ones.
Crew*& made() {
  static Crew* of_process = new Crew;
  return of_process;
}

Crew& crew() {
  static const int once = pthread_atfork(nullptr, nullptr, [] { made() = new Crew; });
  (void)once;
  return *made();
}

// Memory of one thread, kept for the next call.
float* scratch(std::size_t floats) {
  thread_local struct Block {
    float* memory = nullptr;
    std::size_t size = 0;
    ~Block() { std::free(memory); }
  } block;
  if (block.size < floats) {
    std::free(block.memory);
    block.size = 0;
    block.memory = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
    if (!block.memory) throw std::bad_alloc();
    block.size = floats;
  }
  return block.memory;
}

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

// A product of matrices: c = sum over parts of a[part] b[part], with b (depth, COLUMNS) one part after the other.
struct Product {
  const float* const* a;
  std::int64_t parts, step;  // from one row of a to the next
  const float* b;
  std::int64_t depth;
  const float* start;  // (COLUMNS), what every sum starts with
  float* c;
  std::int64_t width;    // from one row of c to the next
  std::int64_t columns;  // from here to the end of a row of c; LANES, or more
};

template <int R, bool WHOLE>
inline void multiply(const Product& of, std::int64_t first) {
  Vector sums[R][2];
  const Vector start[2] = {load(of.start), WHOLE ? load(of.start + LANES) : Vector{}};
#pragma GCC unroll 12
  for (int row = 0; row < R; ++row) sums[row][0] = start[0], sums[row][1] = start[1];
  const float* b = of.b;
  for (std::int64_t part = 0; part < of.parts; ++part) {
    const float* a = of.a[part] + first * of.step;
    for (std::int64_t k = 0; k < of.depth; ++k, b += COLUMNS) {
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

template <int R, bool WHOLE>
inline void multiply_rest(const Product& of, std::int64_t first, std::int64_t rows) {
  if constexpr (R > 0) {
    if (rows == R)
      multiply<R, WHOLE>(of, first);
    else
      multiply_rest<R - 1, WHOLE>(of, first, rows);
  }
}

template <bool WHOLE>
void multiply_block(const Product& of, std::int64_t first, std::int64_t end) {
  std::int64_t row = first;
  for (; row + ROWS <= end; row += ROWS) multiply<ROWS, WHOLE>(of, row);
  multiply_rest<ROWS - 1, WHOLE>(of, row, end - row);
}

void multiply_rows(const Product& of, std::int64_t first, std::int64_t end) {
  of.columns >= COLUMNS ? multiply_block<true>(of, first, end) : multiply_block<false>(of, first, end);
}

// Outputs as the weights have them, in whole panels.
constexpr std::int64_t whole_panels(std::int64_t outputs) { return (outputs + COLUMNS - 1) / COLUMNS * COLUMNS; }

const float NOTHING[COLUMNS] = {};

struct Input {
  const float* values;
  std::int64_t channels, first = 0;  // the plane that values begin with
  const float* before = nullptr;     // the plane before those that are computed, where it is no longer in values
  const float* plane(std::int64_t z, std::int64_t voxels) const { return values + (z - first) * voxels * channels; }
};

struct Convolution {
  Input inputs[2];
  std::int64_t z, y, x, outputs;
  const float *weights, *bias;
  float* to;                   // of plane `first`
  std::int64_t first, end;     // planes to compute
  std::int64_t depth() const { return inputs[0].channels + inputs[1].channels; }
};

// One block: OUT planes of `tiles` times OUT rows. Taps along x are summed directly.
void block(const Convolution& of, std::int64_t z0, std::int64_t y0, std::int64_t tiles) {
  const std::int64_t depth = of.depth(), padded = of.x + 2;
  const std::int64_t tile_in = padded * depth, tile_out = of.x * of.outputs;
  float* transformed = scratch(IN * IN * tiles * (tile_in + tile_out));
  float* products = transformed + IN * IN * tiles * tile_in;
  std::int64_t offset = 0;
  for (const Input& input : of.inputs) {
    const float* planes[IN];  // none outside of the scan
    for (int i = 0; i < IN; ++i) {
      const std::int64_t z = z0 + i - 1;
      const bool gone = input.before && z == of.first - 1;
      planes[i] = z < 0 || z >= of.z ? nullptr : gone ? input.before : input.plane(z, of.y * of.x);
    }
    for (std::int64_t tile = 0; tile < tiles; ++tile)
      for (std::int64_t x = -1; x <= of.x; ++x) {
        float* to = transformed + tile * tile_in + (x + 1) * depth + offset;
        for (std::int64_t channel = 0; channel < input.channels; channel += LANES) {
          Vector along_z[IN][IN], d[IN], v[IN];
          for (int j = 0; j < IN; ++j) {
            const std::int64_t y = y0 + tile * OUT + j - 1;
            const bool inside = x >= 0 && x < of.x && y >= 0 && y < of.y;
            const std::int64_t at = (y * of.x + x) * input.channels + channel;
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
    const float* matrix = of.weights + position * 3 * depth * whole_panels(of.outputs);
    for (std::int64_t column = 0; column < of.outputs; column += COLUMNS)
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        // Three taps along x: rows of 3 * depth values that overlap.
        const float* rows = transformed + (position * tiles + tile) * tile_in;
        multiply_rows({&rows, 1, depth, matrix + column * 3 * depth, 3 * depth, NOTHING,
                       products + (position * tiles + tile) * tile_out + column, of.outputs, of.outputs - column},
                      0, of.x);
      }
  }
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t rows = std::min<std::int64_t>(OUT, of.y - (y0 + tile * OUT));
    const std::int64_t planes = std::min<std::int64_t>(OUT, of.end - z0);
    for (std::int64_t x = 0; x < of.x; ++x)
      for (std::int64_t channel = 0; channel < of.outputs; channel += LANES) {
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
            store(of.to + (((z0 - of.first + plane) * of.y + y0 + tile * OUT + row) * of.x + x) * of.outputs + channel,
                  y[plane] + bias);
        }
      }
  }
}

// The same where there are no taps along z: `tiles` times OUT rows of a plane, which are transformed along y and x.
void flat_block(const Convolution& of, std::int64_t z, std::int64_t y0, std::int64_t tiles) {
  const std::int64_t depth = of.depth(), tiles_x = (of.x + OUT - 1) / OUT, count = tiles * tiles_x;
  float* transformed = scratch(IN * IN * count * (depth + of.outputs));
  float* products = transformed + IN * IN * count * depth;
  std::int64_t offset = 0;
  for (const Input& input : of.inputs) {
    const float* plane = input.channels ? input.plane(z, of.y * of.x) : nullptr;
    for (std::int64_t tile = 0; tile < count; ++tile) {
      const std::int64_t first_y = y0 + tile / tiles_x * OUT - 1, first_x = tile % tiles_x * OUT - 1;
      for (std::int64_t channel = 0; channel < input.channels; channel += LANES) {
        Vector along_y[IN][IN], d[IN], v[IN];
        for (int i = 0; i < IN; ++i) {
          const std::int64_t x = first_x + i;
          for (int j = 0; j < IN; ++j) {
            const std::int64_t y = first_y + j;
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
    const float* rows = transformed + position * count * depth;
    for (std::int64_t column = 0; column < of.outputs; column += COLUMNS)
      multiply_rows({&rows, 1, depth, of.weights + (position * whole_panels(of.outputs) + column) * depth, depth, NOTHING,
                     products + position * count * of.outputs + column, of.outputs, of.outputs - column},
                    0, count);
  }
  for (std::int64_t tile = 0; tile < count; ++tile) {
    const std::int64_t first_y = y0 + tile / tiles_x * OUT, first_x = tile % tiles_x * OUT;
    for (std::int64_t channel = 0; channel < of.outputs; channel += LANES) {
      const float* from = products + tile * of.outputs + channel;
      Vector along_x[IN][OUT], m[IN], y[OUT];
      for (int j = 0; j < IN; ++j) {
        for (int i = 0; i < IN; ++i) m[i] = load(from + (j * IN + i) * count * of.outputs);
        transform_output(m, along_x[j]);
      }
      const Vector bias = load(of.bias + channel);
      for (int column = 0; column < std::min<std::int64_t>(OUT, of.x - first_x); ++column) {
        for (int j = 0; j < IN; ++j) m[j] = along_x[j][column];
        transform_output(m, y);
        for (int row = 0; row < std::min<std::int64_t>(OUT, of.y - first_y); ++row)
          store(of.to + (((z - of.first) * of.y + first_y + row) * of.x + first_x + column) * of.outputs + channel,
                y[row] + bias);
      }
    }
  }
}

// A transposed convolution whose kernel equals its stride; weights are (stride, panels, inputs, COLUMNS).
struct Spread {
  const float* from;
  std::int64_t size[3], stride[3], inputs, outputs;  // size of what it comes from
  const float *weights, *bias;
};

// Planes from `first` to `end` of what it becomes, each voxel of the input as `stride` voxels.
void spread(const Spread& of, std::int64_t first, std::int64_t end, float* to) {
  const std::int64_t width = of.size[2] * of.stride[2];
  crew().run((end - first) * of.size[1], [&](std::int64_t index) {
    const std::int64_t plane = index / of.size[1], y = index % of.size[1], z = first + plane;
    const float* row = of.from + (z / of.stride[0] * of.size[1] + y) * of.size[2] * of.inputs;
    for (std::int64_t j = 0; j < of.stride[1]; ++j)
      for (std::int64_t i = 0; i < of.stride[2]; ++i) {
        const std::int64_t position = (z % of.stride[0] * of.stride[1] + j) * of.stride[2] + i;
        float* start = to + (((plane * of.size[1] + y) * of.stride[1] + j) * width + i) * of.outputs;
        for (std::int64_t column = 0; column < of.outputs; column += COLUMNS)
          multiply_rows({&row, 1, of.inputs, of.weights + (position * whole_panels(of.outputs) + column) * of.inputs,
                         of.inputs, of.bias + column, start + column, of.stride[2] * of.outputs, of.outputs - column},
                        0, of.size[2]);
      }
  });
}

void copy(const float* from, std::int64_t count, float* to) {
  constexpr std::int64_t AT_ONCE = 1 << 16;
  crew().run((count + AT_ONCE - 1) / AT_ONCE, [&](std::int64_t index) {
    std::copy(from + index * AT_ONCE, from + std::min(count, (index + 1) * AT_ONCE), to + index * AT_ONCE);
  });
}

using Floats = std::unique_ptr<float[]>;

// Some planes after the others. The first input may be spread from coarser voxels, which then never is there as a whole,
// and `to` may be the last input, which is overwritten as soon as it is not needed any more.
template <bool ALONG_Z>
void convolve(Convolution of, const Spread* coarse) {
  constexpr std::int64_t PLANES = ALONG_Z ? OUT : 1, HALO = ALONG_Z ? 1 : 0;
  const std::int64_t tiles_y = (of.y + OUT - 1) / OUT, tiles = std::clamp<std::int64_t>(ROWS_AT_ONCE / of.x, 1, tiles_y);
  const std::int64_t blocks_y = (tiles_y + tiles - 1) / tiles, plane = of.y * of.x;
  Input& last = of.inputs[of.inputs[1].channels ? 1 : 0];
  float* const to = of.to;
  const bool overwrites = to == last.values;
  const std::int64_t least = std::max<std::int64_t>(2, (TASKS_PER_THREAD * crew().size() + blocks_y - 1) / blocks_y);
  const std::int64_t slab = coarse || overwrites ? std::min(of.z, least * PLANES) : of.z;
  const Floats finer(coarse ? new float[std::min(of.z, slab + 2 * HALO) * plane * coarse->outputs] : nullptr);
  const Floats aside(overwrites ? new float[slab * plane * of.outputs] : nullptr);
  const Floats before(overwrites ? new float[plane * of.outputs] : nullptr);
  for (of.first = 0; of.first < of.z; of.first = of.end) {
    of.end = std::min(of.z, of.first + slab);
    if (coarse) {
      const std::int64_t from = std::max<std::int64_t>(0, of.first - HALO);
      spread(*coarse, from, std::min(of.z, of.end + HALO), finer.get());
      of.inputs[0] = {finer.get(), coarse->outputs, from};
    }
    of.to = overwrites ? aside.get() : to + of.first * plane * of.outputs;
    crew().run((of.end - of.first + PLANES - 1) / PLANES * blocks_y, [&](std::int64_t index) {
      const std::int64_t row = index % blocks_y * tiles;
      const auto of_kind = ALONG_Z ? block : flat_block;
      of_kind(of, of.first + index / blocks_y * PLANES, row * OUT, std::min(tiles, tiles_y - row));
    });
    if (overwrites) {
      copy(last.values + (of.end - 1) * plane * of.outputs, plane * of.outputs, before.get());
      copy(aside.get(), (of.end - of.first) * plane * of.outputs, to + of.first * plane * of.outputs);
      last.before = before.get();
    }
  }
}

// A convolution with any odd number of taps and any strides, zeros around it.
struct Direct {
  const float* from;
  std::int64_t size[3], channels, taps[3], stride[3], outputs;
  const float *weights, *bias;
  float* to;
  const float* zeros;  // as many as a row has values
  std::int64_t out(int axis) const { return (size[axis] + 2 * (taps[axis] / 2) - taps[axis]) / stride[axis] + 1; }
};

// Some rows of a plane of outputs. Rows of a product are voxels of the input as they lie; where taps reach beyond its
// ends, they are copied.
void direct_rows(const Direct& of, std::int64_t z, std::int64_t first_y, std::int64_t end_y) {
  const std::int64_t parts = of.taps[0] * of.taps[1], depth = of.taps[2] * of.channels, width = of.out(2);
  const std::int64_t padding = of.taps[2] / 2, stride = of.stride[2], lines = end_y - first_y;
  const std::int64_t first = std::min(width, (padding + stride - 1) / stride);
  const std::int64_t end = std::max(first, std::min(width, (of.size[2] + padding - of.taps[2]) / stride + 1));
  const std::int64_t outside = width - (end - first);
  float* const copied = scratch(lines * outside * parts * depth);
  std::vector<const float*> rows(lines * parts), copies(lines * outside * parts);
  for (std::int64_t line = 0; line < lines; ++line)
    for (std::int64_t part = 0; part < parts; ++part) {
      const std::int64_t from_z = z * of.stride[0] + part / of.taps[1] - of.taps[0] / 2;
      const std::int64_t from_y = (first_y + line) * of.stride[1] + part % of.taps[1] - of.taps[1] / 2;
      const bool inside = from_z >= 0 && from_z < of.size[0] && from_y >= 0 && from_y < of.size[1];
      const float* row = inside ? of.from + (from_z * of.size[1] + from_y) * of.size[2] * of.channels : of.zeros;
      rows[line * parts + part] = row - padding * of.channels;
      for (std::int64_t index = 0; index < outside; ++index) {
        const std::int64_t x = index < first ? index : end + index - first;
        float* const to = copied + ((line * outside + index) * parts + part) * depth;
        copies[(line * outside + index) * parts + part] = to;
        for (std::int64_t tap = 0; tap < of.taps[2]; ++tap) {
          const std::int64_t at = x * stride + tap - padding;
          if (at >= 0 && at < of.size[2])
            std::copy_n(row + at * of.channels, of.channels, to + tap * of.channels);
          else
            std::fill_n(to + tap * of.channels, of.channels, 0.0f);
        }
      }
    }
  for (std::int64_t column = 0; column < of.outputs; column += COLUMNS)
    for (std::int64_t line = 0; line < lines; ++line) {
      float* const to = of.to + (z * of.out(1) + first_y + line) * width * of.outputs + column;
      Product product{rows.data() + line * parts, parts, stride * of.channels, of.weights + column * parts * depth,
                      depth, of.bias + column, to, of.outputs, of.outputs - column};
      multiply_rows(product, first, end);
      for (std::int64_t index = 0; index < outside; ++index) {
        product.a = copies.data() + (line * outside + index) * parts;
        product.c = to + (index < first ? index : end + index - first) * of.outputs;
        multiply_rows(product, 0, 1);
      }
    }
}

constexpr std::int64_t VOXELS_AT_ONCE = 1024;

// 0, or 1 where there is too little memory: exceptions end here.
template <class Work>
int guarded(const Work& work) {
  try {
    work();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace

extern "C" {

int nnturbo_lanes() { return LANES; }

int nnturbo_columns() { return COLUMNS; }

// Memory that was freed, and that the C library keeps.
void nnturbo_give_back() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

void nnturbo_threads(int count) { crew().resize(count); }

// Floats of the transformed weights of a kernel of `taps` (1 or 3) x 3 x 3.
std::int64_t nnturbo_weights_size(std::int64_t taps, std::int64_t inputs, std::int64_t outputs) {
  return IN * IN * taps * inputs * whole_panels(outputs);
}

// From (outputs, inputs, taps, 3, 3) to panels of COLUMNS outputs for each position.
int nnturbo_transform_weights(std::int64_t taps, std::int64_t inputs, std::int64_t outputs, const float* from,
                              float* to) {
  return guarded([&] {
    static const double G[IN][3] = {{1.0 / 4, 0, 0},           {-1.0 / 6, -1.0 / 6, -1.0 / 6}, {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                                    {1.0 / 24, 1.0 / 12, 1.0 / 6}, {1.0 / 24, -1.0 / 12, 1.0 / 6}, {0, 0, 1}};
    const std::int64_t panels = whole_panels(outputs) / COLUMNS;
    crew().run(panels, [&](std::int64_t panel) {
      for (std::int64_t lane = 0; lane < COLUMNS; ++lane)
        for (std::int64_t input = 0; input < inputs; ++input) {
          const std::int64_t output = panel * COLUMNS + lane;
          const float* kernel = from + (output * inputs + input) * taps * 9;
          for (int i = 0; i < IN; ++i)
            for (int j = 0; j < IN; ++j)
              for (int tap = 0; tap < taps; ++tap) {
                // With three taps along z, those along x are left; with one, none are.
                double sum = 0;
                for (int one = 0; one < (output < outputs ? 3 : 0); ++one)
                  for (int other = 0; other < 3; ++other)
                    sum += G[i][one] * G[j][other] * kernel[taps == 3 ? (one * 3 + other) * 3 + tap : one * 3 + other];
                const std::int64_t position = i * IN + j;
                to[((position * panels + panel) * taps * inputs + tap * inputs + input) * COLUMNS + lane] =
                    static_cast<float>(sum);
              }
        }
    });
  });
}

// Convolve (z, y, x, inputs), taken from two tensors one after the other, with zeros around it. The first may be none and
// `coarse` in its place, to be spread by `stride` (see nnturbo_spread); `to` may be the last one.
int nnturbo_convolve(std::int64_t taps, std::int64_t z, std::int64_t y, std::int64_t x, const float* one,
                     std::int64_t channels_one, const float* other, std::int64_t channels_other,
                     std::int64_t outputs, const float* weights, const float* bias, float* to, const float* coarse,
                     std::int64_t channels_coarse, const std::int64_t* stride, const float* spread_weights,
                     const float* spread_bias) {
  return guarded([&] {
    const Convolution of{{{one, channels_one}, {other, channels_other}}, z, y, x, outputs, weights, bias, to, 0, z};
    Spread finer{};
    if (coarse)
      finer = {coarse, {z / stride[0], y / stride[1], x / stride[2]}, {stride[0], stride[1], stride[2]}, channels_coarse,
               channels_one, spread_weights, spread_bias};
    taps == 3 ? convolve<true>(of, coarse ? &finer : nullptr) : convolve<false>(of, coarse ? &finer : nullptr);
  });
}

// Weights are (panels, taps, inputs, COLUMNS).
int nnturbo_convolve_directly(const std::int64_t* size, const std::int64_t* taps, const std::int64_t* stride,
                              std::int64_t inputs, std::int64_t outputs, const float* from, const float* weights,
                              const float* bias, float* to) {
  return guarded([&] {
    const std::vector<float> zeros(size[2] * inputs, 0.0f);
    Direct of{from, {}, inputs, {}, {}, outputs, weights, bias, to, zeros.data()};
    std::copy(size, size + 3, of.size);
    std::copy(taps, taps + 3, of.taps);
    std::copy(stride, stride + 3, of.stride);
    const std::int64_t rows = of.out(1), lines = std::clamp<std::int64_t>(ROWS_AT_ONCE / of.out(2), 1, rows);
    const std::int64_t blocks = (rows + lines - 1) / lines;
    crew().run(of.out(0) * blocks, [&](std::int64_t index) {
      const std::int64_t first = index % blocks * lines;
      direct_rows(of, index / blocks, first, std::min(rows, first + lines));
    });
  });
}

// Each input voxel becomes `stride` output voxels; weights are (stride, panels, inputs, COLUMNS).
int nnturbo_spread(const std::int64_t* size, const std::int64_t* stride, std::int64_t inputs, std::int64_t outputs,
                   const float* from, const float* weights, const float* bias, float* to) {
  return guarded([&] {
    const Spread of{from, {size[0], size[1], size[2]}, {stride[0], stride[1], stride[2]}, inputs, outputs, weights, bias};
    spread(of, 0, size[0] * stride[0], to);
  });
}

// One output channel after the other, (outputs, z, y, x), of each voxel by itself; weights are (panels, inputs, COLUMNS),
// biases as many as panels have columns.
int nnturbo_project(std::int64_t voxels, std::int64_t inputs, std::int64_t outputs, const float* from,
                    const float* weights, const float* bias, float* to) {
  return guarded([&] {
    crew().run((voxels + VOXELS_AT_ONCE - 1) / VOXELS_AT_ONCE, [&](std::int64_t task) {
      const std::int64_t start = task * VOXELS_AT_ONCE, count = std::min(voxels - start, VOXELS_AT_ONCE);
      float* const rows = scratch(count * COLUMNS);
      const float* const values = from + start * inputs;
      for (std::int64_t column = 0; column < outputs; column += COLUMNS) {
        multiply_rows({&values, 1, inputs, weights + column * inputs, inputs, bias + column, rows, COLUMNS, COLUMNS}, 0, count);
        for (std::int64_t lane = 0; lane < std::min<std::int64_t>(COLUMNS, outputs - column); ++lane)
          for (std::int64_t voxel = 0; voxel < count; ++voxel)
            to[(column + lane) * voxels + start + voxel] = rows[voxel * COLUMNS + lane];
      }
    });
  });
}

// Normalise each channel over all voxels, add a residual where there is one, and damp negative values by `slope`.
int nnturbo_normalise(std::int64_t voxels, std::int64_t channels, const float* scale, const float* shift, float epsilon,
                      const float* residual, float slope, float* values) {
  return guarded([&] {
    const std::int64_t tasks = (voxels + VOXELS_AT_ONCE - 1) / VOXELS_AT_ONCE;
    std::vector<float> partial_sums(tasks * 2 * channels, 0.0f);
    // Around the first voxel's value, so that large means do not drown small variances.
    const std::vector<float> around(values, values + channels);
    crew().run(tasks, [&](std::int64_t task) {
      float* partial = partial_sums.data() + task * 2 * channels;
      const std::int64_t end = std::min(voxels, (task + 1) * VOXELS_AT_ONCE);
      for (std::int64_t channel = 0; channel < channels; channel += LANES) {
        const Vector middle = load(around.data() + channel);
        Vector sum{}, squares{};
        for (std::int64_t voxel = task * VOXELS_AT_ONCE; voxel < end; ++voxel) {
          const Vector value = load(values + voxel * channels + channel) - middle;
          sum += value;
          squares += value * value;
        }
        store(partial + channel, sum);
        store(partial + channels + channel, squares);
      }
    });
    std::vector<double> sums(2 * channels, 0.0);
    for (std::int64_t task = 0; task < tasks; ++task)
      for (std::int64_t index = 0; index < 2 * channels; ++index) sums[index] += partial_sums[task * 2 * channels + index];
    std::vector<float> by(channels), plus(channels);
    for (std::int64_t channel = 0; channel < channels; ++channel) {
      const double mean = sums[channel] / voxels;
      const double variance = std::max(0.0, sums[channels + channel] / voxels - mean * mean);
      const double factor = scale[channel] / std::sqrt(variance + epsilon);
      by[channel] = static_cast<float>(factor);
      plus[channel] = static_cast<float>(shift[channel] - (mean + around[channel]) * factor);
    }
    crew().run(tasks, [&](std::int64_t task) {
      const std::int64_t end = std::min(voxels, (task + 1) * VOXELS_AT_ONCE);
      for (std::int64_t voxel = task * VOXELS_AT_ONCE; voxel < end; ++voxel)
        for (std::int64_t channel = 0; channel < channels; channel += LANES) {
          const std::int64_t at = voxel * channels + channel;
          Vector value = load(values + at) * load(by.data() + channel) + load(plus.data() + channel);
          if (residual) value += load(residual + at);
          store(values + at, value > 0.0f ? value : value * slope);
        }
    });
  });
}

}  // extern "C"
