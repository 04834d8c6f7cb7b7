// 16 lanes in plain C++, which compilers turn into what the target has. The same functions as
// vec_avx512.h.
#pragma once

#include <cmath>
#include <cstring>

namespace {

struct F { float v[16]; };
struct I { int32_t v[16]; };
using V = I;

#define EACH for (int n = 0; n < 16; ++n)

FN F f_set(float x) { F r; EACH r.v[n] = x; return r; }
FN F f_zero() { return f_set(0.0f); }
FN F f_load(const float* p) { F r; EACH r.v[n] = p[n]; return r; }
FN void f_store(float* p, F x) { EACH p[n] = x.v[n]; }
FN F f_add(F x, F y) { EACH x.v[n] += y.v[n]; return x; }
FN F f_sub(F x, F y) { EACH x.v[n] -= y.v[n]; return x; }
FN F f_mul(F x, F y) { EACH x.v[n] *= y.v[n]; return x; }
FN F f_div(F x, F y) { EACH x.v[n] /= y.v[n]; return x; }
FN F f_fma(F x, F y, F z) { EACH z.v[n] += x.v[n] * y.v[n]; return z; }
FN F f_nfma(F x, F y, F z) { EACH z.v[n] -= x.v[n] * y.v[n]; return z; }
FN F f_min(F x, F y) { EACH y.v[n] = x.v[n] < y.v[n] ? x.v[n] : y.v[n]; return y; }
FN F f_max(F x, F y) { EACH y.v[n] = x.v[n] > y.v[n] ? x.v[n] : y.v[n]; return y; }
FN F f_abs(F x) { EACH x.v[n] = __builtin_fabsf(x.v[n]); return x; }
FN F f_round(F x) {
  // Exact below 2 ** 22, which is all that is asked for; ties to even.
  constexpr float magic = 12582912.0f;
  EACH { volatile float t = x.v[n] + magic; x.v[n] = t - magic; }
  return x;
}
FN F f_select_less(F x, F y, F c, F d) { EACH d.v[n] = x.v[n] < y.v[n] ? c.v[n] : d.v[n]; return d; }
FN float f_sum(F x) {
  for (int half = 8; half; half /= 2)
    for (int n = 0; n < half; ++n) x.v[n] += x.v[n + half];
  return x.v[0];
}

FN I i_set(int32_t x) { I r; EACH r.v[n] = x; return r; }
FN I i_zero() { return i_set(0); }
FN I i_load(const void* p) { I r; memcpy(r.v, p, 64); return r; }
FN void i_store(void* p, I x) { memcpy(p, x.v, 64); }
FN I i_add(I x, I y) { EACH x.v[n] = (int32_t)((uint32_t)x.v[n] + (uint32_t)y.v[n]); return x; }
FN I i_sub(I x, I y) { EACH x.v[n] = (int32_t)((uint32_t)x.v[n] - (uint32_t)y.v[n]); return x; }
FN I i_max(I x, I y) { EACH x.v[n] = x.v[n] > y.v[n] ? x.v[n] : y.v[n]; return x; }
FN I i_and(I x, I y) { EACH x.v[n] &= y.v[n]; return x; }
FN I i_or(I x, I y) { EACH x.v[n] |= y.v[n]; return x; }
FN I i_xor(I x, I y) { EACH x.v[n] ^= y.v[n]; return x; }
template <int N> FN I i_shl(I x) { EACH x.v[n] = (int32_t)((uint32_t)x.v[n] << N); return x; }
template <int N> FN I i_shr(I x) { EACH x.v[n] = (int32_t)((uint32_t)x.v[n] >> N); return x; }
FN int32_t i_sum(I x) { int32_t s = 0; EACH s += x.v[n]; return s; }
FN int32_t i_max_lane(I x) { int32_t s = x.v[0]; EACH s = x.v[n] > s ? x.v[n] : s; return s; }
FN F to_float(I x) { F r; EACH r.v[n] = (float)x.v[n]; return r; }
FN I to_int(F x) {
  x = f_round(x);
  I r;
  EACH r.v[n] = x.v[n] > -2147483648.0f && x.v[n] < 2147483648.0f ? (int32_t)x.v[n] : INT32_MIN;
  return r;
}
FN F as_float(I x) { F r; memcpy(r.v, x.v, 64); return r; }
FN I as_int(F x) { I r; memcpy(r.v, x.v, 64); return r; }

FN float half_to_float(uint32_t h) {
  // Exponent and mantissa into place, then scaled: exact, subnormal halves included.
  const uint32_t bits = (h & 0x7fff) << 13;
  float x;
  memcpy(&x, &bits, 4);
  uint32_t scale_bits = 0x77800000;  // 2 ** 112
  float scale;
  memcpy(&scale, &scale_bits, 4);
  x = (h & 0x7c00) == 0x7c00 ? x : x * scale;
  uint32_t out;
  memcpy(&out, &x, 4);
  if ((h & 0x7c00) == 0x7c00) out = 0x7f800000 | (h & 0x3ff) << 13;
  out |= (h & 0x8000) << 16;
  memcpy(&x, &out, 4);
  return x;
}
FN uint32_t float_to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and above
  if (bits < 0x38800000) {                       // below 2 ** -14: subnormal
    float a;
    memcpy(&a, &bits, 4);
    a += 0.5f;  // units of 2 ** -24 are the last bits of [0.5, 1)
    memcpy(&bits, &a, 4);
    return sign | (bits - 0x3f000000);
  }
  bits += 0xfff + (bits >> 13 & 1);
  return sign | (bits - 0x38000000) >> 13;
}

FN I i_load_u8(const uint8_t* p) { I r; EACH r.v[n] = p[n]; return r; }
FN I i_load_u16(const void* p) {
  uint16_t h[16];
  memcpy(h, p, 32);
  I r;
  EACH r.v[n] = h[n];
  return r;
}
FN I i_load_i16(const void* p) {
  int16_t h[16];
  memcpy(h, p, 32);
  I r;
  EACH r.v[n] = h[n];
  return r;
}
FN F f_load_f16(const void* p) {
  uint16_t h[16];
  memcpy(h, p, 32);
  F r;
  EACH r.v[n] = half_to_float(h[n]);
  return r;
}
FN void store_f16(void* p, F x) {
  uint16_t h[16];
  EACH h[n] = (uint16_t)float_to_half(x.v[n]);
  memcpy(p, h, 32);
}
FN void store_u16(void* p, I x) {
  uint16_t h[16];
  EACH h[n] = (uint16_t)x.v[n];
  memcpy(p, h, 32);
}
FN void store_i8(void* p, I x) {
  int8_t h[16];
  EACH h[n] = (int8_t)x.v[n];
  memcpy(p, h, 16);
}
FN F f16_low(V x) { F r; EACH r.v[n] = half_to_float((uint32_t)x.v[n] & 0xffff); return r; }

FN F f_lookup(const float* table, I x) { F r; EACH r.v[n] = table[x.v[n] & 15]; return r; }

FN V v_load(const void* p) { return i_load(p); }
FN void v_store(void* p, V x) { i_store(p, x); }
FN V v_bcast(const uint32_t* p) { return i_set((int32_t)*p); }
FN V v_low_nibbles(V x) { return i_and(x, i_set(0x0f0f0f0f)); }
FN V v_high_nibbles(V x) { return i_and(i_shr<4>(x), i_set(0x0f0f0f0f)); }
FN V v_lookup(const uint8_t* table, V x) {
  uint8_t bytes[64];
  memcpy(bytes, x.v, 64);
  for (int n = 0; n < 64; ++n) bytes[n] = table[bytes[n] & 15];
  memcpy(x.v, bytes, 64);
  return x;
}
FN I dot_int8(I acc, V w, V x) {
  EACH {
    const uint32_t a = (uint32_t)w.v[n], b = (uint32_t)x.v[n];
    acc.v[n] += (int32_t)(a & 255) * (int8_t)b + (int32_t)(a >> 8 & 255) * (int8_t)(b >> 8) +
                (int32_t)(a >> 16 & 255) * (int8_t)(b >> 16) + (int32_t)(a >> 24) * (int8_t)(b >> 24);
  }
  return acc;
}
constexpr int kU8Zero = 128;

constexpr int kDenseRows = 4, kGroupedRows = 2;
template <bool GROUPED, int MR> constexpr int panels_beside() { return 1; }

}  // namespace
