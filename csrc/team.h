// Threads that run one function together.
//
// Those of the OpenMP runtime that torch has loaded are used where there is one: a second pool
// beside torch's would wait for processors that torch's idle threads still spin on. Without
// it, a pool of our own.
#pragma once

#include <atomic>
#include <cstdint>

namespace mixtura {

class Team;

// One member's view of the region.
using Region = void (*)(void* context, Team& team, int member);

class Team {
 public:
  // Members that really run, at most what was asked for.
  int size() const { return size_; }

  // Every member waits for the others.
  void barrier();

  // The members take numbers 0 .. count - 1, each once; phases must follow one another by barriers.
  int64_t take(int phase) { return next_[phase].value.fetch_add(1, std::memory_order_relaxed); }

  static constexpr int kPhases = 4;

 private:
  friend void run_team(int, Region, void*);
  friend struct Entry;
  struct alignas(64) Padded { std::atomic<int64_t> value{0}; };
  int size_ = 1;
  Padded next_[kPhases];
  Padded arrived_, generation_;
};

// Calls `region` once on each of at most `num_threads` threads, this one included. In a child of
// fork, whose parent's threads are gone, and inside another region: on this thread alone.
void run_team(int num_threads, Region region, void* context);

enum class Threads { OPENMP, POOL };

// Which threads there are, and are used. Choosing is for measurements; false if there are none.
Threads team_threads();
bool choose_threads(Threads threads);

// Calls that got fewer threads than they asked for.
int64_t num_short_teams();

}  // namespace mixtura
