// Threads that run one function together.
//
// Those of the OpenMP runtime that torch has loaded are used where there is one: a second pool
// beside torch's would wait for processors that torch's idle threads still spin on. Without
// it, a pool of our own.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

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

  // The next of the numbers 0 .. count - 1 for a member, or `count` where there are none; each is
  // taken once. A member has a range of its own, in order, so that it reads memory as one stream;
  // when that is done it helps the others. Phases must follow one another by barriers.
  int64_t take(int phase, int member, int64_t count) {
    for (int i = 0; i < size_; ++i) {
      const int owner = member + i < size_ ? member + i : member + i - size_;
      const int64_t begin = count * owner / size_, end = count * (owner + 1) / size_;
      std::atomic<int64_t>& taken = taken_[phase * most_ + owner].value;
      if (i > 0 && begin + taken.load(std::memory_order_relaxed) >= end) continue;
      const int64_t n = begin + taken.fetch_add(1, std::memory_order_relaxed);
      if (n < end) return n;
    }
    return count;
  }

  static constexpr int kPhases = 4;

 private:
  friend void run_team(int, Region, void*);
  friend struct Entry;
  struct alignas(64) Padded { std::atomic<int64_t> value{0}; };
  explicit Team(int most) : most_(most), taken_(kPhases * most) {}
  int size_ = 1, most_;
  std::vector<Padded> taken_;
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
