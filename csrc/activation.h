// The expert's activation on 16 lanes: mixtura/kernels/reference/activation.py, in fp32.
#pragma once

namespace {

// exp(x), relative error below 2e-7; 1e-38 and 3e38 are the ends. Range reduction by ln 2 in two
// parts, then the Taylor polynomial on [-0.35, 0.35].
FN F f_exp(F x) {
  x = f_min(f_set(88.3762626647949f), f_max(f_set(-87.3365447504019f), x));
  const F n = f_round(f_mul(x, f_set(1.44269504088896341f)));
  F r = f_nfma(n, f_set(0.693359375f), x);
  r = f_nfma(n, f_set(-2.12194440e-4f), r);
  F p = f_set(1.9841270e-4f);
  p = f_fma(p, r, f_set(1.3888889e-3f));
  p = f_fma(p, r, f_set(8.3333333e-3f));
  p = f_fma(p, r, f_set(4.1666667e-2f));
  p = f_fma(p, r, f_set(1.6666667e-1f));
  p = f_fma(p, r, f_set(0.5f));
  p = f_fma(p, f_mul(r, r), f_add(r, f_set(1.0f)));
  return f_mul(p, as_float(i_shl<23>(i_add(to_int(n), i_set(127)))));
}

FN F f_sigmoid(F x) {
  return f_div(f_set(1.0f), f_add(f_set(1.0f), f_exp(f_sub(f_zero(), x))));
}

// Near zero a polynomial, so that the relative error stays small (source: Cephes tanhf).
FN F f_tanh(F x) {
  const F z = f_mul(x, x);
  F p = f_set(-5.70498872745e-3f);
  p = f_fma(p, z, f_set(2.06390887954e-2f));
  p = f_fma(p, z, f_set(-5.37397155531e-2f));
  p = f_fma(p, z, f_set(1.33314422036e-1f));
  p = f_fma(p, z, f_set(-3.33332819422e-1f));
  const F near_zero = f_fma(f_mul(p, z), x, x);
  const F e = f_exp(f_add(x, x));
  const F far = f_sub(f_set(1.0f), f_div(f_set(2.0f), f_add(e, f_set(1.0f))));
  return f_select_less(f_abs(x), f_set(0.625f), near_zero, far);
}

// x * P(x^2) / Q(x^2) on [-4, 4], error below 5e-7 (source: the rational approximation of Eigen).
FN F f_erf(F x) {
  x = f_min(f_set(4.0f), f_max(f_set(-4.0f), x));
  const F z = f_mul(x, x);
  F p = f_set(-2.72614225801306e-10f);
  p = f_fma(p, z, f_set(2.77068142495902e-08f));
  p = f_fma(p, z, f_set(-2.10102402082508e-06f));
  p = f_fma(p, z, f_set(-5.69250639462346e-05f));
  p = f_fma(p, z, f_set(-7.34990630326855e-04f));
  p = f_fma(p, z, f_set(-2.95459980854025e-03f));
  p = f_fma(p, z, f_set(-1.60960333262415e-02f));
  F q = f_set(-1.45660718464996e-05f);
  q = f_fma(q, z, f_set(-2.13374055278905e-04f));
  q = f_fma(q, z, f_set(-1.68282697438203e-03f));
  q = f_fma(q, z, f_set(-7.37332916720468e-03f));
  q = f_fma(q, z, f_set(-1.42647390514189e-02f));
  return f_div(f_mul(x, p), q);
}

FN F soft_cap(F x, float cap) {
  return f_mul(f_set(cap), f_tanh(f_div(x, f_set(cap))));
}

FN F apply_function(const Activation& a, F g) {
  switch (a.function) {
    case Function::SILU: {
      const F linear = a.gate_softcap > 0 ? soft_cap(g, a.gate_softcap) : g;
      return f_mul(linear, f_sigmoid(f_mul(f_set(a.alpha), g)));
    }
    case Function::GELU: {
      const F half = f_mul(g, f_set(0.5f));
      return f_fma(half, f_erf(f_mul(g, f_set(0.70710678118654752f))), half);
    }
    case Function::GELU_TANH: {
      const F cube = f_mul(f_mul(g, g), g);
      const F inner = f_mul(f_set(0.79788456080286536f), f_fma(f_set(0.044715f), cube, g));
      const F half = f_mul(g, f_set(0.5f));
      return f_fma(half, f_tanh(inner), half);
    }
    case Function::RELU: return f_max(f_zero(), g);
    case Function::RELU2: {
      const F r = f_max(f_zero(), g);
      return f_mul(r, r);
    }
    case Function::SIGMOID: return f_sigmoid(g);
    case Function::TANH: return f_tanh(g);
    default: return g;
  }
}

FN F activate_gate(const Activation& a, F g) {
  if (a.limit > 0 && a.limit_on == LimitOn::GATE) g = f_min(f_set(a.limit), g);
  F h = apply_function(a, g);
  if (a.limit > 0 && a.limit_on == LimitOn::ACTIVATED) h = f_min(f_set(a.limit), h);
  return h;
}

FN F activate_up(const Activation& a, F u) {
  if (a.limit > 0) u = f_min(f_set(a.limit), f_max(f_set(-a.limit), u));
  if (a.up_softcap > 0) u = soft_cap(u, a.up_softcap);
  return f_add(u, f_set(a.up_offset));
}

}  // namespace
