#include "experts.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <vector>

#include "team.h"

namespace mixtura {

namespace {

constexpr int64_t kDownPanels = 2 * kQuad;  // of one task: 128 outputs

// Memory that a thread keeps between calls; it grows and stays. Huge pages where there are any.
class Arena {
 public:
  ~Arena() { release(); }
  uint8_t* get(int64_t bytes) {
    if (bytes <= size_) return begin_;
    release();
    const int64_t page = int64_t(2) << 20;
    const int64_t size = (bytes + page - 1) / page * page;
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    madvise(memory, size, MADV_HUGEPAGE);
#endif
    begin_ = (uint8_t*)memory;
    size_ = size;
    return begin_;
  }

 private:
  void release() {
    if (begin_) munmap(begin_, size_);
    begin_ = nullptr;
    size_ = 0;
  }
  uint8_t* begin_ = nullptr;
  int64_t size_ = 0;
};

// Cuts an arena into aligned pieces: first measure, then hand out.
class Cutter {
 public:
  explicit Cutter(uint8_t* base) : base_(base) {}
  template <class T> T* take(int64_t count) {
    T* piece = base_ ? (T*)(base_ + used_) : nullptr;
    used_ += (count * (int64_t)sizeof(T) + 63) / 64 * 64 + 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

int64_t scratch_columns(const Layer& layer) {
  const int64_t unit = layer.unit_columns * (layer.is_gated ? 2 : 1);
  return (unit + kQuad * kPanel - 1) / (kQuad * kPanel) * (kQuad * kPanel);
}

int64_t longest_row(const Layer& layer) {
  const int64_t widest = std::max({layer.gate_up.num_columns, layer.down.num_columns, layer.hidden_size});
  return (widest + kPanel - 1) / kPanel * kPanel + kPanel;
}

Scratch thread_scratch(const Layer& layer, const Kernels& kernels, int64_t rank_stride) {
  static thread_local Arena arena;
  Scratch s{};
  for (uint8_t* base = nullptr;;) {
    Cutter cut(base);
    s.c = cut.take<float>(kernels.row_chunk * scratch_columns(layer));
    s.unpacked = cut.take<uint8_t>(kUnpackedBytes);
    s.row = cut.take<float>(longest_row(layer));
    s.permuted = cut.take<float>(layer.gate_up.permutation ? longest_row(layer) : 0);
    s.added = cut.take<float>(rank_stride ? scratch_columns(layer) : 0);
    s.shrunk = cut.take<float>(rank_stride);
    // Last: memory that is not touched without tiles.
    s.tile_rows = cut.take<uint32_t>(
        kTileRowChunk * std::max(tile_row_words(layer.gate_up), tile_row_words(layer.down)));
    s.rows_of = s.tiles_of = -1;
    if (base) return s;
    base = arena.get(cut.used());
  }
}

// Sorts slots by expert, in slot order within one. False where an id is outside [-1, L).
struct Sorted {
  std::vector<int32_t> slots, offsets, position, active;

  bool sort(const int32_t* ids, int64_t num_slots, int64_t num_experts) {
    offsets.assign(num_experts + 1, 0);
    position.resize(num_slots);
    for (int64_t s = 0; s < num_slots; ++s) {
      if (ids[s] < -1 || ids[s] >= num_experts) return false;
      if (ids[s] >= 0) ++offsets[ids[s] + 1];
    }
    active.clear();
    for (int64_t e = 0; e < num_experts; ++e) {
      if (offsets[e + 1]) active.push_back((int32_t)e);
      offsets[e + 1] += offsets[e];
    }
    slots.resize(offsets[num_experts]);
    next_.assign(offsets.begin(), offsets.end() - 1);
    for (int64_t s = 0; s < num_slots; ++s) {
      position[s] = ids[s] < 0 ? -1 : next_[ids[s]]++;
      if (position[s] >= 0) slots[position[s]] = (int32_t)s;
    }
    // The longest first, so that none is left for the end.
    std::stable_sort(active.begin(), active.end(),
                     [&](int32_t a, int32_t b) { return rows(a) > rows(b); });
    return true;
  }
  int32_t rows(int32_t expert) const { return offsets[expert + 1] - offsets[expert]; }

 private:
  std::vector<int32_t> next_;
};

struct Job {
  const Kernels* kernels;
  Call call;
  const Sorted* sorted;
  int64_t units, down_tasks;
  int64_t row_block;  // tokens that a thread prepares or combines at a time
  int64_t shrink_tasks, shrink_block;  // for rows' adapters, and sorted rows of one
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Does a member's share of tasks 0 .. count - 1 of a phase.
template <class Task>
void each(Team& team, int member, int phase, int64_t count, const Task& task) {
  for (int64_t n; (n = team.take(phase, member, count)) < count;) task(n);
}

void experts_region(void* context, Team& team, int member) {
  const Job& job = *(const Job*)context;
  const Call& call = job.call;
  const Kernels& kernels = *job.kernels;
  const Sorted& sorted = *job.sorted;
  Scratch scratch = thread_scratch(*call.layer, kernels, call.rank_stride);
  const int64_t row_tasks = ceil_div(call.num_tokens, job.row_block);
  const auto rows = [&](void (*run)(const Call&, int64_t, Scratch&)) {
    return [&, run](int64_t n) {
      const int64_t last = std::min(call.num_tokens, (n + 1) * job.row_block);
      for (int64_t token = n * job.row_block; token < last; ++token) run(call, token, scratch);
    };
  };
  const auto prepare = rows(kernels.prepare);
  each(team, member, 0, row_tasks + job.shrink_tasks, [&](int64_t n) {
    if (n < row_tasks) return prepare(n);
    const int64_t first = (n - row_tasks) * job.shrink_block;
    const int64_t last = std::min((int64_t)sorted.slots.size(), first + job.shrink_block);
    for (int64_t row = first; row < last; ++row) kernels.shrink_row(call, row, scratch);
  });
  team.barrier();
  each(team, member, 1, (int64_t)sorted.active.size() * job.units, [&](int64_t n) {
    kernels.gate_up(call, sorted.active[n / job.units], n % job.units, scratch);
  });
  team.barrier();
  const int64_t num_panels = call.layer->down.num_panels;
  each(team, member, 2, (int64_t)sorted.active.size() * job.down_tasks, [&](int64_t n) {
    const int64_t first = n % job.down_tasks * kDownPanels;
    kernels.down(call, sorted.active[n / job.down_tasks], first,
                 std::min(kDownPanels, num_panels - first), scratch);
  });
  team.barrier();
  each(team, member, 3, row_tasks, rows(kernels.combine));
}

void linear_region(void* context, Team& team, int member) {
  const Job& job = *(const Job*)context;
  const Call& call = job.call;
  Scratch scratch = thread_scratch(*call.layer, *job.kernels, 0);
  const int64_t row_tasks = ceil_div(call.num_tokens, job.row_block);
  const auto block = [&](int64_t n, auto run) {
    const int64_t last = std::min(call.num_tokens, (n + 1) * job.row_block);
    for (int64_t token = n * job.row_block; token < last; ++token) run(call, token, scratch);
  };
  each(team, member, 0, row_tasks, [&](int64_t n) { block(n, job.kernels->prepare); });
  team.barrier();
  each(team, member, 1, job.down_tasks, [&](int64_t n) {
    const int64_t first = n * kDownPanels;
    job.kernels->down(call, 0, first, std::min(kDownPanels, call.layer->down.num_panels - first), scratch);
  });
  team.barrier();
  each(team, member, 2, row_tasks, [&](int64_t n) { block(n, job.kernels->finish_linear); });
}

// Bytes between the phases, for one token.
int64_t bytes_per_token(const Layer& layer, int64_t top_k, bool has_row_per_slot,
                        int64_t shrunk_per_slot) {
  const int64_t hidden = row_layout(layer.down).stride + layer.down.num_panels * kPanel;
  const int64_t num_rows = has_row_per_slot ? top_k : 1;
  return 4 * (num_rows * row_layout(layer.gate_up).stride + top_k * (hidden + shrunk_per_slot));
}

Arena& workspace() {
  static thread_local Arena arena;
  return arena;
}

// What adapters have to do: nothing where no token has one. False where a number is none's.
bool find_adapters(const Input& input, bool* are_used) {
  *are_used = false;
  if (!input.adapter_ids) return true;
  const int64_t count = (int64_t)input.adapters->all.size();
  for (int64_t t = 0; t < input.num_tokens; ++t) {
    if (input.adapter_ids[t] < -1 || input.adapter_ids[t] >= count) return false;
    *are_used |= input.adapter_ids[t] >= 0;
  }
  return true;
}

int64_t element_size(Dtype dtype) { return dtype == Dtype::F32 ? 4 : 2; }

}  // namespace

bool run_experts(const Kernels& kernels, const Layer& layer, const Input& input, int num_threads) {
  static thread_local Sorted sorted;
  const int64_t top_k = input.top_k;
  for (int64_t s = 0; s < input.num_tokens * top_k; ++s)
    if (input.ids[s] < -1 || input.ids[s] >= layer.num_experts) return false;
  bool has_adapters;
  if (!find_adapters(input, &has_adapters)) return false;
  const int64_t units = ceil_div(layer.intermediate_size, layer.unit_columns);
  const int64_t rank_stride = has_adapters ? input.adapters->rank_stride : 0;
  const Matrix& m = layer.gate_up;
  const bool has_row_per_slot =
      m.permutation ||
      (m.rounding != Rounding::NONE && (m.rounds_per_expert || input.weight_on_input));
  const int64_t most =
      std::max<int64_t>(1, kWorkspaceBytes / bytes_per_token(layer, top_k, has_row_per_slot,
                                                             (2 + units) * rank_stride));
  const int64_t passes = ceil_div(input.num_tokens, most);
  for (int64_t pass = 0, first = 0; pass < passes; ++pass) {
    const int64_t num_tokens = ceil_div(input.num_tokens - first, passes - pass);
    sorted.sort(input.ids + first * top_k, num_tokens * top_k, layer.num_experts);
    const int64_t num_slots = (int64_t)sorted.slots.size();
    Job job{};
    job.kernels = &kernels;
    job.sorted = &sorted;
    Call& c = job.call;
    c.layer = &layer;
    c.x = (const uint8_t*)input.x + first * layer.gate_up.num_columns * element_size(input.x_dtype);
    c.x_dtype = input.x_dtype;
    c.ids = input.ids + first * top_k;
    c.weights = input.weights + first * top_k;
    c.out = (uint8_t*)input.out +
            first * layer.hidden_size * (input.reduce ? element_size(input.x_dtype) : 4 * top_k);
    c.num_tokens = num_tokens;
    c.top_k = top_k;
    c.weight_on_input = input.weight_on_input;
    c.reduce = input.reduce;
    c.has_row_per_slot = has_row_per_slot;
    c.slots = sorted.slots.data();
    c.offsets = sorted.offsets.data();
    c.position = sorted.position.data();
    c.adapters = has_adapters ? input.adapters->all.data() : nullptr;
    c.adapter_ids = has_adapters ? input.adapter_ids + first : nullptr;
    c.rank_stride = rank_stride;
    c.num_units = units;
    for (uint8_t* base = nullptr;;) {
      Cutter cut(base);
      c.rows = cut.take<uint32_t>((has_row_per_slot ? num_slots : num_tokens) *
                                  row_layout(layer.gate_up).stride);
      c.hidden = cut.take<uint32_t>(num_slots * row_layout(layer.down).stride);
      c.y = cut.take<float>(num_slots * layer.down.num_panels * kPanel);
      c.shrunk = cut.take<float>(num_slots * 2 * rank_stride);
      c.shrunk_hidden = cut.take<float>(num_slots * units * rank_stride);
      if (base) break;
      base = workspace().get(cut.used());
    }
    job.units = units;
    job.down_tasks = ceil_div(layer.down.num_panels, kDownPanels);
    job.row_block = std::max<int64_t>(1, std::min<int64_t>(8, num_tokens / num_threads));
    job.shrink_block = std::max<int64_t>(1, std::min<int64_t>(8, num_slots / num_threads));
    job.shrink_tasks = has_adapters ? ceil_div(num_slots, job.shrink_block) : 0;
    run_team(num_threads, experts_region, &job);
    first += num_tokens;
  }
  return true;
}

void run_linear(const Kernels& kernels, const Layer& layer, const Input& input, int num_threads) {
  const int64_t per_token = 4 * (row_layout(layer.down).stride + layer.down.num_panels * kPanel);
  const int64_t most = std::max<int64_t>(1, kWorkspaceBytes / per_token);
  const int64_t passes = ceil_div(input.num_tokens, most);
  for (int64_t pass = 0, first = 0; pass < passes; ++pass) {
    const int64_t num_tokens = ceil_div(input.num_tokens - first, passes - pass);
    const int32_t offsets[2] = {0, (int32_t)num_tokens};
    Job job{};
    job.kernels = &kernels;
    Call& c = job.call;
    c.layer = &layer;
    c.x = (const uint8_t*)input.x + first * layer.gate_up.num_columns * element_size(input.x_dtype);
    c.x_dtype = input.x_dtype;
    c.out = (uint8_t*)input.out + first * layer.hidden_size * element_size(input.x_dtype);
    c.num_tokens = num_tokens;
    c.top_k = 1;
    c.offsets = offsets;
    for (uint8_t* base = nullptr;;) {
      Cutter cut(base);
      c.rows = cut.take<uint32_t>(num_tokens * row_layout(layer.down).stride);
      c.y = cut.take<float>(num_tokens * layer.down.num_panels * kPanel);
      if (base) break;
      base = workspace().get(cut.used());
    }
    c.hidden = c.rows;  // prepared for the only matrix there is
    job.down_tasks = ceil_div(layer.down.num_panels, kDownPanels);
    job.row_block = std::max<int64_t>(1, std::min<int64_t>(8, num_tokens / num_threads));
    run_team(num_threads, linear_region, &job);
    first += num_tokens;
  }
}

}  // namespace mixtura
