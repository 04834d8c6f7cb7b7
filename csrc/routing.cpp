#include "routing.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "row_linear.h"
#include "team.h"

namespace mixtura {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

constexpr int64_t kAloneLogits = 16 * 1024;  // logits that one thread routes alone

// ------------------------------------------------------------------------------------------ order

// Rises with x; NaN is the largest, and the two zeros are equal.
int32_t key_of(float x) {
  const float y = x + 0.0f;
  int32_t bits;
  std::memcpy(&bits, &y, 4);
  bits = bits < 0 ? bits ^ 0x7fffffff : bits;
  return x != x ? 0x7fffffff : bits;
}

float value_of(int32_t key) {
  const int32_t bits = key < 0 ? key ^ 0x7fffffff : key;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Memory of one thread, kept between calls.
struct Work {
  std::vector<float> values;  // logits as transformed and three more rows of num_choices
  std::vector<int32_t> keys;  // num_choices, then one for each group
  std::vector<int32_t> kept, ranked;

  void reserve(const Rule& rule) {
    const size_t n = (size_t)rule.num_choices;
    if (values.size() < 4 * n) values.resize(4 * n);
    if (keys.size() < 2 * n) keys.resize(2 * n);
    if (kept.size() < n) {
      kept.resize(n);
      ranked.resize(n);
    }
  }

  // Indices of the largest `count` of n keys, falling, equal ones by index, go to `ranked`. No key
  // is the lowest integer.
  void rank(const int32_t* from, int64_t n, int64_t count) {
    constexpr int64_t kBeside = 16;  // keys that are passed over together
    std::fill(kept.begin(), kept.begin() + count, std::numeric_limits<int32_t>::min());
    for (int64_t first = 0; first < n; first += kBeside) {
      const int64_t last = std::min(n, first + kBeside);
      if (last == first + kBeside) {
        const int32_t lowest = kept[count - 1];
        int32_t is_above = 0;
        for (int64_t i = 0; i < kBeside; ++i) is_above |= from[first + i] > lowest;
        if (!is_above) continue;
      }
      for (int64_t i = first; i < last; ++i) {
        const int32_t key = from[i];
        if (key <= kept[count - 1]) continue;
        int64_t at = count - 1;
        for (; at > 0 && kept[at - 1] < key; --at) {
          kept[at] = kept[at - 1];
          ranked[at] = ranked[at - 1];
        }
        kept[at] = key;
        ranked[at] = (int32_t)i;
      }
    }
  }
};

Work& thread_work() {
  static thread_local Work work;
  return work;
}

// ------------------------------------------------------------------------------------ one token

struct Token {
  const Kernels& kernels;
  const Rule& rule;
  Work& work;
  const float* x;  // (num_choices) transformed logits
  float* at(int i) const { return work.values.data() + i * rule.num_choices; }

  // Two picks, each weighed by a softmax over the logits in a window below its maximum.
  void sparsemixer(const int64_t* given, int64_t* ids, float* weights) const {
    const int64_t n = rule.num_choices;
    float *remaining = at(1), *near = at(2), *scores = at(3);
    std::copy(x, x + n, remaining);
    const float width = (float)(2.0 * (double)rule.jitter);
    for (int pick = 0; pick < 2; ++pick) {
      int64_t largest = 0;
      for (int64_t i = 1; i < n; ++i)
        if (key_of(remaining[i]) > key_of(remaining[largest])) largest = i;
      const float top = x[largest];
      for (int64_t i = 0; i < n; ++i) {
        const float distance = (top - x[i]) / std::max(std::fabs(x[i]), top);
        near[i] = distance > width ? -kInfinity : remaining[i];
      }
      const int64_t chosen = given ? given[pick] : largest;
      kernels.score(Score::SOFTMAX, near, scores, n);
      ids[pick] = chosen;
      weights[pick] = scores[chosen];
      remaining[chosen] = -kInfinity;
    }
  }

  void limit_groups(int32_t* keys) const {
    const int64_t size = rule.num_choices / rule.num_groups;
    int32_t* groups = keys + rule.num_choices;
    for (int64_t g = 0; g < rule.num_groups; ++g) {
      int32_t best = std::numeric_limits<int32_t>::min(), second = best;
      for (int64_t i = g * size; i < (g + 1) * size; ++i) {
        second = std::max(second, std::min(best, keys[i]));
        best = std::max(best, keys[i]);
      }
      groups[g] = rule.best_of == 1 ? best : key_of(value_of(best) + value_of(second));
    }
    work.rank(groups, rule.num_groups, rule.topk_groups);
    const int32_t dropped = key_of(rule.drops_to_zero ? 0.0f : -kInfinity);
    std::fill(groups, groups + rule.num_groups, 0);
    for (int64_t k = 0; k < rule.topk_groups; ++k) groups[work.ranked[k]] = 1;
    for (int64_t g = 0; g < rule.num_groups; ++g)
      if (!groups[g]) std::fill(keys + g * size, keys + (g + 1) * size, dropped);
  }

  void choose(const float* bias, int64_t* ids) const {
    const int64_t n = rule.num_choices;
    // Every score rises with its logit: without bias or groups the largest logits are chosen.
    const bool on_logit = rule.scores_chosen || rule.bias_on == BiasOn::LOGIT ||
                          (rule.bias_on == BiasOn::NONE && rule.num_groups == 0);
    const float* selection = x;
    if (!on_logit) {
      kernels.score((Score)rule.score, x, at(1), n);
      selection = at(1);
    }
    int32_t* keys = work.keys.data();
    if (bias) {
      for (int64_t i = 0; i < n; ++i) keys[i] = key_of(selection[i] + bias[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) keys[i] = key_of(selection[i]);
    }
    if (rule.num_groups) limit_groups(keys);
    work.rank(keys, n, rule.top_k);
    for (int64_t k = 0; k < rule.top_k; ++k) ids[k] = work.ranked[k];
  }

  void weigh(const int64_t* ids, float* weights) const {
    const bool over_all = (Score)rule.score == Score::SOFTMAX && !rule.scores_chosen;
    if (over_all) kernels.score(Score::SOFTMAX, x, at(1), rule.num_choices);
    const float* from = over_all ? at(1) : x;
    for (int64_t k = 0; k < rule.top_k; ++k) weights[k] = from[ids[k]];
    if (over_all) return;
    std::copy(weights, weights + rule.top_k, at(2));
    kernels.score((Score)rule.score, at(2), weights, rule.top_k);
  }

  void renormalize(float* weights) const {
    if (rule.renormalize == Renormalize::NONE) return;
    double sum = 0.0;
    for (int64_t k = 0; k < rule.top_k; ++k) {
      const double w = weights[k];
      if (rule.renormalize != Renormalize::P_NORM) sum += w;
      else if (rule.p_norm == 2.0f) sum += w * w;
      else if (rule.p_norm == 1.0f) sum += std::fabs(w);
      else sum += std::pow(std::fabs(w), (double)rule.p_norm);
    }
    float divisor = (float)sum;
    if (rule.renormalize == Renormalize::SUM) divisor += rule.epsilon;
    else if (rule.renormalize == Renormalize::CLAMPED_SUM)
      divisor = divisor < rule.epsilon ? rule.epsilon : divisor;
    else if (rule.p_norm == 2.0f) divisor = (float)std::sqrt(sum);
    else if (rule.p_norm != 1.0f) divisor = (float)std::pow(sum, 1.0 / (double)rule.p_norm);
    for (int64_t k = 0; k < rule.top_k; ++k) weights[k] /= divisor;
  }
};

void route_token(const Kernels& kernels, const Rule& rule, const RoutingCall& call, int64_t t,
                 Work& work) {
  const int64_t n = rule.num_choices;
  const float* raw = call.gate.logits + t * rule.num_logits();
  float* weights = call.weights + t * rule.num_slots();
  int64_t* ids = call.ids + t * rule.num_slots();
  const int64_t* given = call.given_ids ? call.given_ids + t * rule.top_k : nullptr;
  bool has_nan = false;
  for (int64_t i = 0; i < n; ++i) has_nan |= raw[i] != raw[i];
  Token token{kernels, rule, work, raw};
  if (rule.multiplier != 1.0f) {
    for (int64_t i = 0; i < n; ++i) token.at(0)[i] = raw[i] * rule.multiplier;
    token.x = token.at(0);
  }
  if (rule.softcap > 0.0f) {
    kernels.soft_cap_logits(token.x, token.at(0), n, rule.softcap);
    token.x = token.at(0);
  }
  if (rule.is_sparsemixer()) {
    token.sparsemixer(given, ids, weights);
  } else {
    if (given) std::copy(given, given + rule.top_k, ids);
    else token.choose(call.selection_bias, ids);
    token.weigh(ids, weights);
  }
  token.renormalize(weights);
  for (int64_t k = 0; k < rule.top_k; ++k) {
    if (rule.scale != 1.0f) weights[k] *= rule.scale;
    if (call.expert_scale) weights[k] *= call.expert_scale[ids[k]];
    if (has_nan) weights[k] = kNaN;
  }
  for (int64_t s = 0; s < rule.num_shared; ++s) {
    float* weight = weights + rule.top_k + s;
    *weight = 1.0f;
    if (rule.has_shared_gate) kernels.score(Score::SIGMOID, raw + n + s, weight, 1);
    *weight /= rule.output_scale;
    ids[rule.top_k + s] = n + s;
  }
}

// ------------------------------------------------------------------------------------- all tokens

struct Job {
  const Kernels* kernels;
  const Rule* rule;
  const RoutingCall* call;
  RowLinear gate;
  int64_t route_tokens;  // of a task
};

void region(void* context, Team& team, int member) {
  const Job& job = *(const Job*)context;
  const RoutingCall& call = *job.call;
  Work& work = thread_work();
  if (call.gate.weight) {
    run_tasks(job.gate, team, member, 0);
    team.barrier();
  }
  work.reserve(*job.rule);
  const int64_t num_tokens = call.gate.num_tokens;
  const int64_t count = (num_tokens + job.route_tokens - 1) / job.route_tokens;
  for (int64_t n; (n = team.take(1, member, count)) < count;) {
    const int64_t last = std::min(num_tokens, (n + 1) * job.route_tokens);
    for (int64_t t = n * job.route_tokens; t < last; ++t)
      route_token(*job.kernels, *job.rule, call, t, work);
  }
}

}  // namespace

bool run_routing(const Kernels& kernels, const Rule& rule, RoutingCall call, int num_threads) {
  Gate& gate = call.gate;
  if (gate.num_tokens == 0) return true;
  if (call.given_ids)
    for (int64_t i = 0; i < gate.num_tokens * rule.top_k; ++i)
      if (call.given_ids[i] < 0 || call.given_ids[i] >= rule.num_choices) return false;
  gate.num_rows = rule.num_logits();
  Job job{};
  job.kernels = &kernels;
  job.rule = &rule;
  job.call = &call;
  bool is_small = gate.num_tokens * gate.num_rows <= kAloneLogits;
  if (gate.weight) {
    job.gate = plan_row_linear(kernels, gate, num_threads);
    is_small = job.gate.is_small;
  }
  const int64_t quarter = gate.num_tokens / (4 * num_threads);
  job.route_tokens = std::max<int64_t>(1, std::min<int64_t>(16, quarter));
  run_team(is_small ? 1 : num_threads, region, &job);
  return true;
}

}  // namespace mixtura
