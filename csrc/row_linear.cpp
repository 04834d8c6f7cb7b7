#include "row_linear.h"

#include <algorithm>
#include <vector>

namespace mixtura {

namespace {

constexpr int64_t kAlone = 256 * 1024;     // bytes of the weight that one thread reads alone
constexpr int64_t kPrepared = 512 * 1024;  // bytes of a task's rows, half a second-level cache
constexpr int64_t kTaskRows = 32;          // of the weight, at least, where tasks share tokens

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t element_size(Dtype dtype) { return dtype == Dtype::F32 ? 4 : 2; }

void region(void* context, Team& team, int member) {
  run_tasks(*(const RowLinear*)context, team, member, 0);
}

}  // namespace

RowLinear plan_row_linear(const Kernels& kernels, Gate gate, int num_threads) {
  const int64_t size = element_size(gate.weight_dtype);
  const bool is_bf16 = gate.x_dtype == Dtype::BF16 && gate.weight_dtype == Dtype::BF16;
  gate.in_bf16 = kernels.has_bf16 && is_bf16;
  const int64_t lanes = gate.in_bf16 ? 32 : 16;
  gate.padded = ceil_div(gate.hidden_size, lanes) * lanes;
  RowLinear linear{};
  linear.kernels = &kernels;
  linear.gate = gate;
  const int64_t row_bytes = gate.padded * (gate.in_bf16 ? 2 : 4);
  const bool has_type = gate.in_bf16 || gate.x_dtype == Dtype::F32;
  linear.row_bytes = has_type && gate.padded == gate.hidden_size ? 0 : row_bytes;
  const int64_t fit = kPrepared / row_bytes / 4 * 4;
  const int64_t most = std::max<int64_t>(4, std::min<int64_t>(kGateTaskTokens, fit));
  linear.block_tokens = ceil_div(gate.num_tokens, ceil_div(gate.num_tokens, most));
  if (gate.num_tokens > most) linear.block_tokens = ceil_div(linear.block_tokens, 4) * 4;
  linear.num_blocks = ceil_div(gate.num_tokens, linear.block_tokens);
  const bool splits_rows = linear.num_blocks < 4 * num_threads;
  const int64_t share = ceil_div(gate.num_rows, 4 * num_threads);
  linear.task_rows = splits_rows ? std::max(kTaskRows, ceil_div(share, 4) * 4) : gate.num_rows;
  linear.num_parts = ceil_div(gate.num_rows, linear.task_rows);
  linear.is_small = gate.num_rows * gate.hidden_size * size * ceil_div(gate.num_tokens, 4) <= kAlone;
  return linear;
}

void run_tasks(const RowLinear& linear, Team& team, int member, int phase) {
  static thread_local std::vector<uint8_t> memory;
  const Gate& gate = linear.gate;
  uint8_t* prepared = nullptr;
  if (linear.row_bytes) {
    const size_t bytes = (size_t)(linear.block_tokens * linear.row_bytes + 64);
    if (memory.size() < bytes) memory.resize(bytes);
    prepared = memory.data();
    prepared += -(uintptr_t)prepared % 64;
  }
  int64_t have = -1;
  const int64_t count = linear.num_blocks * linear.num_parts;
  for (int64_t n; (n = team.take(phase, member, count)) < count;) {
    const int64_t block = n / linear.num_parts, part = n % linear.num_parts;
    GateTask task;
    task.first_token = block * linear.block_tokens;
    task.num_tokens = std::min(linear.block_tokens, gate.num_tokens - task.first_token);
    task.first_row = part * linear.task_rows;
    task.num_rows = std::min(linear.task_rows, gate.num_rows - task.first_row);
    if (prepared) {
      if (block != have)
        for (int64_t t = 0; t < task.num_tokens; ++t)
          linear.kernels->prepare_gate(gate, task.first_token + t, prepared + t * linear.row_bytes);
      have = block;
      task.x = prepared;
      task.x_stride = linear.row_bytes;
    } else {
      task.x_stride = gate.hidden_size * element_size(gate.x_dtype);
      task.x = (const uint8_t*)gate.x + task.first_token * task.x_stride;
    }
    linear.kernels->gate(gate, task);
  }
}

void run_row_linear(const Kernels& kernels, const Gate& gate, int num_threads) {
  if (gate.num_tokens == 0 || gate.num_rows == 0) return;
  RowLinear linear = plan_row_linear(kernels, gate, num_threads);
  run_team(linear.is_small ? 1 : num_threads, region, &linear);
}

}  // namespace mixtura
