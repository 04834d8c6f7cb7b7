// 16 lanes as two registers of AVX2 with FMA and F16C. The same functions as vec_avx512.h.
#pragma once

#include <immintrin.h>

namespace {

struct F { __m256 a, b; };
struct I { __m256i a, b; };
using V = I;

FN F f_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
FN F f_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
FN F f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
FN void f_store(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
FN F f_add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
FN F f_sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
FN F f_mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
FN F f_div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
FN F f_fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
FN F f_nfma(F x, F y, F z) {
  return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
FN F f_min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
FN F f_max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
FN F f_abs(F x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
FN F f_round(F x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
FN F f_select_less(F x, F y, F c, F d) {
  return {_mm256_blendv_ps(d.a, c.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(d.b, c.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}

FN I i_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
FN I i_set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
FN I i_load(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
FN void i_store(void* p, I x) {
  _mm256_storeu_si256((__m256i*)p, x.a);
  _mm256_storeu_si256((__m256i*)p + 1, x.b);
}
FN I i_add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
FN I i_sub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
FN I i_max(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
FN I i_and(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
FN I i_or(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
FN I i_xor(I x, I y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
template <int N> FN I i_shl(I x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
template <int N> FN I i_shr(I x) { return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)}; }
FN F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
FN I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
FN F as_float(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
FN I as_int(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
FN float f_sum(F x) {
  // The order of AVX-512's reduction: halves onto each other.
  __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}
FN int32_t i_sum(I x) {
  alignas(32) int32_t lane[16];
  i_store(lane, x);
  int32_t sum = 0;
  for (int n = 0; n < 16; ++n) sum += lane[n];
  return sum;
}
FN int32_t i_max_lane(I x) {
  alignas(32) int32_t lane[16];
  i_store(lane, x);
  int32_t top = lane[0];
  for (int n = 1; n < 16; ++n) top = lane[n] > top ? lane[n] : top;
  return top;
}

FN I i_load_u8(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
FN I i_load_u16(const void* p) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + 1))};
}
FN I i_load_i16(const void* p) {
  return {_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p + 1))};
}
FN F f_load_f16(const void* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
FN void store_f16(void* p, F x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)p + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
// 16 words below 2 ** 16 as halves, in order.
FN __m256i low_halves(I x) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
}
FN void store_u16(void* p, I x) { _mm256_storeu_si256((__m256i*)p, low_halves(x)); }
FN void store_i8(void* p, I x) {
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(halves),
                                                _mm256_extracti128_si256(halves, 1)));
}
FN F f16_low(V x) {
  const __m256i halves = low_halves(i_and(x, i_set(0xffff)));
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}

FN __m256 lookup_half(const float* table, __m256i x) {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), x),
                          _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), x),
                          _mm256_castsi256_ps(_mm256_slli_epi32(x, 28)));
}
FN F f_lookup(const float* table, I x) { return {lookup_half(table, x.a), lookup_half(table, x.b)}; }

FN V v_load(const void* p) { return i_load(p); }
FN void v_store(void* p, V x) { i_store(p, x); }
FN V v_bcast(const uint32_t* p) {
  const __m256i x = _mm256_set1_epi32((int)*p);
  return {x, x};
}
FN V v_low_nibbles(V x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
FN V v_high_nibbles(V x) {
  return v_low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)});
}
FN V v_lookup(const uint8_t* table, V x) {
  const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  return {_mm256_shuffle_epi8(t, x.a), _mm256_shuffle_epi8(t, x.b)};
}

#if defined(__AVXVNNI__)
FN I dot_int8(I acc, V w, V x) {
  return {_mm256_dpbusd_avx_epi32(acc.a, w.a, x.a), _mm256_dpbusd_avx_epi32(acc.b, w.b, x.b)};
}
constexpr int kU8Zero = 128;
#else
// 16-bit sums of two products must not saturate: |w| <= 128 and |x| <= 127 are safe, 255 is not.
// So codes of 8 bits arrive signed, |w| is multiplied, and x takes its sign.
FN __m256i dot_half(__m256i acc, __m256i w, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
FN I dot_int8(I acc, V w, V x) { return {dot_half(acc.a, w.a, x.a), dot_half(acc.b, w.b, x.b)}; }
constexpr int kU8Zero = 0;
#endif

// Row blocks that fit 16 registers.
constexpr int kDenseRows = 6, kGroupedRows = 3;
template <bool GROUPED, int MR> constexpr int panels_beside() {
  return MR == 1 || (!GROUPED && MR <= 2) ? 2 : 1;
}

}  // namespace
