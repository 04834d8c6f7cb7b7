// The innermost products: a few rows times a few panels, in registers.
//
//   c[m][n] (+)= sum over words of dot(decode(values[n][word]), rows[m][word])
//
// A row's sum is made in one order whatever rows are beside it, so that results do not depend on
// the batch.
#pragma once

namespace {

// What the int8 products multiply in place of an e2m1 level: 2 * level + kE2M1Zero. In order of
// the codes 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives.
constexpr int kE2M1Zero = 12;
alignas(16) constexpr uint8_t kE2M1Bytes[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                                12, 11, 10, 9,  8,  6,  4,  0};

// The same for signed products: 2 * level.
alignas(16) constexpr uint8_t kE2M1Signed[16] = {0, 1,   2,   3,   4,   6,   8,   12,
                                                 0, 255, 254, 253, 252, 250, 248, 244};

FN int kind_size(Kind kind) {
  switch (kind) {
    case Kind::F32: return 4;
    case Kind::F16:
    case Kind::BF16:
    case Kind::I16: return 2;
    default: return 1;
  }
}

// Bytes of e4m3 in 16 words -> floats. As halves they are 2 ** -8 of themselves, subnormals too.
FN F e4m3_to_float(I bytes) {
  const I halves = i_or(i_shl<7>(i_and(bytes, i_set(0x7f))), i_shl<8>(i_and(bytes, i_set(0x80))));
  return f_mul(f16_low(halves), f_set(256.0f));
}

FN F load_kind(Kind kind, const uint8_t* p) {
  switch (kind) {
    case Kind::F32: return f_load((const float*)p);
    case Kind::F16: return f_load_f16(p);
    case Kind::BF16: return as_float(i_shl<16>(i_load_u16(p)));
    case Kind::E8M0: return as_float(i_shl<23>(i_load_u8(p)));
    case Kind::E4M3: return e4m3_to_float(i_load_u8(p));
    case Kind::U8: return to_float(i_load_u8(p));
    case Kind::I16: return to_float(i_load_i16(p));
    case Kind::I8: return f_sub(to_float(i_xor(i_load_u8(p), i_set(128))), f_set(128.0f));
    default: return f_set(1.0f);
  }
}

// How words are read. `SUBS` words of a row meet one word of codes.
template <Arithmetic A> struct Raw;  // values that are already what the products take

template <> struct Raw<Arithmetic::F32> {
  using Acc = F;
  static constexpr Arithmetic ARITHMETIC = Arithmetic::F32;
  static constexpr int SUBS = 1;
  static FN V decode(V raw, int) { return raw; }
  static FN F dot(F acc, V w, V x) { return f_fma(as_float(w), as_float(x), acc); }
};

template <> struct Raw<Arithmetic::INT8> {
  using Acc = I;
  static constexpr Arithmetic ARITHMETIC = Arithmetic::INT8;
  static constexpr int SUBS = 1;
  static FN V decode(V raw, int) { return raw; }
  static FN I dot(I acc, V w, V x) { return dot_int8(acc, w, x); }
};

#if MIXTURA_BF16
template <> struct Raw<Arithmetic::BF16> {
  using Acc = F;
  static constexpr Arithmetic ARITHMETIC = Arithmetic::BF16;
  static constexpr int SUBS = 1;
  static FN V decode(V raw, int) { return raw; }
  static FN F dot(F acc, V w, V x) { return dot_bf16(acc, w, x); }
};
#endif

FN F total(F sum) { return sum; }

#if defined(MIXTURA_TILES)
// Pairs of bf16 in the order in which a tile adds them up: in every 16 words the first of all pairs and
// the second of all pairs apart, then both, then to the total; denormals are zeros (`NoDenormals`).
struct TileOrder {
  struct Acc { F even, odd; };
  static constexpr Arithmetic ARITHMETIC = Arithmetic::BF16;
  static constexpr int SUBS = 1;
  static FN V decode(V raw, int) { return raw; }
  static FN F first(V pairs) { return as_float(i_shl<16>(pairs)); }
  static FN F second(V pairs) { return as_float(i_and(pairs, i_set((int32_t)0xffff0000))); }
  static FN Acc dot(Acc acc, V w, V x) {
    return {f_fma(first(w), first(x), acc.even), f_fma(second(w), second(x), acc.odd)};
  }
};

FN F total(TileOrder::Acc sum) { return f_add(sum.even, sum.odd); }

// Denormals count as zeros while one of these lives, as in tiles.
class NoDenormals {
 public:
  NoDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~NoDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};
#endif

template <Code C> struct Int8 : Raw<Arithmetic::INT8> {
  static constexpr int SUBS = C == Code::U8 ? 1 : 2;
  static FN V decode(V raw, int sub) {
    if constexpr (C == Code::U8)
      return kU8Zero == 0 ? i_xor(raw, i_set((int32_t)0x80808080)) : raw;
    const V nibbles = sub == 0 ? v_low_nibbles(raw) : v_high_nibbles(raw);
    return C == Code::U4 ? nibbles : v_lookup(kE2M1Bytes, nibbles);
  }
};

template <Code C> struct Widened : Raw<Arithmetic::F32> {
  static constexpr int SUBS = 2;
  static FN V decode(V raw, int sub) {
    if constexpr (C == Code::BF16)
      return sub == 0 ? i_shl<16>(raw) : i_and(raw, i_set((int32_t)0xffff0000));
    return as_int(f16_low(sub == 0 ? raw : i_shr<16>(raw)));
  }
};

struct Block {
  const uint32_t* const* rows;        // as prepared
  const uint8_t* values;              // of word 0 of the first panel
  int64_t panel_stride, word_stride;  // bytes; STREAM: those of a quad
  int64_t first_word, last_word;
  int64_t group_words;
  int64_t scales_at, corrections_at;  // in a row
  const uint8_t *scales, *zeros;      // of group 0 of the first panel
  int64_t scales_stride, zeros_stride;
  const uint8_t *super_scales, *super_minima;  // of the first panel, or null
  int64_t super_stride;
  int super_shift;
  Kind scale_kind, zero_kind;
  bool zeros_are_minima;
  int32_t signed_by;                  // what has been subtracted from 8-bit codes with zero points
  float* c;
  int64_t c_stride;
  bool accumulate;
  const uint8_t* prefetch;            // read ahead from here,
  int64_t prefetch_step;              // this many bytes further for every word,
  int64_t prefetch_lane;              // STREAM: so far apart for the panels beside each other
};

// STREAM: words of quads, as they are in memory. CHUNK: words that are in the first-level cache.
enum class Mode { STREAM, CHUNK };

constexpr int64_t kAhead = 4096;  // bytes that are fetched ahead of a stream; measured, 2048 to 8192

template <class Op, int MR, int NR, Mode MODE>
FN void run_words(typename Op::Acc (&t)[MR][NR], const uint32_t* const (&x)[MR], const Block& k,
                  int64_t first, int64_t last) {
  const int64_t word_stride = MODE == Mode::STREAM ? kQuadBytes : k.word_stride;
  const int64_t panel_stride = MODE == Mode::STREAM ? kWordBytes : k.panel_stride;
  const uint8_t* b = k.values + first * word_stride;
  const uint8_t* fetch = k.prefetch + (first - k.first_word) * k.prefetch_step;
  for (int64_t word = first; word < last; ++word, b += word_stride) {
    V raw[NR];
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) {
      raw[n] = v_load(b + n * panel_stride);
      if constexpr (MODE == Mode::STREAM) __builtin_prefetch(fetch + n * k.prefetch_lane);
    }
    if constexpr (MODE == Mode::CHUNK) __builtin_prefetch(fetch, 0, 2);
    fetch += k.prefetch_step;
#pragma GCC unroll 8
    for (int s = 0; s < Op::SUBS; ++s) {
      V w[NR];
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) w[n] = Op::decode(raw[n], s);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const V value = v_bcast(x[m] + word * Op::SUBS + s);
#pragma GCC unroll 8
        for (int n = 0; n < NR; ++n) t[m][n] = Op::dot(t[m][n], w[n], value);
      }
    }
  }
}

FN float float_at(const uint32_t* row, int64_t index) {
  float x;
  __builtin_memcpy(&x, row + index, 4);
  return x;
}

// On to the panels behind the first `count` ones, with all that groups have.
FN void skip_panels(Block& k, int64_t count) {
  k.scales += count * k.scales_stride;
  if (k.zeros) k.zeros += count * k.zeros_stride;
  if (k.super_scales) k.super_scales += count * k.super_stride;
  if (k.super_minima) k.super_minima += count * k.super_stride;
}

// A group's numbers of panel n, times those of its super-block if there are any.
FN F grid_at(Kind kind, const uint8_t* grid, int64_t stride, const uint8_t* supers, const Block& k,
             int n, int64_t group) {
  const F x = load_kind(kind, grid + n * stride + group * kPanel * kind_size(kind));
  if (supers == nullptr) return x;
  return f_mul(x, f_load_f16(supers + n * k.super_stride + (group >> k.super_shift) * kPanel * 2));
}

FN F scale_at(const Block& k, int n, int64_t group) {
  return grid_at(k.scale_kind, k.scales, k.scales_stride, k.super_scales, k, n, group);
}

FN F zero_at(const Block& k, int n, int64_t group) {
  return grid_at(k.zero_kind, k.zeros, k.zeros_stride, k.super_minima, k, n, group);
}

// Adds a group's sums to the totals, scaled.
template <class Op, int MR, int NR>
FN void add_group(F (&acc)[MR][NR], const typename Op::Acc (&t)[MR][NR],
                  const uint32_t* const (&x)[MR], const Block& k, int64_t group) {
  constexpr bool is_int = Op::ARITHMETIC == Arithmetic::INT8;
  const bool has_scales = k.scale_kind != Kind::NONE, has_zeros = k.zeros != nullptr;
  F scale[NR], zero[NR];
#pragma GCC unroll 8
  for (int n = 0; n < NR; ++n) {
    scale[n] = scale_at(k, n, group);
    zero[n] = has_zeros ? zero_at(k, n, group) : f_zero();
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    const F row_scale = f_set(is_int ? float_at(x[m], k.scales_at + group) : 1.0f);
    const F correction = f_set(has_zeros ? float_at(x[m], k.corrections_at + group) : 0.0f);
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) {
      F sum;
      if constexpr (is_int) sum = to_float(t[m][n]);
      else sum = total(t[m][n]);
      if (is_int && has_zeros && !k.zeros_are_minima) sum = f_nfma(zero[n], correction, sum);
      F factor = row_scale;
      if (has_scales) factor = is_int ? f_mul(scale[n], row_scale) : scale[n];
      acc[m][n] = f_fma(sum, factor, acc[m][n]);
      if (has_zeros && k.zeros_are_minima)
        acc[m][n] = f_nfma(zero[n], f_mul(correction, row_scale), acc[m][n]);
    }
  }
}

// Where a group's int8 sum begins. A row's correction is -zero * sum(x) as an integer; for a matrix
// with zero points of its own it is sum(x) as a float, and codes that arrive signed are 128 short.
FN I first_sum(const Block& k, const uint32_t* row, int64_t group) {
  if (k.zeros == nullptr) return i_set((int32_t)row[k.corrections_at + group]);
  if (k.signed_by == 0) return i_zero();
  return i_set(k.signed_by * (int32_t)float_at(row, k.corrections_at + group));
}

template <class Op, int MR, int NR, bool GROUPED, Mode MODE> void block(const Block& k) {
  const uint32_t* x[MR];
  F acc[MR][NR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    x[m] = k.rows[m];
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n)
      acc[m][n] = k.accumulate ? f_load(k.c + m * k.c_stride + n * kPanel) : f_zero();
  }
  if constexpr (!GROUPED) {
    run_words<Op, MR, NR, MODE>(acc, x, k, k.first_word, k.last_word);
  } else {
    int64_t group = k.first_word / k.group_words;
    for (int64_t word = k.first_word; word < k.last_word; ++group) {
      const int64_t limit = (group + 1) * k.group_words;
      const int64_t end = limit < k.last_word ? limit : k.last_word;
      typename Op::Acc t[MR][NR];
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < NR; ++n) {
          if constexpr (Op::ARITHMETIC == Arithmetic::INT8)
            t[m][n] = first_sum(k, x[m], group);
          else
            t[m][n] = typename Op::Acc{};
        }
      }
      run_words<Op, MR, NR, MODE>(t, x, k, word, end);
      add_group<Op, MR, NR>(acc, t, x, k, group);
      word = end;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) f_store(k.c + m * k.c_stride + n * kPanel, acc[m][n]);
  }
}

using BlockFn = void (*)(const Block&);

// The blocks of 1 .. 6 rows: with as many panels as registers hold, and with at most two.
struct Blocks {
  BlockFn wide[6], narrow[6];
  int panels[6];
};

template <class Op, bool GROUPED, Mode MODE, int MR>
constexpr void add_block(Blocks& blocks) {
  constexpr int most = GROUPED ? kGroupedRows : kDenseRows;
  if constexpr (MR <= most) {
    constexpr int beside = panels_beside<GROUPED, MR>();
    blocks.wide[MR - 1] = &block<Op, MR, beside, GROUPED, MODE>;
    blocks.narrow[MR - 1] = &block<Op, MR, (beside < 2 ? beside : 2), GROUPED, MODE>;
    blocks.panels[MR - 1] = beside;
  }
}

template <class Op, bool GROUPED, Mode MODE> constexpr Blocks make_blocks() {
  Blocks blocks{};
  add_block<Op, GROUPED, MODE, 1>(blocks);
  add_block<Op, GROUPED, MODE, 2>(blocks);
  add_block<Op, GROUPED, MODE, 3>(blocks);
  add_block<Op, GROUPED, MODE, 4>(blocks);
  add_block<Op, GROUPED, MODE, 5>(blocks);
  add_block<Op, GROUPED, MODE, 6>(blocks);
  return blocks;
}

template <class Op, bool GROUPED, Mode MODE>
constexpr Blocks kBlocks = make_blocks<Op, GROUPED, MODE>();

#if defined(MIXTURA_TILES)
constexpr int kTileOrderRows = 2;  // of an expert at most: one pass over a quad; measured, 2 to 8

constexpr Blocks kTileOrderBlocks = [] {
  Blocks blocks{};
  blocks.wide[0] = blocks.narrow[0] = &block<TileOrder, 1, kQuad, true, Mode::STREAM>;
  blocks.wide[1] = blocks.narrow[1] = &block<TileOrder, 2, kQuad, true, Mode::STREAM>;
  blocks.panels[0] = blocks.panels[1] = kQuad;
  return blocks;
}();
#endif

// Blocks that read codes straight from memory; null where there are none, and codes are unpacked.
static const Blocks* streaming_blocks(const Matrix& m) {
  if (m.arithmetic == Arithmetic::INT8) {
    switch (m.code) {
      case Code::U8: return &kBlocks<Int8<Code::U8>, true, Mode::STREAM>;
      case Code::U4: return &kBlocks<Int8<Code::U4>, true, Mode::STREAM>;
      case Code::E2M1: return &kBlocks<Int8<Code::E2M1>, true, Mode::STREAM>;
      default: return nullptr;
    }
  }
  if (m.is_grouped) return nullptr;
#if MIXTURA_BF16
  if (m.arithmetic == Arithmetic::BF16 && m.code == Code::BF16)
    return &kBlocks<Raw<Arithmetic::BF16>, false, Mode::STREAM>;
#endif
  if (m.arithmetic == Arithmetic::F32) {
    switch (m.code) {
      case Code::F32: return &kBlocks<Raw<Arithmetic::F32>, false, Mode::STREAM>;
      case Code::F16: return &kBlocks<Widened<Code::F16>, false, Mode::STREAM>;
      case Code::BF16: return &kBlocks<Widened<Code::BF16>, false, Mode::STREAM>;
      default: return nullptr;
    }
  }
  return nullptr;
}

static const Blocks& chunk_blocks(const Matrix& m) {
  if (m.arithmetic == Arithmetic::INT8) return kBlocks<Raw<Arithmetic::INT8>, true, Mode::CHUNK>;
#if MIXTURA_BF16
  if (m.arithmetic == Arithmetic::BF16)
    return m.is_grouped ? kBlocks<Raw<Arithmetic::BF16>, true, Mode::CHUNK>
                        : kBlocks<Raw<Arithmetic::BF16>, false, Mode::CHUNK>;
#endif
  return m.is_grouped ? kBlocks<Raw<Arithmetic::F32>, true, Mode::CHUNK>
                      : kBlocks<Raw<Arithmetic::F32>, false, Mode::CHUNK>;
}

}  // namespace
