// Rows in the caller's dtype and in fp32.
#pragma once

namespace {

FN F load_x(Dtype dtype, const void* x, int64_t at) {
  switch (dtype) {
    case Dtype::F32: return f_load((const float*)x + at);
    case Dtype::F16: return f_load_f16((const uint16_t*)x + at);
    default: return as_float(i_shl<16>(i_load_u16((const uint16_t*)x + at)));
  }
}

FN I bf16_bits(F x) {
  const I bits = as_int(x);
  const I rounded = i_shr<16>(i_add(bits, i_add(i_set(0x7fff), i_and(i_shr<16>(bits), i_set(1)))));
  // NaN must not round to infinity: a number with bits above those of infinity keeps one set.
  const I magnitude = i_and(bits, i_set(0x7fffffff));
  const F is_nan = f_select_less(to_float(magnitude), f_set(2139095104.0f), f_zero(), f_set(1.0f));
  return i_or(rounded, i_and(as_int(is_nan), i_set(0x40)));
}

FN float bf16_value(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float x;
  __builtin_memcpy(&x, &wide, 4);
  return x;
}

FN void store_x(Dtype dtype, void* out, int64_t at, F x) {
  switch (dtype) {
    case Dtype::F32: f_store((float*)out + at, x); return;
    case Dtype::F16: store_f16((uint16_t*)out + at, x); return;
    default: store_u16((uint16_t*)out + at, bf16_bits(x)); return;
  }
}

// A row of `n` floats, padded with zeros to a multiple of 16.
static void read_row(Dtype dtype, const void* x, int64_t at, int64_t n, float* row) {
  const int64_t whole = n / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) f_store(row + i, load_x(dtype, x, at + i));
  if (whole == n) return;
  alignas(64) uint8_t rest[64] = {};
  const int size = dtype == Dtype::F32 ? 4 : 2;
  __builtin_memcpy(rest, (const uint8_t*)x + (at + whole) * size, (n - whole) * size);
  f_store(row + whole, load_x(dtype, rest, 0));
}

static void write_row(Dtype dtype, void* out, int64_t at, int64_t n, const float* row) {
  const int64_t whole = n / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) store_x(dtype, out, at + i, f_load(row + i));
  if (whole == n) return;
  alignas(64) float padded[16] = {};
  __builtin_memcpy(padded, row + whole, (n - whole) * 4);
  alignas(64) uint8_t rest[64];
  store_x(dtype, rest, 0, f_load(padded));
  const int size = dtype == Dtype::F32 ? 4 : 2;
  __builtin_memcpy((uint8_t*)out + (at + whole) * size, rest, (n - whole) * size);
}

}  // namespace
