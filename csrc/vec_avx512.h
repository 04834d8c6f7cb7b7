// 16 lanes as AVX-512 has them. The same functions as vec_avx2.h and vec_portable.h.
#pragma once

#include <immintrin.h>

namespace {

using F = __m512;   // 16 floats
using I = __m512i;  // 16 int32
using V = __m512i;  // 64 bytes

FN F f_zero() { return _mm512_setzero_ps(); }
FN F f_set(float x) { return _mm512_set1_ps(x); }
FN F f_load(const float* p) { return _mm512_loadu_ps(p); }
FN void f_store(float* p, F a) { _mm512_storeu_ps(p, a); }
FN F f_add(F a, F b) { return _mm512_add_ps(a, b); }
FN F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
FN F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
FN F f_div(F a, F b) { return _mm512_div_ps(a, b); }
FN F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
FN F f_nfma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
// Where b is NaN, so is the result.
FN F f_min(F a, F b) { return _mm512_min_ps(a, b); }
FN F f_max(F a, F b) { return _mm512_max_ps(a, b); }
FN F f_abs(F a) { return _mm512_abs_ps(a); }
FN F f_round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// a < b ? c : d
FN F f_select_less(F a, F b, F c, F d) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), d, c);
}
FN float f_sum(F a) { return _mm512_reduce_add_ps(a); }

FN I i_zero() { return _mm512_setzero_si512(); }
FN I i_set(int32_t x) { return _mm512_set1_epi32(x); }
FN I i_load(const void* p) { return _mm512_loadu_si512(p); }
FN void i_store(void* p, I a) { _mm512_storeu_si512(p, a); }
FN I i_add(I a, I b) { return _mm512_add_epi32(a, b); }
FN I i_max(I a, I b) { return _mm512_max_epi32(a, b); }
FN I i_and(I a, I b) { return _mm512_and_si512(a, b); }
FN I i_or(I a, I b) { return _mm512_or_si512(a, b); }
FN I i_xor(I a, I b) { return _mm512_xor_si512(a, b); }
FN I i_sub(I a, I b) { return _mm512_sub_epi32(a, b); }
template <int N> FN I i_shl(I a) { return _mm512_slli_epi32(a, N); }
template <int N> FN I i_shr(I a) { return _mm512_srli_epi32(a, N); }
FN int32_t i_max_lane(I a) { return _mm512_reduce_max_epi32(a); }
FN int32_t i_sum(I a) { return _mm512_reduce_add_epi32(a); }
FN F to_float(I a) { return _mm512_cvtepi32_ps(a); }
FN I to_int(F a) { return _mm512_cvtps_epi32(a); }
FN F as_float(I a) { return _mm512_castsi512_ps(a); }
FN I as_int(F a) { return _mm512_castps_si512(a); }

// 16 elements, widened.
FN I i_load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
FN I i_load_u16(const void* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
FN I i_load_i16(const void* p) {
  return _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
FN F f_load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
FN void store_f16(void* p, F a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
FN void store_u16(void* p, I a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(a)); }
FN void store_i8(void* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }
// The low halves of 16 words as halves.
FN F f16_low(V a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }

// table[the low 4 bits of every lane]
FN F f_lookup(const float* table, I a) { return _mm512_permutexvar_ps(a, f_load(table)); }

FN V v_load(const void* p) { return _mm512_loadu_si512(p); }
FN void v_store(void* p, V a) { _mm512_storeu_si512(p, a); }
FN V v_bcast(const uint32_t* p) { return _mm512_set1_epi32((int)*p); }
FN V v_low_nibbles(V a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
FN V v_high_nibbles(V a) {
  return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15));
}
// table[low 4 bits of every byte], for bytes below 16
FN V v_sub8(V x, int8_t y) { return _mm512_sub_epi8(x, _mm512_set1_epi8(y)); }
FN V v_lookup(const uint8_t* table, V a) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), a);
}
// acc + sum over 4 bytes of unsigned w * signed x
//
// The intrinsic's change of vector type makes GCC copy every accumulator twice in each step.
FN I dot_int8(I acc, V w, V x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  return acc;
}
constexpr int kU8Zero = 128;

#if defined(__AVX512BF16__)
#define MIXTURA_BF16 1
FN F dot_bf16(F acc, V w, V x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
#endif

// Row blocks that fit 32 registers: rows x panels of accumulators.
constexpr int kDenseRows = 6, kGroupedRows = 6;
template <bool GROUPED, int MR> constexpr int panels_beside() { return !GROUPED || MR <= 3 ? 4 : 2; }

}  // namespace
