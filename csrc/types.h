// What passes between the files of this folder: matrices, layers, and the table of one instruction
// set's kernels.
//
// Sizes: T tokens, K slots of a token, N = T * K slots, L experts, H hidden size, I intermediate
// size. A *panel* is 16 outputs of a matrix. A *word* is 32 bits of one output's codes; a panel is
// stored word by word, 16 outputs beside each other: 64 bytes a word. Four panels, a *quad*, share
// their words, one panel's after the other's: 256 bytes a word, so that a stack is one stream.
//
// This header is included by translation units of every instruction set, so that it may hold no
// function with external linkage: the linker would keep one copy, perhaps one too modern.
#pragma once

#include <cstdint>

namespace mixtura {

constexpr int kPanel = 16;       // outputs in a panel
constexpr int kWordBytes = 64;   // of one word of all outputs of a panel
constexpr int kQuad = 4;         // panels that share their words
constexpr int kQuadBytes = kQuad * kWordBytes;
// Rows that a task multiplies before it goes on with the next ones, of blocks and of tiles.
constexpr int kRowChunk = 96, kTileRowChunk = 256;

// How a code becomes a level. The values are those of `_CODES` in mixtura/kernels/cpu/panels.py.
enum class Code : int { F32, F16, BF16, U8, U4, E2M1, E4M3, CODEBOOK };

// The element type of scales and zero points.
enum class Kind : int { NONE, F32, F16, BF16, E8M0, E4M3, U8, I16, I8 };

// The arithmetic of the products, and so the form of activations.
enum class Arithmetic : int { F32, BF16, INT8 };

// What a file wants inputs rounded to, with a scale that it holds: the codes of that grid are multiplied,
// and the products by the scale. `round_activations` of mixtura/quant/activations.py is the meaning.
enum class Rounding : int { NONE, INT8, E4M3 };

// The element type of the caller's rows.
enum class Dtype : int { F32, F16, BF16 };

static inline int codes_per_word(Code code) {
  switch (code) {
    case Code::F32: return 1;
    case Code::F16:
    case Code::BF16: return 2;
    case Code::U8:
    case Code::E4M3: return 4;
    default: return 8;
  }
}

// Activations in 32 bits of a row.
static inline int lanes_per_word(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::F32 ? 1 : arithmetic == Arithmetic::BF16 ? 2 : 4;
}

// Words of a row that one word of codes meets. Lane j of the s-th of them holds activation
// `s + subs * j` of the `codes_per_word` ones.
static inline int subs_per_word(Code code, Arithmetic arithmetic) {
  return codes_per_word(code) / lanes_per_word(arithmetic);
}

// A stack of L matrices (num_rows, num_columns) in panels.
struct Matrix {
  Code code;
  Arithmetic arithmetic;
  int64_t num_rows, num_columns;
  int64_t num_panels;              // a multiple of 4
  int64_t num_words;               // of one output
  int64_t group_words;             // words that share scales; num_words without groups
  int64_t num_groups;
  bool is_grouped;                 // products are added up group by group
  bool zeros_are_minima;           // q * scale - zero, not (q - zero) * scale
  Kind scale_kind, zero_kind;
  const uint8_t* values;           // [L][quad][word][panel of the quad][16] words
  const uint8_t* scales;           // [L][panel][group][16]
  const uint8_t* zeros;            // [L][panel][group][16]
  // fp16 numbers that scales and minima multiply, of 2 ** super_shift groups: [L][panel][super][16];
  // null where there are none.
  const uint8_t *super_scales, *super_minima;
  int super_shift;
  int64_t num_supers;
  const float* row_scale;          // [L][panel][16] or null
  const float* bias;               // [L][panel][16] or null
  Rounding rounding;               // of the rows
  bool rounds_per_expert;          // input scales differ
  const float* input_scale;        // [L], 0: the expert's rows are not rounded; null without rounding
  const int32_t* permutation;      // [L][column]: the activation that a column meets; null: its own
  float levels[16];                // of CODEBOOK
  int64_t values_stride, scales_stride, zeros_stride;  // bytes of one expert
};

// Word 0 of a panel of one expert.
static inline const uint8_t* panel_at(const Matrix& m, int64_t expert, int64_t panel) {
  return m.values + expert * m.values_stride + panel / kQuad * m.num_words * kQuadBytes +
         panel % kQuad * kWordBytes;
}

// A prepared row: `num_words * subs` words of activations; for grouped matrices then a scale and a
// correction for every group.
struct RowLayout {
  int64_t num_words, scales_at, corrections_at, stride;  // in 32-bit words
};

static inline RowLayout row_layout(const Matrix& m) {
  RowLayout r;
  r.num_words = m.num_words * subs_per_word(m.code, m.arithmetic);
  r.scales_at = r.num_words;
  r.corrections_at = r.scales_at + (m.is_grouped ? m.num_groups : 0);
  r.stride = (r.corrections_at + (m.is_grouped ? m.num_groups : 0) + 15) / 16 * 16;
  return r;
}

// Words of a row where rows are read as tiles: with a tile's zeros behind it, scales and corrections.
static inline int64_t tile_row_words(const Matrix& m) {
  return row_layout(m).num_words + 16 + (m.is_grouped ? 2 * m.num_groups : 0);
}

enum class Function : int { SILU, GELU, GELU_TANH, RELU, RELU2, SIGMOID, TANH, IDENTITY };
enum class LimitOn : int { GATE, ACTIVATED };
enum class PostNorm : int { NONE, RMS, RMS_SCALE_FIRST };

struct Activation {
  Function function;
  LimitOn limit_on;
  float alpha, limit, up_offset, gate_softcap, up_softcap;  // limit and caps: 0 is none
};

// The experts of a layer. Gated: panels of `gate_up` alternate, 16 gates, 16 ups.
struct Layer {
  Matrix gate_up, down;
  Activation activation;
  bool is_gated;
  PostNorm post_norm;
  float epsilon;
  const float* post_norm_weight;  // (H)
  int64_t num_experts, hidden_size, intermediate_size;
  int64_t unit_columns;           // of the hidden layer that one task computes
};

// A or B of an adapter's part, [L][rank][stride]: the columns of A, or the outputs of B, of one rank
// beside each other, and zeros behind them up to a multiple of 16.
struct Factor {
  const void* values;
  Dtype dtype;
  int64_t stride;
};

// y += B (A x). Rank 0: nothing.
struct LowRank {
  int64_t rank;
  Factor a, b;
};

struct Adapter {
  LowRank gate, up, down;  // ungated experts: `up` is of their first projection
  bool shares_a;           // gate and up have one A
};

// One call, and where its rows are while it runs.
struct Call {
  const Layer* layer;
  const void* x;                 // (T, H)
  Dtype x_dtype;
  const int32_t* ids;            // (T, K)
  const float* weights;          // (T, K)
  void* out;                     // (T, H) as x_dtype, or (T, K, H) fp32
  int64_t num_tokens, top_k;
  bool weight_on_input, reduce;
  // Rows are rounded for their expert, and then multiplied by weights on the input; or in its order.
  bool has_row_per_slot;
  // Sorted by expert: sorted row r is slot `slots[r]`; expert e has rows offsets[e] .. offsets[e+1].
  const int32_t* slots;
  const int32_t* offsets;
  const int32_t* position;       // of a slot among the sorted rows; -1 without expert
  // (T, row_layout(gate_up).stride); where each slot has its own (N, ..), sorted by expert.
  uint32_t* rows;
  uint32_t* hidden;              // (N, row_layout(down).stride)
  float* y;                      // (N, down.num_panels * 16)
  const Adapter* adapters;       // null: no row has one
  const int32_t* adapter_ids;    // (T), -1: none
  int64_t rank_stride, num_units;
  float* shrunk;                 // (N, 2, rank_stride): A x of gate and of up
  float* shrunk_hidden;          // (N, num_units, rank_stride): of down, a unit's part of the sum
};

// Memory of one thread, 64-byte aligned.
struct Scratch {
  float* c;            // row_chunk * scratch_columns
  uint8_t* unpacked;   // kUnpackedBytes
  float *row, *permuted;  // one row in fp32, padded
  float *added, *shrunk;  // what adapters add to a unit's gates and ups, and A x of one row
  uint32_t* tile_rows; // kTileRowChunk rows of tile_row_words
  // Whose rows are to be multiplied, and whose are in `tile_rows`: a number for each set of rows.
  int64_t rows_of, tiles_of;
};

constexpr int64_t kUnpackedBytes = 64 * 1024;

// How a router logit becomes a score.
enum class Score : int { SOFTMAX, SIGMOID, SQRT_SOFTPLUS, LOGIT, SPARSEMIXER };

// The gate's product of a call: logits (T, E) = x (T, H) times weight (E, H).
struct Gate {
  const void* x;
  Dtype x_dtype;
  const void* weight;  // null: the logits are given
  Dtype weight_dtype;
  const float* bias;   // (E) or null
  float* logits;
  int64_t num_tokens, num_rows, hidden_size;
  bool in_bf16;        // products of bf16, else of fp32
  int64_t padded;      // elements of a prepared row
};

constexpr int kGateTaskTokens = 64;  // at most, a multiple of 4

// Some tokens, prepared rows `x_stride` bytes apart, times some rows of the gate.
struct GateTask {
  const uint8_t* x;
  int64_t x_stride, first_token, num_tokens, first_row, num_rows;
};

struct Attention;

struct Kernels {
  const char* name;
  bool has_bf16;                      // products of bf16
  bool takes_int8_min;                // int8 activations may be -128 beside codes of 8 bits
  int row_chunk;                      // kRowChunk or kTileRowChunk
  void (*prepare)(const Call&, int64_t token, Scratch&);
  void (*shrink_row)(const Call&, int64_t row, Scratch&);
  void (*gate_up)(const Call&, int64_t expert, int64_t unit, Scratch&);
  void (*down)(const Call&, int64_t expert, int64_t first_panel, int64_t num_panels, Scratch&);
  void (*combine)(const Call&, int64_t token, Scratch&);
  // One matrix without experts around it: rows through `down`, then out of y.
  void (*finish_linear)(const Call&, int64_t token, Scratch&);
  uint64_t (*read)(const uint8_t* from, int64_t bytes, int streams);
  void (*spin)(Arithmetic, int64_t iterations);  // 16 chains of products in registers
  int64_t (*spin_operations)(Arithmetic);        // of one iteration
  void (*prepare_gate)(const Gate&, int64_t token, uint8_t* row);
  void (*gate)(const Gate&, const GateTask&);
  void (*score)(Score, const float* logits, float* scores, int64_t n);
  void (*soft_cap_logits)(const float* logits, float* capped, int64_t n, float cap);
  void (*attend)(const Attention&, int64_t sequence, int64_t key_head, int64_t chunk, float* memory);
  void (*join_chunks)(const Attention&, int64_t sequence, int64_t head);
};

}  // namespace mixtura
