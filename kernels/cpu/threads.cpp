// Threads that share the work of a call, and memory.

#include "kernels.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(_WIN32)
#include <malloc.h>
#include <windows.h>
#else
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace nnturbo {
namespace {

class Crew;

// The crew that this thread works in, and which of its threads this one is; 0 is whoever calls. No thread has more of its
// own: MinGW frees what threads have before it ends what they have made with it.
thread_local Crew* own_crew = nullptr;
thread_local int own_index = 0;

// Threads that wait for work; each takes the next task until there is none.
class Crew {
 public:
  void resize(int count) {
    if (static_cast<int>(threads_.size()) == count - 1) return;
    stop();
    stopped_ = false;
    blocks_.resize(count);
    try {
      for (int index = 1; index < count; ++index)
        threads_.emplace_back([this, index, seen = turn_] {
          own_crew = this;
          own_index = index;
          wait(seen);
        });
    } catch (const std::system_error&) {
      // The system gives no more threads: those that are there do the work.
    }
  }

  void run(Size tasks, void (*task)(const void*, Size), const void* context) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = task;
      context_ = context;
      tasks_ = tasks;
      next_ = 0;
      busy_ = static_cast<int>(threads_.size());
      ++turn_;
    }
    woken_.notify_all();
    take(task, context, tasks);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

  Size size() const { return static_cast<Size>(threads_.size()) + 1; }

  // Memory of the thread that asks, which does a task; kept for its next one.
  float* scratch(std::size_t floats) {
    Block& block = blocks_[own_index];
    if (block.size < floats) {
      block.clear();
      block.memory = static_cast<float*>(allocate(floats * sizeof(float)));
      block.size = floats;
    }
    return block.memory;
  }

  ~Crew() { stop(); }

 private:
  struct Block {
    float* memory = nullptr;
    std::size_t size = 0;
    void clear() {
      release(memory);
      memory = nullptr;
      size = 0;
    }
  };

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopped_ = true;
    }
    woken_.notify_all();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
    for (Block& block : blocks_) block.clear();
  }

  void take(void (*task)(const void*, Size), const void* context, Size tasks) {
    try {
      for (Size index; (index = next_.fetch_add(1)) < tasks;) task(context, index);
    } catch (...) {
      next_ = tasks;  // nobody goes on
      std::lock_guard<std::mutex> lock(mutex_);
      failure_ = std::current_exception();
    }
  }

  void wait(std::uint64_t seen) {
    for (;;) {
      void (*task)(const void*, Size);
      const void* context;
      Size tasks;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        woken_.wait(lock, [&] { return stopped_ || turn_ != seen; });
        if (stopped_) return;
        seen = turn_;
        task = task_;
        context = context_;
        tasks = tasks_;
      }
      take(task, context, tasks);
      {
        std::lock_guard<std::mutex> lock(mutex_);
        --busy_;
      }
      done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable woken_, done_;
  std::vector<std::thread> threads_;
  std::vector<Block> blocks_ = std::vector<Block>(1);
  void (*task_)(const void*, Size) = nullptr;
  const void* context_ = nullptr;
  Size tasks_ = 0;
  std::atomic<Size> next_{0};
  int busy_ = 0;
  std::uint64_t turn_ = 0;
  std::exception_ptr failure_;
  bool stopped_ = false;
};

// Crews that nobody works with; there are as many as calls that were ever made at the same time.
struct Idle {
  std::mutex mutex;
  std::vector<Crew*> crews;
  std::size_t made = 0;
};

// Never ended: threads may outlive static objects.
Idle*& idle() {
  static Idle* of_process = new Idle;
#if !defined(_WIN32)
  // A process that was forked has none of the threads, and starts new ones.
  static const int once = pthread_atfork(nullptr, nullptr, [] { of_process = new Idle; });
  (void)once;
#endif
  return of_process;
}

Crew* take() {
  Idle& all = *idle();
  std::lock_guard<std::mutex> lock(all.mutex);
  if (all.crews.empty()) {
    all.crews.reserve(++all.made);  // so that giving it back needs no memory
    return new Crew;
  }
  Crew* const crew = all.crews.back();
  all.crews.pop_back();
  return crew;
}

void give_back(Crew* crew) {
  Idle& all = *idle();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.crews.push_back(crew);
}

}  // namespace

Threads::Threads(int count) : outer_(own_crew != nullptr) {
  if (outer_) return;
  Crew* const crew = take();
  try {
    crew->resize(count);
  } catch (...) {
    give_back(crew);
    throw;
  }
  own_crew = crew;
}

Threads::~Threads() {
  if (!outer_) give_back(std::exchange(own_crew, nullptr));
}

void run(Size tasks, void (*task)(const void*, Size), const void* context) { own_crew->run(tasks, task, context); }

Size threads() { return own_crew->size(); }

double memory_bytes() {
  constexpr double UNKNOWN = 1e15;
#if defined(_WIN32)
  MEMORYSTATUSEX status;
  status.dwLength = sizeof status;
  return GlobalMemoryStatusEx(&status) ? static_cast<double>(status.ullTotalPhys) : UNKNOWN;
#else
  const double bytes = static_cast<double>(sysconf(_SC_PAGESIZE)) * static_cast<double>(sysconf(_SC_PHYS_PAGES));
  return bytes > 0 ? bytes : UNKNOWN;
#endif
}

void* allocate(std::size_t bytes) {
  // Of large memory the system makes large pages, of which it prepares and the processor looks up fewer.
  constexpr std::size_t LARGE_PAGE = 1 << 21, LINE = 64;
  const bool is_large = bytes >= 2 * LARGE_PAGE;
  const std::size_t alignment = is_large ? LARGE_PAGE : LINE, whole = (bytes + alignment - 1) / alignment * alignment;
#if defined(_WIN32)
  void* memory = _aligned_malloc(whole, alignment);
#else
  void* memory = std::aligned_alloc(alignment, whole);
#endif
  if (!memory && whole) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (is_large) madvise(memory, whole, MADV_HUGEPAGE);
#endif
  return memory;
}

void release(void* memory) noexcept {
#if defined(_WIN32)
  _aligned_free(memory);
#else
  std::free(memory);
#endif
}

float* scratch(std::size_t floats) { return own_crew->scratch(floats); }

}  // namespace nnturbo
