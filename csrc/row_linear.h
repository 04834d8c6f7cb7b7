// Products of rows with a weight that is read where the model keeps it, row-major and unpacked: the
// gate's, and every linear map whose rows must round alike in any batch.
#pragma once

#include "team.h"
#include "types.h"

namespace mixtura {

// How a product is cut into tasks: some tokens times some rows of the weight each. A sum is made
// within a task and in one order (routing_gate.h), so that cuts change no result.
struct RowLinear {
  const Kernels* kernels;
  Gate gate;
  int64_t block_tokens, num_blocks;  // of tokens
  int64_t task_rows, num_parts;      // of the weight's rows
  int64_t row_bytes;                 // of a prepared row; 0: x is read where it is
  bool is_small;                     // no work for more than one thread
};

// `gate.in_bf16` and `gate.padded` are chosen here.
RowLinear plan_row_linear(const Kernels& kernels, Gate gate, int num_threads);

// A member's share of the tasks, in `phase` of its team.
void run_tasks(const RowLinear& linear, Team& team, int member, int phase);

// The whole product, by threads of its own.
void run_row_linear(const Kernels& kernels, const Gate& gate, int num_threads);

}  // namespace mixtura
