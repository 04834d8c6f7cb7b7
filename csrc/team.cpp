#include "team.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>

#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace mixtura {

namespace {

std::atomic<bool> is_forked{false};
std::atomic<int64_t> short_teams{0};

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// The C interface that GNU's, LLVM's and Intel's OpenMP runtimes share.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  bool complete() const { return parallel && thread_num && num_threads && in_parallel; }
};

OpenMp symbols_of(void* library) {
  OpenMp found;
  found.parallel = (decltype(found.parallel))dlsym(library, "GOMP_parallel");
  found.thread_num = (decltype(found.thread_num))dlsym(library, "omp_get_thread_num");
  found.num_threads = (decltype(found.num_threads))dlsym(library, "omp_get_num_threads");
  found.in_parallel = (decltype(found.in_parallel))dlsym(library, "omp_in_parallel");
  return found;
}

// A runtime that is loaded already; none is loaded for us.
OpenMp find_openmp() {
  OpenMp found = symbols_of(RTLD_DEFAULT);
  if (found.complete()) return found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        const char* slash = info->dlpi_name ? std::strrchr(info->dlpi_name, '/') : nullptr;
        const char* name = slash ? slash + 1 : "";
        if (std::strncmp(name, "libgomp", 7) && std::strncmp(name, "libiomp5", 8) &&
            std::strncmp(name, "libomp", 6))
          return 0;
        void* library = dlopen(info->dlpi_name, RTLD_NOLOAD | RTLD_LAZY);
        if (!library) return 0;
        const OpenMp symbols = symbols_of(library);
        if (!symbols.complete()) return 0;
        *(OpenMp*)out = symbols;
        return 1;
      },
      &found);
  return found;
}

const OpenMp& openmp() {
  static const OpenMp found = find_openmp();
  return found;
}

// Threads that sleep between regions.
class Pool {
 public:
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stops_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  // False if another thread's region is running.
  bool run(int size, void (*member)(void*, int), void* context) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    while ((int)threads_.size() < size - 1) {
      const int index = (int)threads_.size() + 1;
      threads_.emplace_back([this, index, seen = job_] { work(index, seen); });
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      member_ = member;
      context_ = context;
      size_ = size;
      running_ = size - 1;
      ++job_;
    }
    wake_.notify_all();
    member(context, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    return true;
  }

 private:
  void work(int index, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stops_ || job_ != seen; });
      if (stops_) return;
      seen = job_;
      if (index >= size_) continue;
      lock.unlock();
      member_(context_, index);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  void (*member_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int size_ = 0, running_ = 0;
  uint64_t job_ = 0;
  bool stops_ = false;
};

// Never destroyed: at exit other threads may still be in it.
Pool& pool() {
  static Pool* threads = new Pool;
  return *threads;
}

std::atomic<int> chosen{-1};

[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

}  // namespace

struct Entry {
  Region region;
  void* context;
  Team team;

  static void openmp_member(void* data) {
    Entry& entry = *(Entry*)data;
    const int member = openmp().thread_num();
    if (member == 0) entry.team.size_ = openmp().num_threads();
    // The others learn the size when they first wait; member 0 publishes it here.
    entry.team.generation_.value.fetch_add(member == 0 ? 1 : 0, std::memory_order_release);
    while (entry.team.generation_.value.load(std::memory_order_acquire) == 0) pause_cpu();
    entry.region(entry.context, entry.team, member);
  }
  static void pool_member(void* data, int member) {
    Entry& entry = *(Entry*)data;
    entry.region(entry.context, entry.team, member);
  }
  void set_size(int size) { team.size_ = size; }
};

void Team::barrier() {
  if (size_ == 1) return;
  const int64_t generation = generation_.value.load(std::memory_order_acquire);
  if (arrived_.value.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.value.store(0, std::memory_order_relaxed);
    generation_.value.store(generation + 1, std::memory_order_release);
    return;
  }
  // Where there are more threads than processors, the one that is waited for may need this one.
  for (int spins = 0; generation_.value.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins < 4000) pause_cpu();
    else sched_yield();
  }
}

void run_team(int num_threads, Region region, void* context) {
  Entry entry{region, context, Team(num_threads > 1 ? num_threads : 1)};
  const bool can_share = num_threads > 1 && !is_forked.load(std::memory_order_relaxed);
  if (can_share && team_threads() == Threads::OPENMP && !openmp().in_parallel()) {
    openmp().parallel(&Entry::openmp_member, &entry, (unsigned)num_threads, 0);
    if (entry.team.size() < num_threads) short_teams.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  if (can_share && team_threads() == Threads::POOL) {
    entry.set_size(num_threads);
    if (pool().run(num_threads, &Entry::pool_member, &entry)) return;
    entry.set_size(1);
  }
  if (num_threads > 1) short_teams.fetch_add(1, std::memory_order_relaxed);
  region(context, entry.team, 0);
}

Threads team_threads() {
  int now = chosen.load(std::memory_order_relaxed);
  if (now < 0) {
    now = (int)(openmp().complete() ? Threads::OPENMP : Threads::POOL);
    chosen.store(now, std::memory_order_relaxed);
  }
  return (Threads)now;
}

bool choose_threads(Threads threads) {
  if (threads == Threads::OPENMP && !openmp().complete()) return false;
  chosen.store((int)threads, std::memory_order_relaxed);
  return true;
}

int64_t num_short_teams() { return short_teams.load(std::memory_order_relaxed); }

}  // namespace mixtura
