// What threads do in the four phases of a call: prepare rows, gate and up with the activation, down,
// and the weighted sum.
#pragma once

namespace {

#if defined(MIXTURA_TILES)
constexpr int kRows = kTileRowChunk;
#else
constexpr int kRows = kRowChunk;
#endif

// Bytes b0 .. b7 of a word -> b0 b2 b4 b6 b1 b3 b5 b7.
FN uint64_t even_bytes_first(uint64_t x) {
  uint64_t t = (x ^ (x >> 8)) & 0x0000ff000000ff00;
  x ^= t ^ (t << 8);
  t = (x ^ (x >> 16)) & 0x00000000ffff0000;
  return x ^ t ^ (t << 16);
}

// The codes of activations with a scale of their expert's, as floats.
FN F codes_of(Rounding rounding, F x, F scale) {
  x = f_div(x, scale);
  if (rounding == Rounding::INT8) return f_round(f_max(f_set(-128.0f), f_min(f_set(127.0f), x)));
  x = f_max(f_set(-448.0f), f_min(f_set(448.0f), x));
  // Three bits of the mantissa; below 2 ** -6 multiples of 2 ** -9.
  const I bits = as_int(x);
  const I half = i_add(i_set(0x7ffff), i_and(i_shr<20>(bits), i_set(1)));
  const F normal = as_float(i_and(i_add(bits, half), i_set((int32_t)0xfff00000)));
  const F small = f_mul(f_round(f_mul(x, f_set(512.0f))), f_set(1.0f / 512.0f));
  const F code = f_select_less(f_abs(x), f_set(1.0f / 64.0f), small, normal);
  return f_select_less(f_abs(x), f_set(449.0f), code, x);  // NaN stays
}

// What an expert's inputs are divided by before they are rounded; 0: they are not.
FN float input_scale(const Matrix& m, int64_t expert) {
  return m.input_scale ? m.input_scale[expert] : 0.0f;
}

// One group of activations as int8: x ~ scale * q with |q| <= 127; where `has_codes`, q is x.
// `x` has n values and zeros up to a multiple of 16, of which `padded` (a multiple of 8) are stored.
static void quantize_group(const Matrix& m, const float* x, bool has_codes, int64_t padded, uint8_t* q,
                           uint32_t* scale_out, uint32_t* correction_out) {
  I top = i_zero();
  for (int64_t i = 0; i < padded; i += 16)
    top = i_max(top, i_and(as_int(f_load(x + i)), i_set(0x7fffffff)));
  const uint32_t top_bits = (uint32_t)i_max_lane(top);
  float amax, scale = 0.0f, inverse = 0.0f;
  __builtin_memcpy(&amax, &top_bits, 4);
  if (top_bits >= 0x7f800000) {
    scale = __builtin_nanf("");  // an infinity or a NaN makes the row NaN
  } else if (has_codes) {
    scale = inverse = 1.0f;
  } else if (amax > 1e-35f) {
    scale = amax / 127.0f;
    inverse = 127.0f / amax;
  }
  I sum = i_zero();
  alignas(64) uint8_t last[16];
  const bool permutes = m.code != Code::U8;
  for (int64_t i = 0; i < padded; i += 16) {
    const I codes = inverse == 0.0f ? i_zero() : to_int(f_mul(f_load(x + i), f_set(inverse)));
    sum = i_add(sum, codes);
    const int64_t left = padded - i;
    uint8_t* to = left >= 16 ? q + i : last;
    store_i8(to, codes);
    if (permutes) {
      uint64_t words[2];
      __builtin_memcpy(words, to, 16);
      words[0] = even_bytes_first(words[0]);
      words[1] = even_bytes_first(words[1]);
      __builtin_memcpy(to, words, 16);
    }
    if (left < 16) __builtin_memcpy(q + i, last, left);
  }
  const int32_t total = i_sum(sum);
  if (m.code == Code::E2M1) scale *= 0.5f;  // its levels are multiplied twice as large
  __builtin_memcpy(scale_out, &scale, 4);
  if (m.zero_kind == Kind::NONE) {
    *correction_out = (uint32_t)(-zero_of(m.code) * total);
  } else {
    const float exact = (float)total;
    __builtin_memcpy(correction_out, &exact, 4);
  }
}

// Columns first .. first + n - 1 of a row, first at the beginning of a group. `x` is padded with
// zeros to a multiple of 16; with a scale its codes take its place.
static void store_activations(const Matrix& m, uint32_t* row, int64_t first, int64_t n, float* x,
                              float scale) {
  const bool has_codes = scale > 0.0f;
  if (has_codes)
    for (int64_t i = 0; i < n; i += 16)
      f_store(x + i, codes_of(m.rounding, f_load(x + i), f_set(scale)));
  const RowLayout layout = row_layout(m);
  const int codes = codes_per_word(m.code);
  const int64_t padded = (n + codes - 1) / codes * codes;
  const int64_t group = m.group_words * codes;
  if (m.arithmetic == Arithmetic::INT8) {
    for (int64_t i = 0; i < padded; i += group) {
      const int64_t g = (first + i) / group;
      quantize_group(m, x + i, has_codes, padded - i < group ? padded - i : group, (uint8_t*)row + first + i,
                     row + layout.scales_at + g, row + layout.corrections_at + g);
    }
    return;
  }
  if (m.arithmetic == Arithmetic::F32) {
    __builtin_memcpy((float*)row + first, x, padded * 4);
  } else {
    uint16_t* out = (uint16_t*)row + first;
    const int subs = codes / 2;
    alignas(64) uint16_t bits[16];
    for (int64_t i = 0; i < padded; i += 16) {
      const int64_t count = padded - i < 16 ? padded - i : 16;
      store_u16(bits, bf16_bits(f_load(x + i)));
      if (subs == 1) {
        __builtin_memcpy(out + i, bits, count * 2);
        continue;
      }
      for (int64_t j = 0; j < count; j += codes)
        for (int s = 0; s < subs; ++s) {
          out[i + j + 2 * s] = bits[j + s];
          out[i + j + 2 * s + 1] = bits[j + s + subs];
        }
    }
  }
  if (m.is_grouped) {
    for (int64_t i = 0; i < padded; i += group) {
      const int64_t g = (first + i) / group, end = padded - i < group ? padded : i + group;
      // Of what the products multiply: a minimum then errs as much as they do, and makes up for it.
      const uint16_t* rounded = (const uint16_t*)row + first;
      float sum = 0.0f;
      for (int64_t j = i; j < end; ++j)
        sum += m.arithmetic == Arithmetic::BF16 ? bf16_value(rounded[j]) : x[j];
      __builtin_memcpy(row + layout.corrections_at + g, &sum, 4);
    }
  }
}

// Whether weights on the input multiply the products: rounding comes after them.
FN bool weighs_products(const Call& call) {
  return call.weight_on_input && call.layer->gate_up.rounding == Rounding::NONE;
}

// A token's row, or one for each of its experts.
static void prepare(const Call& call, int64_t token, Scratch& scratch) {
  const Matrix& m = call.layer->gate_up;
  const int64_t n = m.num_columns, stride = row_layout(m).stride;
  if (m.permutation)
    for (int64_t i = n; i < (n + 15) / 16 * 16; ++i) scratch.permuted[i] = 0.0f;
  for (int64_t k = 0; k < (call.has_row_per_slot ? call.top_k : 1); ++k) {
    const int64_t slot = token * call.top_k + k;
    const int64_t at = call.has_row_per_slot ? call.position[slot] : token;
    if (at < 0) continue;
    const int64_t expert = call.has_row_per_slot ? call.ids[slot] : 0;
    float* row = scratch.row;
    read_row(call.x_dtype, call.x, token * n, n, row);
    if (call.weight_on_input && !weighs_products(call))
      for (int64_t i = 0; i < n; i += 16)
        f_store(row + i, f_mul(f_load(row + i), f_set(call.weights[slot])));
    if (m.permutation) {
      const int32_t* from = m.permutation + expert * n;
      for (int64_t i = 0; i < n; ++i) scratch.permuted[i] = row[from[i]];
      row = scratch.permuted;
    }
    store_activations(m, call.rows + at * stride, 0, n, row, input_scale(m, expert));
  }
}

// Hidden columns `unit * unit_columns` and on, of every row of an expert.
static void gate_up(const Call& call, int64_t expert, int64_t unit, Scratch& scratch) {
  const Layer& layer = *call.layer;
  const Matrix& m = layer.gate_up;
  const int halves = layer.is_gated ? 2 : 1;
  const int64_t first = unit * layer.unit_columns;
  const int64_t left = layer.intermediate_size - first;
  const int64_t columns = left < layer.unit_columns ? left : layer.unit_columns;
  const int64_t first_panel = first / kPanel * halves;
  const int64_t steps = (columns + kPanel - 1) / kPanel;
  const int64_t num_panels = (steps * halves + kQuad - 1) / kQuad * kQuad;
  const int64_t c_stride = num_panels * kPanel;
  const int64_t row_stride = row_layout(m).stride, hidden_stride = row_layout(layer.down).stride;
  const float* scale = m.row_scale ? m.row_scale + (expert * m.num_panels + first_panel) * kPanel : nullptr;
  const float* bias = m.bias ? m.bias + (expert * m.num_panels + first_panel) * kPanel : nullptr;
  const float input = input_scale(m, expert), hidden_scale = input_scale(layer.down, expert);
  const bool weighs = weighs_products(call);
  const int64_t last = call.offsets[expert + 1];
  if (call.adapters) fetch_gate_up(call, expert, first, columns);
  for (int64_t begin = call.offsets[expert], count; begin < last; begin += count) {
    count = last - begin < kRows ? last - begin : kRows;
    const uint32_t* rows[kRows];
    scratch.rows_of = 2 * begin;
    for (int i = 0; i < count; ++i)
      rows[i] = call.rows + row_stride * (call.has_row_per_slot ? begin + i
                                                                : call.slots[begin + i] / call.top_k);
    multiply(m, expert, first_panel, num_panels, rows, (int)count, scratch.c, c_stride, scratch);
    for (int i = 0; i < count; ++i) {
      float* c = scratch.c + i * c_stride;
      const Adapter* adapter = adapter_of(call, begin + i);
      const float *to_first = nullptr, *to_up = nullptr;  // what is added
      if (adapter) {
        const float* shrunk = call.shrunk + 2 * (begin + i) * call.rank_stride;
        to_up = expanded(adapter->up, expert, first, steps, shrunk + call.rank_stride, scratch.added);
        to_first = layer.is_gated ? expanded(adapter->gate, expert, first, steps, shrunk,
                                             scratch.added + steps * kPanel)
                                  : to_up;
      }
      const F factor = f_set(weighs ? call.weights[call.slots[begin + i]] : input > 0.0f ? input : 1.0f);
      for (int64_t s = 0; s < steps; ++s) {
        const auto value = [&](int64_t panel, const float* added) {
          F x = f_load(c + panel * kPanel);
          if (scale) x = f_mul(x, f_load(scale + panel * kPanel));
          if (weighs || input > 0.0f) x = f_mul(x, factor);
          if (bias) x = f_add(x, f_load(bias + panel * kPanel));
          if (added) x = f_add(x, f_load(added + s * kPanel));
          return x;
        };
        F h = activate_gate(layer.activation, value(s * halves, to_first));
        if (layer.is_gated) h = f_mul(h, activate_up(layer.activation, value(s * 2 + 1, to_up)));
        f_store(c + s * kPanel, h);
      }
      for (int64_t n = columns; n < steps * kPanel; ++n) c[n] = 0.0f;
      if (adapter)
        shrink(adapter->down, expert, first, columns, c,
               call.shrunk_hidden + ((begin + i) * call.num_units + unit) * call.rank_stride);
      store_activations(layer.down, call.hidden + (begin + i) * hidden_stride, first, columns, c,
                        hidden_scale);
    }
  }
}

static void down(const Call& call, int64_t expert, int64_t first_panel, int64_t num_panels,
                 Scratch& scratch) {
  const Matrix& m = call.layer->down;
  const int64_t row_stride = row_layout(m).stride, y_stride = m.num_panels * kPanel;
  const int64_t at = (expert * m.num_panels + first_panel) * kPanel;
  const float input = input_scale(m, expert);
  const int64_t last = call.offsets[expert + 1];
  if (call.adapters) fetch_down(call, expert, first_panel * kPanel, num_panels * kPanel);
  for (int64_t begin = call.offsets[expert], count; begin < last; begin += count) {
    count = last - begin < kRows ? last - begin : kRows;
    const uint32_t* rows[kRows];
    scratch.rows_of = 2 * begin + 1;
    for (int i = 0; i < count; ++i) rows[i] = call.hidden + (begin + i) * row_stride;
    float* y = call.y + begin * y_stride + first_panel * kPanel;
    multiply(m, expert, first_panel, num_panels, rows, (int)count, y, y_stride, scratch);
    if (!m.row_scale && !m.bias && input == 0.0f && !call.adapters) continue;
    for (int i = 0; i < count; ++i, y += y_stride) {
      for (int64_t n = 0; n < num_panels * kPanel; n += kPanel) {
        F x = f_load(y + n);
        if (m.row_scale) x = f_mul(x, f_load(m.row_scale + at + n));
        if (input > 0.0f) x = f_mul(x, f_set(input));
        if (m.bias) x = f_add(x, f_load(m.bias + at + n));
        f_store(y + n, x);
      }
      if (const Adapter* adapter = adapter_of(call, begin + i))
        expand_down(call, *adapter, expert, begin + i, first_panel, num_panels, y, scratch);
    }
  }
}

static void apply_post_norm(const Layer& layer, float* y) {
  const int64_t n = layer.hidden_size;
  const bool scales_first = layer.post_norm == PostNorm::RMS_SCALE_FIRST;
  float sum = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    if (scales_first) y[i] *= 1.0f + layer.post_norm_weight[i];
    sum += y[i] * y[i];
  }
  const float factor = 1.0f / __builtin_sqrtf(sum / (float)n + layer.epsilon);
  for (int64_t i = 0; i < n; ++i) y[i] *= scales_first ? factor : factor * layer.post_norm_weight[i];
}

// The weighted slots of a token, added in slot order; or each by itself. A term is rounded before it is
// added, as ranks that add terms of others have them rounded.
static void combine(const Call& call, int64_t token, Scratch& scratch) {
  const Layer& layer = *call.layer;
  const int64_t y_stride = layer.down.num_panels * kPanel;
  const int64_t n = layer.hidden_size, padded = (n + 15) / 16 * 16;
  if (call.reduce)
    for (int64_t i = 0; i < padded; i += 16) f_store(scratch.row + i, f_zero());
  for (int64_t k = 0; k < call.top_k; ++k) {
    const int64_t slot = token * call.top_k + k;
    const int32_t at = call.position[slot];
    float* out = (float*)call.out + slot * n;
    if (at < 0) {
      if (!call.reduce) __builtin_memset(out, 0, n * 4);
      continue;
    }
    float* y = call.y + at * y_stride;
    if (layer.post_norm != PostNorm::NONE) apply_post_norm(layer, y);
    const F weight = f_set(call.weight_on_input ? 1.0f : call.weights[slot]);
    if (call.reduce) {
      for (int64_t i = 0; i < padded; i += 16)
        f_store(scratch.row + i, f_add(f_load(scratch.row + i), f_mul(weight, f_load(y + i))));
    } else {
      for (int64_t i = 0; i < padded; i += 16) f_store(y + i, f_mul(weight, f_load(y + i)));
      __builtin_memcpy(out, y, n * 4);
    }
  }
  if (call.reduce) write_row(call.x_dtype, call.out, token * n, n, scratch.row);
}

static void finish_linear(const Call& call, int64_t token, Scratch&) {
  const Layer& layer = *call.layer;
  const int64_t n = layer.hidden_size;
  write_row(call.x_dtype, call.out, token * n, n, call.y + token * layer.down.num_panels * kPanel);
}

}  // namespace
