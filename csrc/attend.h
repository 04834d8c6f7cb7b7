// One task of attention.h: a chunk of keys and values, and the heads that share them.
#pragma once

#include "attention.h"

namespace {

FN int element_size(Dtype dtype) { return dtype == Dtype::F32 ? 4 : 2; }

// Products of KEYS keys, `stride` elements apart, with one query in fp32.
template <int KEYS>
FN void score_keys(const float* q, const Attention& a, const void* k, int64_t at, float* scores) {
  F sum[KEYS];
#pragma GCC unroll 4
  for (int n = 0; n < KEYS; ++n) sum[n] = f_zero();
  for (int64_t i = 0; i < a.head_size; i += kPanel) {
    const F x = f_load(q + i);
#pragma GCC unroll 4
    for (int n = 0; n < KEYS; ++n)
      sum[n] = f_fma(x, load_x(a.dtype, k, at + n * a.k_strides[2] + i), sum[n]);
  }
#pragma GCC unroll 4
  for (int n = 0; n < KEYS; ++n) scores[n] = f_sum(sum[n]);
}

// out[0 .. 16 * PANELS] = sum over keys of weight * value.
template <int PANELS>
FN void add_values(const Attention& a, const float* weights, int64_t count, int64_t at, float* out) {
  F sum[PANELS];
#pragma GCC unroll 8
  for (int n = 0; n < PANELS; ++n) sum[n] = f_zero();
  for (int64_t key = 0; key < count; ++key, at += a.v_strides[2]) {
    const F weight = f_set(weights[key]);
#pragma GCC unroll 8
    for (int n = 0; n < PANELS; ++n)
      sum[n] = f_fma(weight, load_x(a.dtype, a.v, at + n * kPanel), sum[n]);
  }
#pragma GCC unroll 8
  for (int n = 0; n < PANELS; ++n) f_store(out + n * kPanel, sum[n]);
}

// exp(score - top) in place of `count` scores, zeros up to a multiple of 16. Returns their sum.
static float exponentiate(float* scores, int64_t count, float top) {
  F sum = f_zero();
  for (int64_t i = count; i % kPanel; ++i) scores[i] = -__builtin_inff();
  for (int64_t i = 0; i < count; i += kPanel) {
    const F x = f_load(scores + i);
    // The smallest exponential is not zero, and that of what is masked must be.
    const F e = f_select_less(x, f_set(-3e38f), f_zero(), f_exp(f_sub(x, f_set(top))));
    f_store(scores + i, e);
    sum = f_add(sum, e);
  }
  return f_sum(sum);
}

static void attend(const Attention& a, int64_t sequence, int64_t key_head, int64_t chunk,
                   float* memory) {
  const int64_t sharing = a.num_heads / a.num_key_heads, first = chunk * kKeyChunk;
  const int64_t left = a.num_keys - first, count = left < kKeyChunk ? left : kKeyChunk;
  const int64_t k_at = sequence * a.k_strides[0] + key_head * a.k_strides[1] + first * a.k_strides[2];
  const int64_t v_at = sequence * a.v_strides[0] + key_head * a.v_strides[1] + first * a.v_strides[2];
  float* scores = memory + sharing * a.head_size;
  for (int64_t n = 0; n < sharing; ++n) {
    const int64_t head = key_head * sharing + n;
    float* q = memory + n * a.head_size;
    const int64_t q_at = (sequence * a.num_heads + head) * a.head_size;
    for (int64_t i = 0; i < a.head_size; i += kPanel)
      f_store(q + i, f_mul(load_x(a.dtype, a.q, q_at + i), f_set(a.scale)));
    int64_t key = 0;
    for (; key + 4 <= count; key += 4)
      score_keys<4>(q, a, a.k, k_at + key * a.k_strides[2], scores + key);
    for (; key < count; ++key) score_keys<1>(q, a, a.k, k_at + key * a.k_strides[2], scores + key);
    float top = -__builtin_inff();
    const float* mask =
        a.mask ? a.mask + sequence * a.mask_strides[0] + head * a.mask_strides[1] + first : nullptr;
    for (key = 0; key < count; ++key) {
      if (mask) scores[key] += mask[key];
      // A NaN stays: it is no number that is smaller.
      top = scores[key] <= top ? top : scores[key];
    }
    float* part = a.part(sequence, head, chunk);
    part[0] = top;
    part[1] = exponentiate(scores, count, top);
    float* out = part + 16;
    int64_t i = 0;
    for (; i + 8 * kPanel <= a.value_size; i += 8 * kPanel)
      add_values<8>(a, scores, count, v_at + i, out + i);
    for (; i + 4 * kPanel <= a.value_size; i += 4 * kPanel)
      add_values<4>(a, scores, count, v_at + i, out + i);
    for (; i < a.value_size; i += kPanel) add_values<1>(a, scores, count, v_at + i, out + i);
  }
}

// The chunks of a head, weighed by their maxima, in order.
static void join_chunks(const Attention& a, int64_t sequence, int64_t head) {
  const int64_t chunks = a.num_chunks();
  float top = -__builtin_inff();
  for (int64_t c = 0; c < chunks; ++c) {
    const float other = a.part(sequence, head, c)[0];
    top = other <= top ? top : other;
  }
  float* total = a.part(sequence, head, 0);
  float sum = 0.0f;
  for (int64_t c = 0; c < chunks; ++c) {
    const float* part = a.part(sequence, head, c);
    alignas(64) float factor[kPanel];
    f_store(factor, f_exp(f_set(part[0] - top)));
    // All keys of a chunk masked: it counts for nothing.
    const float weight = part[0] == -__builtin_inff() ? 0.0f : factor[0];
    sum += weight * part[1];
    for (int64_t i = 0; i < a.value_size; i += kPanel) {
      const F value = f_mul(f_load(part + 16 + i), f_set(weight));
      f_store(total + 16 + i, c == 0 ? value : f_add(value, f_load(total + 16 + i)));
    }
  }
  const F inverse = f_set(sum == 0.0f ? 0.0f : 1.0f / sum);
  const int64_t at = (sequence * a.num_heads + head) * a.value_size;
  for (int64_t i = 0; i < a.value_size; i += kPanel)
    store_x(a.dtype, a.out, at + i, f_mul(f_load(total + 16 + i), inverse));
}

}  // namespace
