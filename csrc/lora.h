// What LoRA adapters add to a row: y += B (A x), in fp32. Factors are read rank by rank; a row's sums
// are made in one order whatever rows are beside it.
#pragma once

namespace {

constexpr int kAtOnce = 4;  // ranks of A, or panels of B, that share what is in registers

FN int64_t factor_at(const LowRank& part, const Factor& factor, int64_t expert) {
  return expert * part.rank * factor.stride;
}

FN int64_t size_of(Dtype dtype) { return dtype == Dtype::F32 ? 4 : 2; }

// Reads ahead columns of A, or outputs of B, `first .. first + n - 1` of all ranks. Inlined: a compiler may
// leave out calls of a function that does nothing else.
FN void fetch(const LowRank& part, const Factor& factor, int64_t expert, int64_t first, int64_t n) {
  const int64_t size = size_of(factor.dtype), bytes = n * size;
  const uint8_t* from = (const uint8_t*)factor.values + (factor_at(part, factor, expert) + first) * size;
  for (int64_t rank = 0; rank < part.rank; ++rank, from += factor.stride * size) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at);
    __builtin_prefetch(from + bytes - 1);
  }
}

template <Dtype D, int N>
static void shrink_ranks(const Factor& a, int64_t at, int64_t n, const float* x, float* shrunk) {
  F sum[N];
  for (int k = 0; k < N; ++k) sum[k] = f_zero();
  for (int64_t i = 0; i < n; i += 16) {
    const F value = f_load(x + i);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) {
      const int64_t column = at + k * a.stride + i;
      // The ranks that come next: a rank's numbers end before a stream of them is recognised.
      __builtin_prefetch((const uint8_t*)a.values + (column + N * a.stride) * size_of(D));
      sum[k] = f_fma(value, load_x(D, a.values, column), sum[k]);
    }
  }
  for (int k = 0; k < N; ++k) shrunk[k] = f_sum(sum[k]);
}

template <Dtype D>
static void shrink_as(const LowRank& part, int64_t expert, int64_t first, int64_t n, const float* x,
                      float* shrunk) {
  const Factor& a = part.a;
  int64_t at = factor_at(part, a, expert) + first, rank = 0;
  for (; rank + kAtOnce <= part.rank; rank += kAtOnce, at += kAtOnce * a.stride)
    shrink_ranks<D, kAtOnce>(a, at, n, x, shrunk + rank);
  for (; rank < part.rank; ++rank, at += a.stride) shrink_ranks<D, 1>(a, at, n, x, shrunk + rank);
}

// shrunk[r] = A[r][first ..] . x over `n` columns; x is padded with zeros to a multiple of 16.
static void shrink(const LowRank& part, int64_t expert, int64_t first, int64_t n, const float* x,
                   float* shrunk) {
  switch (part.a.dtype) {
    case Dtype::F32: return shrink_as<Dtype::F32>(part, expert, first, n, x, shrunk);
    case Dtype::F16: return shrink_as<Dtype::F16>(part, expert, first, n, x, shrunk);
    default: return shrink_as<Dtype::BF16>(part, expert, first, n, x, shrunk);
  }
}

template <Dtype D, int N>
static void expand_panels(const LowRank& part, int64_t at, const float* shrunk, float* y) {
  F sum[N];
  for (int k = 0; k < N; ++k) sum[k] = f_load(y + k * kPanel);
  for (int64_t rank = 0; rank < part.rank; ++rank, at += part.b.stride) {
    const F factor = f_set(shrunk[rank]);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k)
      sum[k] = f_fma(factor, load_x(D, part.b.values, at + k * kPanel), sum[k]);
  }
  for (int k = 0; k < N; ++k) f_store(y + k * kPanel, sum[k]);
}

template <Dtype D>
static void expand_as(const LowRank& part, int64_t expert, int64_t first, int64_t num_panels,
                      const float* shrunk, float* y) {
  const int64_t at = factor_at(part, part.b, expert) + first;
  int64_t panel = 0;
  for (; panel + kAtOnce <= num_panels; panel += kAtOnce)
    expand_panels<D, kAtOnce>(part, at + panel * kPanel, shrunk, y + panel * kPanel);
  for (; panel < num_panels; ++panel)
    expand_panels<D, 1>(part, at + panel * kPanel, shrunk, y + panel * kPanel);
}

// y[n] += sum over r of shrunk[r] B[first + n][r], for `num_panels` panels of outputs.
static void expand(const LowRank& part, int64_t expert, int64_t first, int64_t num_panels,
                   const float* shrunk, float* y) {
  switch (part.b.dtype) {
    case Dtype::F32: return expand_as<Dtype::F32>(part, expert, first, num_panels, shrunk, y);
    case Dtype::F16: return expand_as<Dtype::F16>(part, expert, first, num_panels, shrunk, y);
    default: return expand_as<Dtype::BF16>(part, expert, first, num_panels, shrunk, y);
  }
}

// The adapter of a sorted row; null: none.
FN const Adapter* adapter_of(const Call& call, int64_t row) {
  if (!call.adapters) return nullptr;
  const int32_t id = call.adapter_ids[call.slots[row] / call.top_k];
  return id < 0 ? nullptr : call.adapters + id;
}

constexpr int64_t kFetchRows = 4;  // of an expert, whose adapters are read ahead of a task's products

// What the adapters of an expert's first rows add to hidden columns `first ..`, and make of them.
FN void fetch_gate_up(const Call& call, int64_t expert, int64_t first, int64_t columns) {
  const Adapter* before = nullptr;
  const int64_t begin = call.offsets[expert], end = call.offsets[expert + 1];
  for (int64_t row = begin; row < end && row < begin + kFetchRows; ++row) {
    const Adapter* adapter = adapter_of(call, row);
    if (!adapter || adapter == before) continue;
    fetch(adapter->gate, adapter->gate.b, expert, first, columns);
    fetch(adapter->up, adapter->up.b, expert, first, columns);
    fetch(adapter->down, adapter->down.a, expert, first, columns);
    before = adapter;
  }
}

FN void fetch_down(const Call& call, int64_t expert, int64_t first, int64_t num_outputs) {
  const Adapter* before = nullptr;
  const int64_t begin = call.offsets[expert], end = call.offsets[expert + 1];
  for (int64_t row = begin; row < end && row < begin + kFetchRows; ++row) {
    const Adapter* adapter = adapter_of(call, row);
    if (adapter && adapter != before) fetch(adapter->down, adapter->down.b, expert, first, num_outputs);
    before = adapter;
  }
}

// A x of gate and up, of the row as it came.
static void shrink_row(const Call& call, int64_t row, Scratch& scratch) {
  const Adapter* adapter = adapter_of(call, row);
  if (!adapter || !(adapter->gate.rank || adapter->up.rank)) return;
  const int64_t slot = call.slots[row], expert = call.ids[slot], n = call.layer->gate_up.num_columns;
  read_row(call.x_dtype, call.x, slot / call.top_k * n, n, scratch.row);
  if (call.weight_on_input)
    for (int64_t i = 0; i < n; i += 16)
      f_store(scratch.row + i, f_mul(f_load(scratch.row + i), f_set(call.weights[slot])));
  float* of_gate = call.shrunk + 2 * row * call.rank_stride;
  float* of_up = of_gate + call.rank_stride;
  shrink(adapter->gate, expert, 0, n, scratch.row, of_gate);
  if (adapter->shares_a)
    __builtin_memcpy(of_up, of_gate, adapter->up.rank * 4);
  else
    shrink(adapter->up, expert, 0, n, scratch.row, of_up);
}

// What is added to some of a row's gates or ups; null: nothing.
FN const float* expanded(const LowRank& part, int64_t expert, int64_t first, int64_t num_panels,
                         const float* shrunk, float* added) {
  if (!part.rank) return nullptr;
  for (int64_t i = 0; i < num_panels * kPanel; i += kPanel) f_store(added + i, f_zero());
  expand(part, expert, first, num_panels, shrunk, added);
  return added;
}

// Adds to some panels of a row's outputs; A h is the sum of what the units have made.
static void expand_down(const Call& call, const Adapter& adapter, int64_t expert, int64_t row,
                        int64_t first_panel, int64_t num_panels, float* y, Scratch& scratch) {
  const LowRank& part = adapter.down;
  if (!part.rank) return;
  const float* of_units = call.shrunk_hidden + row * call.num_units * call.rank_stride;
  for (int64_t i = 0; i < part.rank; i += 16) {
    F sum = f_load(of_units + i);
    for (int64_t unit = 1; unit < call.num_units; ++unit)
      sum = f_add(sum, f_load(of_units + unit * call.rank_stride + i));
    f_store(scratch.shrunk + i, sum);
  }
  const int64_t there = (call.layer->hidden_size + kPanel - 1) / kPanel - first_panel;
  expand(part, expert, first_panel * kPanel, there < num_panels ? there : num_panels, scratch.shrunk, y);
}

}  // namespace
