// Gate and router in one call: rows -> logits -> scores -> ids and weights.
#pragma once

#include "types.h"

namespace mixtura {

enum class Renormalize : int32_t { NONE, SUM, CLAMPED_SUM, P_NORM };
enum class BiasOn : int32_t { NONE, SCORE, LOGIT };

// mixtura/config/routing.py as `_LAYOUT` of mixtura/kernels/cpu/routing.py packs it.
struct Rule {
  int32_t num_choices, top_k;
  int32_t score;                    // Score
  int32_t scores_chosen;            // scores over the chosen experts, after the choice
  BiasOn bias_on;
  int32_t num_groups, topk_groups;  // 0: no groups
  int32_t best_of;                  // experts that make up a group's score, 1 or 2
  int32_t drops_to_zero;            // experts of dropped groups: 0, else -infinity
  Renormalize renormalize;
  int32_t num_shared, has_shared_gate;
  float multiplier, softcap;        // softcap 0: none
  float epsilon, p_norm, scale, jitter;
  float output_scale;               // that shared experts are divided by

  bool is_sparsemixer() const { return (Score)score == Score::SPARSEMIXER; }
  int64_t num_logits() const { return num_choices + (has_shared_gate ? num_shared : 0); }
  int64_t num_slots() const { return top_k + num_shared; }
};

// What a call is given. Without a gate weight the logits are read, else written.
struct RoutingCall {
  Gate gate;
  const float* selection_bias;  // (num_choices) or null
  const float* expert_scale;    // (num_choices) or null
  const int64_t* given_ids;     // (T, top_k) that replace the choice, or null
  float* weights;               // (T, num_slots)
  int64_t* ids;                 // (T, num_slots)
};

// Ties go to the lower id; NaN counts as the largest value, and makes the weights of its token NaN.
// Returns false, and has chosen nothing, where a given id is outside [0, num_choices).
bool run_routing(const Kernels& kernels, const Rule& rule, RoutingCall call, int num_threads);

}  // namespace mixtura
