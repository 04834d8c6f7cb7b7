// The gate's products: rows of the weight as the model stores them, row-major, without packing.
//
//   logits[t][e] = sum over h of x[t][h] * weight[e][h] + bias[e]
//
// A pair's sum is made in 16 lanes, in one order whatever rows are beside it, so that a token's
// logits do not depend on the batch.
#pragma once

namespace {

// Steps along a row: `LANES` elements, 16 sums. `x` is a prepared row.
template <Dtype W> struct GateF32 {
  static constexpr int LANES = 16, SIZE = W == Dtype::F32 ? 4 : 2;
  using X = F;
  static FN F load_x(const uint8_t* row, int64_t at) { return f_load((const float*)row + at); }
  static FN F load_w(const uint8_t* p) {
    if constexpr (W == Dtype::F32) return f_load((const float*)p);
    else if constexpr (W == Dtype::F16) return f_load_f16(p);
    else return as_float(i_shl<16>(i_load_u16(p)));
  }
  static FN F dot(F acc, F w, F x) { return f_fma(w, x, acc); }
};

#if MIXTURA_BF16
struct GateBf16 {
  static constexpr int LANES = 32, SIZE = 2;
  using X = V;
  static FN V load_x(const uint8_t* row, int64_t at) { return v_load(row + 2 * at); }
  static FN V load_w(const uint8_t* p) { return v_load(p); }
  static FN F dot(F acc, V w, V x) { return dot_bf16(acc, w, x); }
};
#endif

// Blocks that fit the registers, tokens x rows of the weight.
#if defined(__AVX512F__)
constexpr int kGateTokens = 4, kGateRows = 4;
#elif defined(__AVX2__)
constexpr int kGateTokens = 2, kGateRows = 2;
#else
constexpr int kGateTokens = 1, kGateRows = 2;
#endif
constexpr int kGateStreams = 4;  // rows at a time for a single token

// Elements of a row that are multiplied with all tokens before the next: they stay in the cache.
constexpr int64_t kGateChunk = 1024;

// Tokens x[0 .. MR - 1] times rows w[0 .. NR - 1], elements first .. last - 1. Unfinished sums are
// kept in `state`; at the end of the rows they go to `sums[m * NR + n]`.
template <class Op, int MR, int NR>
static void gate_block(const uint8_t* const* x, const uint8_t* const* w, int64_t first,
                       int64_t last, int64_t hidden_size, float* state, float* sums) {
  F acc[MR][NR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) acc[m][n] = first ? f_load(state + (m * NR + n) * 16) : f_zero();
  const int64_t whole = last / Op::LANES * Op::LANES;
  for (int64_t h = first; h < whole; h += Op::LANES) {
    typename Op::X row[NR];
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) {
      const uint8_t* p = w[n] + h * Op::SIZE;
      row[n] = Op::load_w(p);
      __builtin_prefetch(p + kAhead);
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const typename Op::X value = Op::load_x(x[m], h);
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) acc[m][n] = Op::dot(acc[m][n], row[n], value);
    }
  }
  if (last < hidden_size) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) f_store(state + (m * NR + n) * 16, acc[m][n]);
    return;
  }
  if (whole < hidden_size) {
    typename Op::X row[NR];
    for (int n = 0; n < NR; ++n) {
      alignas(64) uint8_t rest[64] = {};
      __builtin_memcpy(rest, w[n] + whole * Op::SIZE, (hidden_size - whole) * Op::SIZE);
      row[n] = Op::load_w(rest);
    }
    for (int m = 0; m < MR; ++m) {
      const typename Op::X value = Op::load_x(x[m], whole);
      for (int n = 0; n < NR; ++n) acc[m][n] = Op::dot(acc[m][n], row[n], value);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) sums[m * NR + n] = f_sum(acc[m][n]);
}

// The rows of a task are NR streams, each a piece of the weight without gaps, so that what is
// fetched ahead at the end of a row is the beginning of the next. Where there are fewer tokens than
// MR or rows than NR, the last one fills up.
template <class Op, int MR, int NR>
static void gate_tiles(const Gate& gate, const GateTask& task) {
  const int64_t stream = (task.num_rows + NR - 1) / NR, stride = gate.hidden_size * Op::SIZE;
  const uint8_t* weight = (const uint8_t*)gate.weight + task.first_row * stride;
  const int64_t chunk = task.num_tokens > MR ? kGateChunk : gate.hidden_size;
  alignas(64) float state[kGateTaskTokens * NR * 16];
  alignas(64) float sums[MR * NR];
  for (int64_t e = 0; e < stream; ++e) {
    const uint8_t* w[NR];
    for (int n = 0; n < NR; ++n) {
      const int64_t row = n * stream + e;
      w[n] = weight + (row < task.num_rows ? row : task.num_rows - 1) * stride;
    }
    for (int64_t first = 0; first < gate.hidden_size; first += chunk) {
      const int64_t left = gate.hidden_size - first, last = first + (left < chunk ? left : chunk);
      for (int64_t t = 0; t < task.num_tokens; t += MR) {
        const int num_tokens = (int)(task.num_tokens - t < MR ? task.num_tokens - t : MR);
        const uint8_t* x[MR];
        for (int m = 0; m < MR; ++m)
          x[m] = task.x + (t + (m < num_tokens ? m : num_tokens - 1)) * task.x_stride;
        gate_block<Op, MR, NR>(x, w, first, last, gate.hidden_size, state + t * NR * 16, sums);
        if (last < gate.hidden_size) continue;
        for (int m = 0; m < num_tokens; ++m) {
          float* logits = gate.logits + (task.first_token + t + m) * gate.num_rows + task.first_row;
          for (int64_t n = 0, row = e; n < NR && row < task.num_rows; ++n, row += stream)
            logits[row] = sums[m * NR + n] + (gate.bias ? gate.bias[task.first_row + row] : 0.0f);
        }
      }
    }
  }
}

template <class Op> static void gate_op(const Gate& gate, const GateTask& task) {
  if (task.num_tokens == 1) return gate_tiles<Op, 1, kGateStreams>(gate, task);
  if constexpr (kGateTokens > 2)
    if (task.num_tokens == 2) return gate_tiles<Op, 2, kGateRows>(gate, task);
  gate_tiles<Op, kGateTokens, kGateRows>(gate, task);
}

static void gate(const Gate& gate, const GateTask& task) {
#if MIXTURA_BF16
  if (gate.in_bf16) return gate_op<GateBf16>(gate, task);
#endif
  switch (gate.weight_dtype) {
    case Dtype::F32: return gate_op<GateF32<Dtype::F32>>(gate, task);
    case Dtype::F16: return gate_op<GateF32<Dtype::F16>>(gate, task);
    default: return gate_op<GateF32<Dtype::BF16>>(gate, task);
  }
}

// A token's row as the products take it: fp32 or bf16, zeros up to `gate.padded` elements.
static void prepare_gate(const Gate& gate, int64_t token, uint8_t* row) {
  const int64_t n = gate.hidden_size;
  if (!gate.in_bf16) {
    read_row(gate.x_dtype, gate.x, token * n, n, (float*)row);
    return;
  }
  __builtin_memcpy(row, (const uint8_t*)gate.x + token * n * 2, n * 2);
  __builtin_memset(row + n * 2, 0, (gate.padded - n) * 2);
}

}  // namespace
