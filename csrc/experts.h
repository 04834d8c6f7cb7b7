// One call of a layer's experts, or of one matrix, from sorted slots to finished rows.
#pragma once

#include <string>
#include <vector>

#include "types.h"

namespace mixtura {

// The adapters of a layer, by number.
struct Adapters {
  std::vector<Adapter> all;
  int64_t rank_stride;  // the largest rank, up to a multiple of 16
};

// What a call is given. Pointers are as in `Call`.
struct Input {
  const void* x;
  Dtype x_dtype;
  const int32_t* ids;
  const float* weights;
  void* out;
  int64_t num_tokens, top_k;
  bool weight_on_input, reduce;
  const int32_t* adapter_ids;  // (T), -1: none; null: all are
  const Adapters* adapters;
};

// Runs the experts. Tokens go through in passes so that the memory between the phases stays below
// `kWorkspaceBytes`. Returns false, and has done nothing, where an id is outside [-1, L), or an
// adapter's is none of the adapters'.
bool run_experts(const Kernels& kernels, const Layer& layer, const Input& input, int num_threads);

// y = x W^T + bias for the one matrix of `layer.down`; ids and weights are not read.
void run_linear(const Kernels& kernels, const Layer& layer, const Input& input, int num_threads);

constexpr int64_t kWorkspaceBytes = int64_t(256) << 20;

}  // namespace mixtura
