#include "routing_module.h"

#include <cstring>

#include "routing.h"

namespace nb = nanobind;
using namespace mixtura;

namespace {

using Address = uintptr_t;

const Kernels& (*current)() = nullptr;

Rule rule_from(const nb::bytes& packed) {
  static_assert(sizeof(Rule) == 19 * 4, "Rule must be what Python packs");
  if (packed.size() != sizeof(Rule)) throw nb::value_error("the packed rule has another size");
  Rule rule;
  std::memcpy(&rule, packed.c_str(), sizeof rule);
  return rule;
}

bool route(const nb::bytes& packed, Address logits, int64_t num_tokens, Address selection_bias,
           Address expert_scale, Address given_ids, Address weights, Address ids, int num_threads,
           Address x, int x_dtype, Address weight, int weight_dtype, Address bias,
           int64_t hidden_size) {
  const Rule rule = rule_from(packed);
  RoutingCall call{};
  call.gate.x = (const void*)x;
  call.gate.x_dtype = (Dtype)x_dtype;
  call.gate.weight = (const void*)weight;
  call.gate.weight_dtype = (Dtype)weight_dtype;
  call.gate.bias = (const float*)bias;
  call.gate.logits = (float*)logits;
  call.gate.num_tokens = num_tokens;
  call.gate.hidden_size = hidden_size;
  call.selection_bias = (const float*)selection_bias;
  call.expert_scale = (const float*)expert_scale;
  call.given_ids = (const int64_t*)given_ids;
  call.weights = (float*)weights;
  call.ids = (int64_t*)ids;
  nb::gil_scoped_release release;
  return run_routing(current(), rule, call, num_threads);
}

}  // namespace

void bind_routing(nb::module_& m, const Kernels& (*kernels)()) {
  current = kernels;
  m.def("route", &route);
}
