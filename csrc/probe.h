// The machine's limits, as these instructions see them.
#pragma once

namespace {

static uint64_t read_streams(const uint8_t* from, int64_t bytes, int streams) {
  const int64_t each = bytes / streams / kWordBytes * kWordBytes;
  I sum[4] = {i_zero(), i_zero(), i_zero(), i_zero()};
  for (int64_t at = 0; at < each; at += kWordBytes)
    for (int s = 0; s < streams; ++s) {
      const uint8_t* p = from + s * each + at;
      __builtin_prefetch(p + kAhead);
      sum[s & 3] = i_xor(sum[s & 3], v_load(p));
    }
  return (uint64_t)(uint32_t)i_sum(i_xor(i_xor(sum[0], sum[1]), i_xor(sum[2], sum[3])));
}

constexpr int kChains = 12;

template <class Op> static void spin_op(int64_t iterations) {
  typename Op::Acc t[kChains];
  for (int i = 0; i < kChains; ++i) __builtin_memset(&t[i], 0, sizeof t[i]);
  alignas(64) uint32_t words[32] = {};
  asm volatile("" : : "r"(words) : "memory");  // for all the compiler knows, they are no zeros
  const V w = v_load(words), x = v_load(words + 16);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) t[i] = Op::dot(t[i], w, x);
  }
  for (int i = 0; i < kChains; ++i) {
    __builtin_memcpy(words, &t[i], 64);
    asm volatile("" : : "r"(words) : "memory");
  }
}

#if defined(MIXTURA_TILES) && !defined(MIXTURA_EMULATE_AMX)
constexpr int kTileChains = 4;

template <Arithmetic A> static void spin_tiles(int64_t iterations) {
  shape_tiles_for(kTileRows, kTileWords, false);
  for (int64_t n = 0; n < iterations; ++n) {
    dot_tiles<A, 0, 4, 6>();
    dot_tiles<A, 1, 4, 7>();
    dot_tiles<A, 2, 5, 6>();
    dot_tiles<A, 3, 5, 7>();
  }
  release_tiles();
}

static void spin(Arithmetic arithmetic, int64_t iterations) {
  if (arithmetic == Arithmetic::BF16) return spin_tiles<Arithmetic::BF16>(iterations);
  if (arithmetic == Arithmetic::INT8) return spin_tiles<Arithmetic::INT8>(iterations);
  spin_op<Raw<Arithmetic::F32>>(iterations);
}

static int64_t spin_operations(Arithmetic arithmetic) {
  if (arithmetic == Arithmetic::F32) return 2 * kChains * kPanel;
  return 2 * kTileChains * kTileRows * kPanel * kTileWords * lanes_per_word(arithmetic);
}
#else
static void spin(Arithmetic arithmetic, int64_t iterations) {
#if MIXTURA_BF16
  if (arithmetic == Arithmetic::BF16) return spin_op<Raw<Arithmetic::BF16>>(iterations);
#endif
  if (arithmetic == Arithmetic::INT8) return spin_op<Raw<Arithmetic::INT8>>(iterations);
  spin_op<Raw<Arithmetic::F32>>(iterations);
}

static int64_t spin_operations(Arithmetic arithmetic) {
  return 2 * kChains * kPanel * lanes_per_word(arithmetic);
}
#endif

}  // namespace
