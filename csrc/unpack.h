// Codes into what the products take, for chunks that several blocks of rows read.
#pragma once

namespace {

alignas(64) constexpr float kE2M1Levels[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                               -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

static bool needs_unpacking(const Matrix& m) {
  switch (m.arithmetic) {
    case Arithmetic::F32: return m.code != Code::F32;
    case Arithmetic::BF16: return m.code != Code::BF16;
    default: return m.code != Code::U8 || kU8Zero == 0;
  }
}

// Code `index` of 16 words -> levels, before the zero point.
FN F level_at(const Matrix& m, V raw, int index) {
  const Code code = m.code;
  switch (code) {
    case Code::F16: return f16_low(index == 0 ? raw : i_shr<16>(raw));
    case Code::BF16:
      return as_float(index == 0 ? i_shl<16>(raw) : i_and(raw, i_set((int32_t)0xffff0000)));
    case Code::U8:
    case Code::E4M3: {
      V bytes = raw;
      if (index == 1) bytes = i_shr<8>(raw);
      if (index == 2) bytes = i_shr<16>(raw);
      if (index == 3) bytes = i_shr<24>(raw);
      bytes = i_and(bytes, i_set(255));
      return code == Code::U8 ? f_sub(to_float(bytes), f_set(128.0f)) : e4m3_to_float(bytes);
    }
    default: {
      V codes = raw;
      if (index == 1) codes = i_shr<4>(raw);
      if (index == 2) codes = i_shr<8>(raw);
      if (index == 3) codes = i_shr<12>(raw);
      if (index == 4) codes = i_shr<16>(raw);
      if (index == 5) codes = i_shr<20>(raw);
      if (index == 6) codes = i_shr<24>(raw);
      if (index == 7) codes = i_shr<28>(raw);
      codes = i_and(codes, i_set(15));
      if (code == Code::U4) return f_sub(to_float(codes), f_set(8.0f));
      return f_lookup(code == Code::E2M1 ? kE2M1Levels : m.levels, codes);
    }
  }
}

// Two floats of 16 lanes -> 16 pairs of bf16, rounded to nearest even; exact for every level.
FN V bf16_pair(F low, F high) {
  const auto rounded = [](F x) {
    const I bits = as_int(x);
    return i_add(bits, i_add(i_set(0x7fff), i_and(i_shr<16>(bits), i_set(1))));
  };
  return i_or(i_shr<16>(rounded(low)), i_and(rounded(high), i_set((int32_t)0xffff0000)));
}

// Words first .. last - 1 of one panel; word w goes to out + (w - first) * subs * 64.
static void unpack_panel(const Matrix& m, const uint8_t* panel, const uint8_t* zeros, int64_t first,
                         int64_t last, uint8_t* out) {
  const uint8_t* from = panel + first * kQuadBytes;
  if (m.arithmetic == Arithmetic::INT8) {
    for (int64_t word = first; word < last; ++word, from += kQuadBytes) {
      const V raw = v_load(from);
      if (m.code == Code::U8) {
        v_store(out, Int8<Code::U8>::decode(raw, 0));
        out += kWordBytes;
        continue;
      }
      const bool is_int = m.code == Code::U4;
      v_store(out, is_int ? Int8<Code::U4>::decode(raw, 0) : Int8<Code::E2M1>::decode(raw, 0));
      out += kWordBytes;
      v_store(out, is_int ? Int8<Code::U4>::decode(raw, 1) : Int8<Code::E2M1>::decode(raw, 1));
      out += kWordBytes;
    }
    return;
  }
  const int subs = subs_per_word(m.code, m.arithmetic);
  // Integers have had their middle subtracted; a zero point is relative to it.
  const float middle = m.code == Code::U8 ? 128.0f : 8.0f;
  const bool has_zeros = zeros != nullptr && !m.zeros_are_minima;
  const bool adds_middle = zeros != nullptr && m.zeros_are_minima;  // levels are the codes there
  for (int64_t word = first; word < last; ++word, from += kQuadBytes) {
    const V raw = v_load(from);
    F offset = f_zero();
    if (has_zeros) {
      const int64_t group = word / m.group_words;
      offset = f_sub(f_set(middle),
                     load_kind(m.zero_kind, zeros + group * kPanel * kind_size(m.zero_kind)));
    } else if (adds_middle) {
      offset = f_set(middle);
    }
    for (int s = 0; s < subs; ++s, out += kWordBytes) {
      const F low = f_add(level_at(m, raw, s), offset);
      if (m.arithmetic == Arithmetic::F32) f_store((float*)out, low);
      else v_store(out, bf16_pair(low, f_add(level_at(m, raw, s + subs), offset)));
    }
  }
}

}  // namespace
