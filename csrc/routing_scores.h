// Scores of logits: mixtura/routing/pipeline.py, `score` and `transform_logits`.
//
// In double and rounded once, half a unit in the last place of fp32. Plain loops without
// contraction: every instruction set gives the same bits, whatever stands beside an element.
#pragma once

namespace {

// exp(x) for x <= 0, to 1e-12; 0 where fp32 has no number for it. NaN stays.
FN double exp_below_zero(double x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2 ** 52: the low bits become an integer
  const double held = x < -104.0 ? -104.0 : x;
  const double shifted = held * 1.4426950408889634 + kRound;
  const double n = shifted - kRound;
  const double r = held - n * 0.69314718055994531;
  double p = 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  uint64_t bits;
  __builtin_memcpy(&bits, &shifted, 8);
  bits = (bits + 1023) << 52;
  double power;
  __builtin_memcpy(&power, &bits, 8);
  p *= power;
  return x < -103.97208 ? 0.0 : p;  // 2 ** -150
}

FN double absolute(double x) { return x < 0 ? -x : x; }

FN float sigmoid_of(float x) {
  const double e = exp_below_zero(-absolute(x));
  return (float)((x < 0 ? e : 1.0) / (1.0 + e));
}

// log(1 + e) for e in [0, 1]: twice the inverse hyperbolic tangent of e / (2 + e), to 1e-11.
FN double log_one_plus(double e) {
  const double z = e / (2.0 + e), s = z * z;
  double p = 1.0 / 19;
  p = p * s + 1.0 / 17;
  p = p * s + 1.0 / 15;
  p = p * s + 1.0 / 13;
  p = p * s + 1.0 / 11;
  p = p * s + 1.0 / 9;
  p = p * s + 1.0 / 7;
  p = p * s + 1.0 / 5;
  p = p * s + 1.0 / 3;
  p = p * s + 1.0;
  return 2.0 * z * p;
}

FN float sqrt_softplus_of(float x) {
  const double e = exp_below_zero(-absolute(x));
  return (float)__builtin_sqrt((x < 0 ? 0.0 : (double)x) + log_one_plus(e));
}

FN float tanh_of(float x) {
  const double a = absolute(x), s = a * a, e = exp_below_zero(-2.0 * a);
  const double near_zero = a * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15)));
  const double t = a < 0.015625 ? near_zero : (1.0 - e) / (1.0 + e);
  return (float)(x < 0 ? -t : t);
}

static void softmax(const float* x, float* out, int64_t n) {
  constexpr int kLanes = 8;
  float tops[kLanes];
  for (int i = 0; i < kLanes; ++i) tops[i] = -__builtin_inff();
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t at = 0; at < whole; at += kLanes)
    for (int i = 0; i < kLanes; ++i) tops[i] = x[at + i] > tops[i] ? x[at + i] : tops[i];
  for (int64_t at = whole; at < n; ++at) tops[0] = x[at] > tops[0] ? x[at] : tops[0];
  for (int i = 1; i < kLanes; ++i) tops[0] = tops[i] > tops[0] ? tops[i] : tops[0];
  const double top = tops[0];
  double sums[kLanes] = {};
  for (int64_t at = 0; at < whole; at += kLanes)
    for (int i = 0; i < kLanes; ++i) {
      const double e = exp_below_zero((double)x[at + i] - top);
      sums[i] += e;
      out[at + i] = (float)e;
    }
  for (int64_t at = whole; at < n; ++at) {
    const double e = exp_below_zero((double)x[at] - top);
    sums[0] += e;
    out[at] = (float)e;
  }
  for (int i = 1; i < kLanes; ++i) sums[0] += sums[i];
  const double inverse = 1.0 / sums[0];
  for (int64_t at = 0; at < n; ++at) out[at] = (float)(out[at] * inverse);
}

static void score(Score function, const float* x, float* out, int64_t n) {
  switch (function) {
    case Score::SOFTMAX: softmax(x, out, n); return;
    case Score::SIGMOID:
      for (int64_t i = 0; i < n; ++i) out[i] = sigmoid_of(x[i]);
      return;
    case Score::SQRT_SOFTPLUS:
      for (int64_t i = 0; i < n; ++i) out[i] = sqrt_softplus_of(x[i]);
      return;
    default:
      for (int64_t i = 0; i < n; ++i) out[i] = x[i];
  }
}

static void soft_cap_logits(const float* x, float* out, int64_t n, float cap) {
  for (int64_t i = 0; i < n; ++i) out[i] = tanh_of(x[i] / cap) * cap;
}

}  // namespace
