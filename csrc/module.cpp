// The Python module `mixtura.kernels.cpu._cpu`: raw addresses in, rows out, no torch headers.
//
// Addresses, shapes and dtypes have been checked by mixtura/kernels/cpu before they come here.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <numeric>

#include "attention.h"
#include "experts.h"
#include "features.h"
#include "replicas.h"
#include "row_linear.h"
#include "routing_module.h"
#include "team.h"

namespace nb = nanobind;
using namespace mixtura;

namespace {

using Address = uintptr_t;

template <class T> const T* at(Address address) { return (const T*)address; }

const Kernels& kernels_named(const std::string& name) {
  for (const Kernels* kernels : runnable_kernels())
    if (name.empty() || name == kernels->name) return *kernels;
  throw nb::value_error(("no kernels called " + name + " run on this processor").c_str());
}

// The best, unless a test or a measurement has chosen others.
std::atomic<const Kernels*> current{nullptr};

const Kernels& current_kernels() {
  const Kernels* kernels = current.load(std::memory_order_relaxed);
  return kernels ? *kernels : *runnable_kernels().front();
}

Matrix make_matrix(int code, int arithmetic, int64_t num_rows,
                   int64_t num_columns, int64_t num_panels, int64_t group_columns, Address values,
                   int scale_kind, Address scales, int zero_kind, bool zeros_are_minima,
                   Address zeros, Address row_scale, Address bias, int rounding,
                   bool rounds_per_expert, Address input_scale, int super_shift,
                   Address super_scales, Address super_minima, Address permutation,
                   const std::vector<float>& levels) {
  if (levels.size() > 16) throw nb::value_error("16 levels at most");
  Matrix m{};
  m.code = (Code)code;
  m.arithmetic = (Arithmetic)arithmetic;
  m.num_rows = num_rows;
  m.num_columns = num_columns;
  m.num_panels = num_panels;
  const int codes = codes_per_word(m.code);
  m.num_words = (num_columns + codes - 1) / codes;
  m.group_words = group_columns ? group_columns / codes : m.num_words;
  m.num_groups = (m.num_words + m.group_words - 1) / m.group_words;
  m.scale_kind = (Kind)scale_kind;
  m.zero_kind = (Kind)zero_kind;
  m.is_grouped = m.arithmetic == Arithmetic::INT8 || m.scale_kind != Kind::NONE;
  m.zeros_are_minima = zeros_are_minima;
  m.values = at<uint8_t>(values);
  m.scales = at<uint8_t>(scales);
  m.zeros = at<uint8_t>(zeros);
  m.row_scale = at<float>(row_scale);
  m.bias = at<float>(bias);
  m.rounding = (Rounding)rounding;
  m.rounds_per_expert = rounds_per_expert;
  m.input_scale = at<float>(input_scale);
  m.super_shift = super_shift;
  m.num_supers = (m.num_groups + (1 << super_shift) - 1) >> super_shift;
  m.super_scales = at<uint8_t>(super_scales);
  m.super_minima = at<uint8_t>(super_minima);
  m.permutation = at<int32_t>(permutation);
  std::copy(levels.begin(), levels.end(), m.levels);
  const auto size = [](Kind kind) {
    return kind == Kind::F32 ? 4 : kind == Kind::F16 || kind == Kind::BF16 || kind == Kind::I16 ? 2 : 1;
  };
  m.values_stride = num_panels * m.num_words * kWordBytes;
  m.scales_stride = num_panels * m.num_groups * kPanel * size(m.scale_kind);
  m.zeros_stride = num_panels * m.num_groups * kPanel * size(m.zero_kind);
  return m;
}

Layer make_layer(const Matrix& gate_up, const Matrix& down, bool is_gated, int function,
                 int limit_on, float alpha, float limit, float up_offset, float gate_softcap,
                 float up_softcap, int post_norm, float epsilon, Address post_norm_weight,
                 int64_t num_experts) {
  Layer layer{};
  layer.gate_up = gate_up;
  layer.down = down;
  layer.is_gated = is_gated;
  layer.activation = {(Function)function, (LimitOn)limit_on, alpha, limit, up_offset, gate_softcap, up_softcap};
  layer.post_norm = (PostNorm)post_norm;
  layer.epsilon = epsilon;
  layer.post_norm_weight = at<float>(post_norm_weight);
  layer.num_experts = num_experts;
  layer.hidden_size = down.num_rows;
  layer.intermediate_size = down.num_columns;
  // Whole groups of the down projection, and whole quads of panels of the first one.
  const int64_t group = down.is_grouped ? down.group_words * codes_per_word(down.code) : kPanel;
  layer.unit_columns = std::lcm(group, (int64_t)kQuad * kPanel);
  const int64_t whole = (layer.intermediate_size + kPanel - 1) / kPanel * kPanel;
  if (layer.unit_columns > whole) layer.unit_columns = whole;
  return layer;
}

// One matrix by itself: what prepares its rows is its own layout.
Layer make_linear(const Matrix& matrix) {
  Layer layer{};
  layer.gate_up = matrix;
  layer.down = matrix;
  layer.num_experts = 1;
  layer.hidden_size = matrix.num_rows;
  layer.intermediate_size = matrix.num_columns;
  layer.unit_columns = kPanel;
  return layer;
}

Input make_input(Address x, int x_dtype, Address ids, Address weights, Address out,
                 int64_t num_tokens, int64_t top_k, bool weight_on_input, bool reduce,
                 Address adapter_ids = 0, const Adapters* adapters = nullptr) {
  return {(const void*)x, (Dtype)x_dtype, at<int32_t>(ids), at<float>(weights), (void*)out,
          num_tokens,     top_k,          weight_on_input,  reduce, at<int32_t>(adapter_ids), adapters};
}

// Three parts of every adapter: gate, up, down. A part is its rank, then address, dtype and stride of A
// and of B; rank 0 and nothing else where there is none.
Adapters make_adapters(const std::vector<std::vector<int64_t>>& parts) {
  Adapters adapters{};
  const auto part_at = [&](size_t n) -> LowRank {
    const std::vector<int64_t>& p = parts[n];
    if (p.size() != 7) return {};
    adapters.rank_stride = std::max(adapters.rank_stride, (p[0] + kPanel - 1) / kPanel * kPanel);
    return {p[0], {(const void*)p[1], (Dtype)p[2], p[3]}, {(const void*)p[4], (Dtype)p[5], p[6]}};
  };
  for (size_t n = 0; n + 3 <= parts.size(); n += 3) {
    Adapter a{part_at(n), part_at(n + 1), part_at(n + 2), false};
    a.shares_a = a.gate.rank && a.up.rank && a.gate.a.values == a.up.a.values;
    adapters.all.push_back(a);
  }
  return adapters;
}

// Weights are packed for the arithmetic of a path; on another that may be missing.
void check_arithmetic(const Layer& layer) {
  const bool needs_bf16 = layer.gate_up.arithmetic == Arithmetic::BF16 ||
                          layer.down.arithmetic == Arithmetic::BF16;
  if (needs_bf16 && !current_kernels().has_bf16)
    throw nb::value_error("weights packed for bf16 products must run on a path that has them");
  const auto may_have_int8_min = [](const Matrix& m) {
    return m.rounding == Rounding::INT8 && m.arithmetic == Arithmetic::INT8 && m.code == Code::U8;
  };
  if (!current_kernels().takes_int8_min &&
      (may_have_int8_min(layer.gate_up) || may_have_int8_min(layer.down)))
    throw nb::value_error("weights packed for activations of -128 must run on a path that takes them");
}

// Shapes and strides as in `Attention`.
void attention(Address q, Address k, Address v, Address out, int dtype, Address mask,
               const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, float scale,
               int num_threads) {
  if (sizes.size() != 6 || strides.size() != 8) throw nb::value_error("six sizes, eight strides");
  Attention a{};
  a.q = (const void*)q;
  a.k = (const void*)k;
  a.v = (const void*)v;
  a.out = (void*)out;
  a.dtype = (Dtype)dtype;
  a.mask = at<float>(mask);
  a.num_sequences = sizes[0];
  a.num_heads = sizes[1];
  a.num_key_heads = sizes[2];
  a.num_keys = sizes[3];
  a.head_size = sizes[4];
  a.value_size = sizes[5];
  for (int i = 0; i < 3; ++i) {
    a.k_strides[i] = strides[i];
    a.v_strides[i] = strides[3 + i];
  }
  a.mask_strides[0] = strides[6];
  a.mask_strides[1] = strides[7];
  a.scale = scale;
  nb::gil_scoped_release release;
  run_attention(current_kernels(), a, num_threads);
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Probe {
  const Kernels* kernels;
  const uint8_t* from;
  int64_t bytes, slice;
  int streams;
  Arithmetic arithmetic;
  int64_t iterations;
  std::atomic<uint64_t> sink{0};
};

// Seconds that `num_threads` take to read a buffer once, each in slices of its own.
double time_read(Address from, int64_t bytes, int64_t slice, int streams, int num_threads) {
  Probe probe{&current_kernels(), at<uint8_t>(from), bytes, slice, streams, Arithmetic::F32, 0};
  const auto start = std::chrono::steady_clock::now();
  run_team(num_threads, [](void* context, Team& team, int member) {
    Probe& p = *(Probe*)context;
    uint64_t sum = 0;
    const int64_t count = p.bytes / p.slice;
    for (int64_t n; (n = team.take(0, member, count)) < count;)
      sum += p.kernels->read(p.from + n * p.slice, p.slice, p.streams);
    p.sink += sum;
  }, &probe);
  return seconds_since(start);
}

// Operations per second of products in registers.
double time_spin(int arithmetic, int64_t iterations, int num_threads) {
  Probe probe{&current_kernels(), nullptr, 0, 0, 0, (Arithmetic)arithmetic, iterations};
  const auto start = std::chrono::steady_clock::now();
  int size = 0;
  struct Both { Probe* probe; int* size; } both{&probe, &size};
  run_team(num_threads, [](void* context, Team& team, int member) {
    Both& b = *(Both*)context;
    if (member == 0) *b.size = team.size();
    b.probe->kernels->spin(b.probe->arithmetic, b.probe->iterations);
  }, &both);
  const double seconds = seconds_since(start);
  return (double)probe.kernels->spin_operations((Arithmetic)arithmetic) * iterations * size / seconds;
}

// Tables as in `Replicas`.
bool place(Address ids, Address out, int64_t num_tokens, int64_t top_k, Address slots, Address ends,
           Address counts, Address is_recording, int64_t num_experts, int64_t num_slots, double shift,
           double stride) {
  const Replicas replicas{at<int32_t>(slots), at<double>(ends), (int64_t*)counts, num_experts,
                          num_slots,          shift,            stride,           *at<int64_t>(is_recording)};
  return choose_replicas(replicas, at<int32_t>(ids), (int32_t*)out, num_tokens, top_k);
}

}  // namespace

NB_MODULE(_cpu, m) {
  nb::class_<Matrix>(m, "Matrix")
      .def_ro("num_words", &Matrix::num_words)
      .def_ro("num_groups", &Matrix::num_groups)
      .def_ro("num_panels", &Matrix::num_panels);
  nb::class_<Layer>(m, "Layer").def_ro("unit_columns", &Layer::unit_columns);

  m.def("matrix", &make_matrix);
  nb::class_<Adapters>(m, "Adapters");
  m.def("layer", &make_layer);
  m.def("adapters", &make_adapters);
  m.def("linear", &make_linear);

  m.def("run_experts",
        [](const Layer& layer, Address x, int x_dtype, Address ids, Address weights, Address out,
           int64_t num_tokens, int64_t top_k, bool weight_on_input, bool reduce, Address adapter_ids,
           const Adapters& adapters, int num_threads) {
          check_arithmetic(layer);
          nb::gil_scoped_release release;
          return run_experts(current_kernels(), layer,
                             make_input(x, x_dtype, ids, weights, out, num_tokens, top_k,
                                        weight_on_input, reduce, adapter_ids, &adapters),
                             num_threads);
        });
  m.def("run_linear", [](const Layer& layer, Address x, int x_dtype, Address out,
                         int64_t num_tokens, int num_threads) {
    check_arithmetic(layer);
    nb::gil_scoped_release release;
    run_linear(current_kernels(), layer,
               make_input(x, x_dtype, 0, 0, out, num_tokens, 1, false, true), num_threads);
  });

  m.def("run_row_linear", [](Address x, int x_dtype, Address weight, int weight_dtype, Address bias,
                             Address out, int64_t num_tokens, int64_t num_rows,
                             int64_t num_columns, int num_threads) {
    Gate map{};
    map.x = (const void*)x;
    map.x_dtype = (Dtype)x_dtype;
    map.weight = (const void*)weight;
    map.weight_dtype = (Dtype)weight_dtype;
    map.bias = at<float>(bias);
    map.logits = (float*)out;
    map.num_tokens = num_tokens;
    map.num_rows = num_rows;
    map.hidden_size = num_columns;
    nb::gil_scoped_release release;
    run_row_linear(current_kernels(), map, num_threads);
  });

  m.def("place", &place);
  m.def("attention", &attention);

  bind_routing(m, &current_kernels);

  m.def("flags", &cpu_flags);
  m.def("runnable", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : runnable_kernels()) names.push_back(kernels->name);
    return names;
  });
  m.def("current", [] { return std::string(current_kernels().name); });
  m.def("has_bf16", [] { return current_kernels().has_bf16; });
  m.def("takes_int8_min", [] { return current_kernels().takes_int8_min; });
  m.def("choose", [](const std::string& name) { current = &kernels_named(name); });
  m.def("threads", [] { return team_threads() == Threads::OPENMP ? "openmp" : "pool"; });
  m.def("choose_threads", [](const std::string& name) {
    return choose_threads(name == "openmp" ? Threads::OPENMP : Threads::POOL);
  });
  m.def("num_short_teams", &num_short_teams);
  m.def("time_read", &time_read, nb::call_guard<nb::gil_scoped_release>());
  m.def("time_spin", &time_spin, nb::call_guard<nb::gil_scoped_release>());
}
