// Which copy of an expert a token takes, and the load that it leaves: ids (T,K) to slots (T,K).
//
// mixtura/eplb/state.py says what the tables hold, and is the same in torch.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace mixtura {

struct Replicas {
  const int32_t* slots;  // (num_slots + 1), the last -1
  const double* ends;    // (num_slots), rising
  int64_t* counts;       // (num_experts + 1)
  int64_t num_experts, num_slots;
  double shift, stride;  // token t is at frac(shift + t * stride)
  int64_t weight;        // 1, or 0 where nothing is recorded
};

// False where an id is outside [-1, num_experts); what was counted until then stays.
inline bool choose_replicas(const Replicas& r, const int32_t* ids, int32_t* out, int64_t num_tokens,
                            int64_t top_k) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    const double place = (double)t * r.stride + r.shift;
    const double u = place - std::floor(place);
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t id = ids[t * top_k + k];
      if (id < -1 || id >= r.num_experts) return false;
      const int64_t expert = id < 0 ? r.num_experts : id;
      const double* end = std::upper_bound(r.ends, r.ends + r.num_slots, (double)expert + u);
      out[t * top_k + k] = r.slots[end - r.ends];
      r.counts[expert] += r.weight;
    }
  }
  return true;
}

}  // namespace mixtura
