// Rows times panels of one expert, of any number: cut into blocks that fit registers and caches.
#pragma once

namespace {

constexpr int64_t kChunkBytes = 32 * 1024;  // of panels side by side; measured, 16 to 64 KiB

static int zero_of(Code code) {
  return code == Code::U8 ? kU8Zero : code == Code::U4 ? 8 : kE2M1Zero;
}

// A few rows times all panels, straight from memory. One block of rows beside the four panels of a
// quad reads them once, and fetches the next quad from four places. More blocks, or blocks beside fewer panels, pass over the
// quad several times: each pass fetches its share of the next quad, which is in the cache by then.
FN void run_stream(const Blocks& blocks, int num_rows, const Matrix& m, int64_t expert,
                   int64_t first_panel, int64_t num_panels, Block& k) {
  const int wide = blocks.panels[0];
  int most = 1;  // rows beside that many panels
  while (most < 6 && blocks.panels[most] == wide) ++most;
  const int num_blocks = (num_rows + most - 1) / most;
  const int passes = num_blocks * (kQuad / wide);
  const int64_t quad_bytes = m.num_words * kQuadBytes;
  const uint32_t* const* rows = k.rows;
  float* c = k.c;
  k.prefetch_step = passes == 1 ? kWordBytes : kQuadBytes / passes;
  k.prefetch_lane = passes == 1 ? quad_bytes / kQuad : kWordBytes;
  for (int64_t panel = 0, pass = 0; panel < num_panels; panel += wide) {
    if (panel % kQuad == 0) pass = 0;
    k.values = panel_at(m, expert, first_panel + panel);
    const uint8_t* next = k.values - panel % kQuad * kWordBytes + quad_bytes;
    for (int i = 0, row = 0; i < num_blocks; ++i, ++pass) {
      const int count = (num_rows - row + num_blocks - i - 1) / (num_blocks - i);
      k.rows = rows + row;
      k.c = c + row * k.c_stride + panel * kPanel;
      k.prefetch = next + pass * quad_bytes / passes;
      blocks.wide[count - 1](k);
      row += count;
    }
    skip_panels(k, wide);
  }
}

// c[row][16 * panel ..] = rows times panels, without row scale and bias; whole quads.
static void multiply(const Matrix& m, int64_t expert, int64_t first_panel, int64_t num_panels,
                     const uint32_t* const* rows, int num_rows, float* c, int64_t c_stride,
                     Scratch& scratch) {
  const RowLayout layout = row_layout(m);
  Block k{};
  k.panel_stride = kWordBytes;
  k.word_stride = kQuadBytes;
  k.scale_kind = m.scale_kind;
  k.zero_kind = m.zero_kind;
  k.zeros_are_minima = m.zeros_are_minima;
  k.scales_stride = m.num_groups * kPanel * kind_size(m.scale_kind);
  k.zeros_stride = m.num_groups * kPanel * kind_size(m.zero_kind);
  k.scales = m.scales + expert * m.scales_stride + first_panel * k.scales_stride;
  k.zeros = m.zero_kind == Kind::NONE
                ? nullptr
                : m.zeros + expert * m.zeros_stride + first_panel * k.zeros_stride;
  k.super_shift = m.super_shift;
  k.super_stride = m.num_supers * kPanel * 2;
  const int64_t super_at = (expert * m.num_panels + first_panel) * k.super_stride;
  k.super_scales = m.super_scales ? m.super_scales + super_at : nullptr;
  k.super_minima = m.super_minima ? m.super_minima + super_at : nullptr;
  if (m.arithmetic == Arithmetic::INT8 && m.code == Code::U8 && k.zeros)
    k.signed_by = 128 - kU8Zero;
  k.scales_at = layout.scales_at;
  k.corrections_at = layout.corrections_at;
  k.rows = rows;
  k.c = c;
  k.c_stride = c_stride;

#if defined(MIXTURA_TILES)
  if (m.arithmetic == Arithmetic::BF16 && m.code == Code::BF16 && num_rows <= kTileOrderRows) {
    const NoDenormals none;
    k.first_word = 0;
    k.last_word = m.num_words;
    k.group_words = kTileWords;
    run_stream(kTileOrderBlocks, num_rows, m, expert, first_panel, num_panels, k);
    return;
  }
  if (uses_tiles(m, num_rows)) {
    const auto run = m.arithmetic == Arithmetic::INT8 ? &multiply_tiles<Arithmetic::INT8, true>
                     : m.is_grouped                   ? &multiply_tiles<Arithmetic::BF16, true>
                                                      : &multiply_tiles<Arithmetic::BF16, false>;
    run(m, expert, first_panel, k, num_panels, num_rows, scratch);
    return;
  }
#endif
  const int most = m.is_grouped ? kGroupedRows : kDenseRows;
  const Blocks* streaming = streaming_blocks(m);
  // Codes that would be unpacked into a buffer are decoded twice rather; measured, one to three times.
  if (streaming != nullptr && num_rows <= (needs_unpacking(m) ? 2 * most : most)) {
    k.first_word = 0;
    k.last_word = m.num_words;
    k.group_words = m.group_words;
    run_stream(*streaming, num_rows, m, expert, first_panel, num_panels, k);
    return;
  }

  const Blocks& blocks = chunk_blocks(m);
  const int subs = subs_per_word(m.code, m.arithmetic);
  const bool unpacks = needs_unpacking(m);
  const int num_blocks = (num_rows + most - 1) / most;
  const int wide = blocks.panels[(num_rows + num_blocks - 1) / num_blocks - 1];
  int64_t chunk = kChunkBytes / kWordBytes / wide / subs;  // words
  if (m.is_grouped) chunk = chunk < m.group_words ? m.group_words : chunk / m.group_words * m.group_words;
  const int64_t fit = kUnpackedBytes / kWordBytes / wide / subs;
  if (chunk > fit) chunk = fit;  // groups of up to 256 columns always fit whole
  k.group_words = m.group_words * subs;
  const int parts = kQuad / wide;  // of a quad, one after the other
  const int fetching = parts * num_blocks < kQuad ? parts * num_blocks : kQuad;
  for (int64_t quad = 0; quad < num_panels; quad += kQuad) {
    const uint8_t* values = panel_at(m, expert, first_panel + quad);
    for (int64_t word = 0; word < m.num_words; word += chunk) {
      const int64_t end = word + chunk < m.num_words ? word + chunk : m.num_words;
      // While this chunk is multiplied, the next one comes: a share of it beside each block.
      const uint8_t* next = values + end * kQuadBytes;
      const int64_t share = (end - word) * kQuadBytes / fetching;
      for (int part = 0, call = 0; part < parts; ++part) {
        const int64_t panel = quad + part * wide;
        Block b = k;
        skip_panels(b, panel);
        b.first_word = word * subs;
        b.last_word = end * subs;
        b.accumulate = word > 0;
        b.values = values + part * wide * kWordBytes;
        if (unpacks) {
          b.word_stride = kWordBytes;
          b.panel_stride = (end - word) * subs * kWordBytes;
          for (int n = 0; n < wide; ++n)
            unpack_panel(m, b.values + n * kWordBytes, b.zeros ? b.zeros + n * k.zeros_stride : nullptr,
                         word, end, scratch.unpacked + n * b.panel_stride);
          b.values = scratch.unpacked - b.first_word * kWordBytes;
        }
        for (int i = 0, row = 0; i < num_blocks; ++i, ++call) {
          const int count = (num_rows - row + num_blocks - i - 1) / (num_blocks - i);
          b.rows = rows + row;
          b.c = c + row * c_stride + panel * kPanel;
          b.prefetch = call < fetching ? next + call * share : (const uint8_t*)rows[row];
          b.prefetch_step = call < fetching ? kQuadBytes / fetching / subs : 0;
          (blocks.panels[count - 1] == wide ? blocks.wide : blocks.narrow)[count - 1](b);
          row += count;
        }
      }
    }
  }
}

}  // namespace
