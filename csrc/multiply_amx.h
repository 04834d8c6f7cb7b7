// Rows times panels in tiles of AMX: 16 words of a panel are one, and so are 16 words of 16 rows.
//
// Integers are summed exactly and groups are added up as in block.h, so that int8 products are
// bitwise those of its blocks. Sums of bf16 are made in another order; they are made here whatever
// the number of rows, so that a row's result does not depend on the rows beside it.
#pragma once

#if defined(MIXTURA_TILES)
namespace {

constexpr int64_t kRowsBytes = 1 << 20;  // of rows that stay in the second-level cache: half of it
constexpr int64_t kTileChunk = 128;  // words of a quad that stay in the first-level cache: 32 KiB
static_assert(kQuad * kTileChunk * kWordBytes <= kUnpackedBytes, "a chunk is unpacked at once");
static_assert(kTileRowChunk % kTileRows == 0, "the rows' buffer ends with a tile");

static bool uses_tiles(const Matrix& m, int num_rows) {
  return m.arithmetic == Arithmetic::BF16 ||
         (m.arithmetic == Arithmetic::INT8 && num_rows > kGroupedRows);
}

// Words in a tile: the most that divide a span, so that no tile reaches into another group.
static int tile_depth(int64_t span) {
  int depth = kTileWords;
  while (span % depth) --depth;
  return depth;
}

// 0 .. 3 are sums. The rest are rows and panels: for one tile of rows 4 and 5, 6, 7, else 4, 5 and
// 6, 7.
static void shape_tiles_for(int rows, int depth, bool is_alone) {
  TileShapes shapes{};
  shapes.palette = 1;
  for (int t = 0; t < kTiles; ++t) {
    const bool has_rows = t == 4 || (t == 5 && !is_alone);
    shapes.rows[t] = (uint8_t)(t < 4 || has_rows ? rows : depth);
    shapes.row_bytes[t] = (uint16_t)(has_rows ? 4 * depth : kWordBytes);
  }
  shape_tiles(shapes);
}

template <Arithmetic A, int C, int X, int W> FN void dot_tiles() {
  if constexpr (A == Arithmetic::INT8) dot_tiles_int8<C, X, W>();
  else dot_tiles_bf16<C, X, W>();
}

// The rows of a call as tiles: [tile of rows][step][row][depth words], zeros behind a row's end; then
// scale and correction of every group: [group][row].
struct TileRows {
  int num_rows, num_tiles, rows;  // rows of a tile: as even as can be; the last may have fewer
  int depth;
  int64_t num_steps;
  uint32_t* x;
  float *scales, *corrections;

  int64_t step_words() const { return (int64_t)rows * depth; }
  int64_t padded() const { return (int64_t)rows * num_tiles; }
  const uint32_t* at(int tile, int64_t step) const {
    return x + (tile * num_steps + step) * step_words();
  }
};

static void fill_tile_rows(const TileRows& t, const Matrix& m, const uint32_t* const* rows) {
  const RowLayout layout = row_layout(m);
  const int64_t whole = layout.num_words / t.depth, rest = layout.num_words % t.depth;
  for (int row = 0; row < t.num_rows; ++row) {
    const uint32_t* from = rows[row];
    uint32_t* to = t.x + row / t.rows * t.num_steps * t.step_words() + row % t.rows * t.depth;
    for (int64_t step = 0; step < whole; ++step, to += t.step_words(), from += t.depth) {
      if (t.depth == kTileWords) v_store(to, v_load(from));
      else __builtin_memcpy(to, from, t.depth * 4);
    }
    if (rest) {
      __builtin_memset(to, 0, t.depth * 4);
      __builtin_memcpy(to, from, rest * 4);
    }
    if (!m.is_grouped) continue;
    for (int64_t g = 0; g < m.num_groups; ++g) {
      __builtin_memcpy(t.scales + g * t.padded() + row, rows[row] + layout.scales_at + g, 4);
      __builtin_memcpy(t.corrections + g * t.padded() + row,
                       rows[row] + layout.corrections_at + g, 4);
    }
  }
}

// Words of panels, and what is read ahead meanwhile: lines from four places of the next quad.
struct TilePanels {
  const uint8_t* values;              // of the first word
  int64_t word_stride, panel_stride;  // bytes
  const uint8_t* fetch;
  int64_t fetch_lane;                 // bytes from one of the four places to the next
  int64_t fetch_lines;                // of each place, for each step

  // A share of a step's lines from one of the places: few at a time, as loads wait behind them.
  FN void read_ahead(int lane) const {
    const uint8_t* from = fetch + lane * fetch_lane;
    for (int64_t n = 0; n < fetch_lines; ++n) __builtin_prefetch(from + n * kWordBytes, 0, 2);
  }
  FN void step_ahead() { fetch += fetch_lines * kWordBytes; }
};

// sums += `words` words of TILES tiles of rows times PANELS panels.
template <Arithmetic A, int TILES, int PANELS>
FN void add_steps(const TileRows& t, int tile, int64_t step, int64_t words, TilePanels& p) {
  const uint8_t* b = p.values;
  const int64_t row_stride = 4 * t.depth;
  const uint32_t* x = t.at(tile, step);
  const uint32_t* second = x + t.num_steps * t.step_words();
  int64_t word_stride = p.word_stride, panel_stride = p.panel_stride;
  alignas(64) uint8_t ends[PANELS][kTileWords * kWordBytes];
  for (; words > 0; words -= t.depth) {
    if (words < t.depth) {  // the end of the panels: zeros behind it, as behind the rows
      __builtin_memset(ends, 0, sizeof ends);
      for (int n = 0; n < PANELS; ++n)
        for (int64_t word = 0; word < words; ++word)
          __builtin_memcpy(ends[n] + word * kWordBytes, b + n * panel_stride + word * word_stride,
                           kWordBytes);
      b = ends[0];
      word_stride = kWordBytes;
      panel_stride = sizeof ends[0];
    }
    load_tile<4>(x, row_stride);
    if constexpr (PANELS == 4) {
      static_assert(TILES == 1, "eight tiles hold no more");
      load_tile<5>(b, word_stride);
      p.read_ahead(0);
      dot_tiles<A, 0, 4, 5>();
      load_tile<6>(b + panel_stride, word_stride);
      p.read_ahead(1);
      dot_tiles<A, 1, 4, 6>();
      load_tile<7>(b + 2 * panel_stride, word_stride);
      p.read_ahead(2);
      dot_tiles<A, 2, 4, 7>();
      load_tile<5>(b + 3 * panel_stride, word_stride);
      p.read_ahead(3);
      dot_tiles<A, 3, 4, 5>();
    } else {
      load_tile<6>(b, word_stride);
      p.read_ahead(0);
      dot_tiles<A, 0, 4, 6>();
      load_tile<7>(b + panel_stride, word_stride);
      p.read_ahead(1);
      dot_tiles<A, 1, 4, 7>();
      if constexpr (TILES == 2) load_tile<5>(second, row_stride);
      p.read_ahead(2);
      if constexpr (TILES == 2) dot_tiles<A, 2, 5, 6>();
      p.read_ahead(3);
      if constexpr (TILES == 2) dot_tiles<A, 3, 5, 7>();
    }
    p.step_ahead();
    x += t.step_words();
    second += t.step_words();
    b += t.depth * word_stride;
  }
}

// Tile number T of sums is of tile of rows T / PANELS and panel T % PANELS. Where they go: rows of
// `stride` bytes; `spill` takes a tile whose last rows are no rows.
struct TileSums {
  float* c;
  int64_t stride;
  int full, last;  // tiles of rows that are whole, and rows of the one that is not
  float* spill;    // [panel][16][16]
};

template <int T, int PANELS> FN void begin_sums(const TileRows& t, const TileSums& s, bool adds) {
  constexpr int tile = T / PANELS, panel = T % PANELS;
  if (!adds) return zero_tile<T>();
  float* c = s.c + tile * t.rows * s.stride / 4 + panel * kPanel;
  if (tile < s.full) return load_tile<T>(c, s.stride);
  float* spill = s.spill + panel * kTileRows * kPanel;
  for (int row = 0; row < s.last; ++row) f_store(spill + row * kPanel, f_load(c + row * s.stride / 4));
  load_tile<T>(spill, kWordBytes);
}

template <int T, int PANELS> FN void end_sums(const TileRows& t, const TileSums& s) {
  constexpr int tile = T / PANELS, panel = T % PANELS;
  float* c = s.c + tile * t.rows * s.stride / 4 + panel * kPanel;
  if (tile < s.full) return store_tile<T>(c, s.stride);
  float* spill = s.spill + panel * kTileRows * kPanel;
  store_tile<T>(spill, kWordBytes);
  for (int row = 0; row < s.last; ++row) f_store(c + row * s.stride / 4, f_load(spill + row * kPanel));
}

template <int TILES, int PANELS, class Do> FN void each_sum(const Do& run) {
  run(Number<0>{});
  run(Number<1>{});
  if constexpr (TILES * PANELS == 4) {
    run(Number<2>{});
    run(Number<3>{});
  }
}

// Products without groups: sums stay in tiles, or come back to them for the next chunk.
template <Arithmetic A, int TILES, int PANELS>
static void run_whole(const TileRows& t, const Block& k, int tile, int64_t step, int64_t words,
                      TilePanels& p) {
  alignas(64) float spill[PANELS * kTileRows * kPanel];
  const int left = t.num_rows - tile * t.rows;
  const TileSums s{k.c, 4 * k.c_stride, left / t.rows < TILES ? left / t.rows : TILES,
                   left % t.rows, spill};
  each_sum<TILES, PANELS>([&](auto n) { begin_sums<decltype(n)::value, PANELS>(t, s, k.accumulate); });
  add_steps<A, TILES, PANELS>(t, tile, step, words, p);
  each_sum<TILES, PANELS>([&](auto n) { end_sums<decltype(n)::value, PANELS>(t, s); });
}

// Adds a group's sums [row][PANELS][16] to the totals, scaled, as add_group of block.h does.
template <Arithmetic A, int PANELS, bool HAS_ZEROS>
static void add_sums(const TileRows& t, const Block& k, int first, int count, const float* sums,
                     float* totals, int64_t group) {
  constexpr bool is_int = A == Arithmetic::INT8;
  F scale[PANELS], zero[PANELS];
#pragma GCC unroll 4
  for (int n = 0; n < PANELS; ++n) {
    scale[n] = scale_at(k, n, group);
    if constexpr (HAS_ZEROS) zero[n] = zero_at(k, n, group);
  }
  const float* row_scales = t.scales + group * t.padded() + first;
  const float* corrections = t.corrections + group * t.padded() + first;
#pragma GCC unroll 2
  for (int row = 0; row < count; ++row, sums += PANELS * kPanel, totals += PANELS * kPanel) {
    const F row_scale = f_set(is_int ? row_scales[row] : 1.0f);
#pragma GCC unroll 4
    for (int n = 0; n < PANELS; ++n) {
      F sum;
      if constexpr (is_int) {
        I exact = i_load(sums + n * kPanel);
        if constexpr (HAS_ZEROS) exact = i_add(exact, i_set(k.signed_by * (int32_t)corrections[row]));
        sum = to_float(exact);
      } else {
        sum = f_load(sums + n * kPanel);
      }
      const F factor = is_int ? f_mul(scale[n], row_scale) : scale[n];
      F total = f_load(totals + n * kPanel);
      if constexpr (HAS_ZEROS) {
        const F correction = f_set(corrections[row]);
        if (is_int && !k.zeros_are_minima) sum = f_nfma(zero[n], correction, sum);
        total = f_fma(sum, factor, total);
        if (k.zeros_are_minima) total = f_nfma(zero[n], f_mul(correction, row_scale), total);
      } else {
        total = f_fma(sum, factor, total);
      }
      f_store(totals + n * kPanel, total);
    }
  }
}

// Levels as signed bytes of words first .. last - 1 of PANELS panels beside each other, each to memory
// of its own; a level of e2m1 is twice as large.
template <Code C, int PANELS>
static void unpack_signed(const uint8_t* panels, int64_t first, int64_t last, uint8_t* out,
                          int64_t panel_stride) {
  const uint8_t* from = panels + first * kQuadBytes;
  for (int64_t word = first; word < last; ++word, from += kQuadBytes) {
#pragma GCC unroll 4
    for (int n = 0; n < PANELS; ++n) {
      const V raw = v_load(from + n * kWordBytes);
      uint8_t* to = out + n * panel_stride;
      if constexpr (C == Code::U8) {
        v_store(to, i_xor(raw, i_set((int32_t)0x80808080)));
      } else {
        const V low = v_low_nibbles(raw), high = v_high_nibbles(raw);
        v_store(to, C == Code::U4 ? v_sub8(low, 8) : v_lookup(kE2M1Signed, low));
        v_store(to + kWordBytes, C == Code::U4 ? v_sub8(high, 8) : v_lookup(kE2M1Signed, high));
      }
    }
    out += (C == Code::U8 ? 1 : 2) * kWordBytes;
  }
}

// Panels of a quad that are made into what tiles hold, a range of words at a time.
struct Unpacker {
  const Matrix* m;
  const uint8_t* panels;
  const uint8_t* zeros;      // of the first panel, or null
  int64_t zeros_stride;
  int num_panels, subs;
  int64_t panel_stride;      // bytes of the result

  template <Arithmetic A> void run(int64_t first, int64_t last, uint8_t* out) const {
    if constexpr (A == Arithmetic::INT8) {
      const auto signed_bytes = [&](auto code) {
        constexpr Code kCode = (Code)decltype(code)::value;
        if (num_panels == 4)
          unpack_signed<kCode, 4>(panels, first / subs, last / subs, out, panel_stride);
        else
          unpack_signed<kCode, 2>(panels, first / subs, last / subs, out, panel_stride);
      };
      if (m->code == Code::U8) signed_bytes(Number<(int)Code::U8>{});
      else if (m->code == Code::U4) signed_bytes(Number<(int)Code::U4>{});
      else signed_bytes(Number<(int)Code::E2M1>{});
    } else {
      for (int n = 0; n < num_panels; ++n)
        unpack_panel(*m, panels + n * kWordBytes, zeros ? zeros + n * zeros_stride : nullptr,
                     first / subs, last / subs, out + n * panel_stride);
    }
  }
};

// Products with groups: a group's sums leave the tiles and are added up while the next group is
// multiplied. The first rows unpack the next group meanwhile: tiles cannot be loaded from stores that
// are still under way. Groups take turns in `ring` places.
template <Arithmetic A, int TILES, int PANELS>
static void run_groups(const TileRows& t, const Block& k, int tile, int64_t step, int64_t words,
                       TilePanels& p, const Unpacker& unpacker, uint8_t* places, int64_t ring) {
  constexpr int kBlock = TILES * kTileRows * PANELS * kPanel;
  alignas(64) float sums[2][kBlock], totals[kBlock];
  constexpr int64_t stride = PANELS * kPanel * 4;
  const int first = tile * t.rows;
  const int left = t.num_rows - first, count = left < TILES * t.rows ? left : TILES * t.rows;
  for (int row = 0; row < count; ++row)
    for (int n = 0; n < PANELS; ++n)
      f_store(totals + (row * PANELS + n) * kPanel,
              k.accumulate ? f_load(k.c + row * k.c_stride + n * kPanel) : f_zero());
  const int64_t begin = step * t.depth / k.group_words, steps = k.group_words / t.depth;
  const int64_t end = step * t.depth + words;
  int64_t group = begin;
  const auto place = [&](int64_t number) {
    return places + number % ring * PANELS * unpacker.panel_stride;
  };
  const auto unpack = [&](int64_t number) {
    const int64_t from = number * k.group_words;
    const int64_t to = from + k.group_words < end ? from + k.group_words : end;
    unpacker.template run<A>(from, to, place(number));
  };
  const auto add = k.zeros ? &add_sums<A, PANELS, true> : &add_sums<A, PANELS, false>;
  if (tile == 0) unpack(group);
  for (; words > 0; words -= k.group_words, ++group, step += steps) {
    if (tile == 0 && words > k.group_words) unpack(group + 1);
    p.values = place(group);
    const TileSums s{sums[group & 1], stride, TILES, 0, nullptr};
    each_sum<TILES, PANELS>([&](auto n) { begin_sums<decltype(n)::value, PANELS>(t, s, false); });
    add_steps<A, TILES, PANELS>(t, tile, step, words < k.group_words ? words : k.group_words, p);
    each_sum<TILES, PANELS>([&](auto n) { end_sums<decltype(n)::value, PANELS>(t, s); });
    if (group > begin) add(t, k, first, count, sums[(group - 1) & 1], totals, group - 1);
  }
  add(t, k, first, count, sums[(group - 1) & 1], totals, group - 1);
  for (int row = 0; row < count; ++row)
    for (int n = 0; n < PANELS; ++n)
      f_store(k.c + row * k.c_stride + n * kPanel, f_load(totals + (row * PANELS + n) * kPanel));
}

// `k` as `multiply` has filled it; words here are those of rows.
template <Arithmetic A, bool GROUPED>
static void multiply_tiles(const Matrix& m, int64_t expert, int64_t first_panel, Block k,
                           int64_t num_panels, int num_rows, Scratch& scratch) {
  const int subs = subs_per_word(m.code, m.arithmetic);
  const int64_t num_words = m.num_words * subs, quad_bytes = m.num_words * kQuadBytes;
  const bool unpacks = m.code != Code::BF16;
  k.group_words = m.group_words * subs;
  if (k.zeros) k.signed_by = m.code == Code::U8 ? 128 : 8;

  TileRows t{};
  t.num_rows = num_rows;
  t.num_tiles = (num_rows + kTileRows - 1) / kTileRows;
  t.rows = (num_rows + t.num_tiles - 1) / t.num_tiles;
  t.depth = tile_depth(GROUPED ? k.group_words : kTileWords);
  t.num_steps = (num_words + t.depth - 1) / t.depth;
  t.x = scratch.tile_rows;
  t.scales = (float*)(t.x + t.num_tiles * t.num_steps * t.step_words());
  t.corrections = t.scales + (GROUPED ? m.num_groups : 0) * t.padded();
  if (scratch.tiles_of != scratch.rows_of) {
    fill_tile_rows(t, m, k.rows);
    scratch.tiles_of = scratch.rows_of;
  }
  const bool is_alone = t.num_tiles == 1;
  shape_tiles_for(t.rows, t.depth, is_alone);

  Unpacker unpacker{&m, nullptr, nullptr, k.zeros_stride, is_alone ? kQuad : 2, subs, 0};
  // Rows of one or two tiles go through a quad at once, more a chunk after the other.
  const bool is_short = t.num_tiles <= 2;
  int64_t chunk = kTileChunk;
  if (GROUPED) chunk = chunk < k.group_words ? k.group_words : chunk / k.group_words * k.group_words;
  const int64_t ring = is_short ? 2 : chunk / k.group_words;
  if (is_short && (GROUPED || !unpacks)) chunk = t.num_steps * t.depth;
  const auto run = [&](int tile, int64_t step, int64_t words, TilePanels p, int64_t panel, float* c) {
    Block b = k;
    b.c = c + tile * t.rows * k.c_stride + panel * kPanel;
    skip_panels(b, panel);
    const bool is_pair = t.num_tiles - tile >= 2;
    const auto runs = [&](auto tiles, auto panels) {
      constexpr int kT = decltype(tiles)::value, kP = decltype(panels)::value;
      if constexpr (GROUPED)
        run_groups<A, kT, kP>(t, b, tile, step, words, p, unpacker, scratch.unpacked, ring);
      else run_whole<A, kT, kP>(t, b, tile, step, words, p);
    };
    if (is_alone) runs(Number<1>{}, Number<4>{});
    else if (is_pair) runs(Number<2>{}, Number<2>{});
    else runs(Number<1>{}, Number<2>{});
  };

  float* c = k.c;
  const int beside = unpacker.num_panels;
  unpacker.panel_stride = (GROUPED ? k.group_words : chunk) * kWordBytes;
  // Many long rows do not fit a cache: all panels go past a part of their words at a time.
  const int64_t fit = kRowsBytes / 4 / t.padded() / chunk * chunk;
  const int64_t part = is_short ? num_words : fit > chunk ? fit : chunk;
  for (int64_t first = 0; first < num_words; first += part) {
    for (int64_t panel = 0; panel < num_panels; panel += beside) {
      const uint8_t* quad = panel_at(m, expert, first_panel + panel / kQuad * kQuad);
      const int64_t last = first + part < num_words ? first + part : num_words;
      for (int64_t begin = first; begin < last; begin += chunk) {
        const int64_t end = begin + chunk < last ? begin + chunk : last;
        TilePanels p{};
        if (unpacks) {
          unpacker.panels = quad + panel % kQuad * kWordBytes;
          unpacker.zeros = k.zeros ? k.zeros + panel * k.zeros_stride : nullptr;
          if (!GROUPED) unpacker.template run<A>(begin, end, scratch.unpacked);
          p.values = scratch.unpacked;
          p.word_stride = kWordBytes;
          p.panel_stride = unpacker.panel_stride;
        } else {
          p.values = quad + panel % kQuad * kWordBytes + begin * kQuadBytes;
          p.word_stride = kQuadBytes;
          p.panel_stride = kWordBytes;
        }
        // The first tiles of rows fetch a share of the next quad: of this part of it.
        const int64_t steps = (end - begin + t.depth - 1) / t.depth;
        const int64_t lines = (last - first) / subs, share = (begin - first) / subs;
        const int64_t line = is_alone ? share : (panel % kQuad * lines / 2 + share) / 2;
        p.fetch = quad + quad_bytes + first / subs * kQuadBytes + line * kWordBytes;
        p.fetch_lane = lines * kWordBytes;
        p.fetch_lines = ((end - begin) / subs / (is_alone ? 1 : 2) + steps - 1) / steps;
        k.accumulate = begin > 0;
        for (int tile = 0; tile < t.num_tiles; tile += 2, p.fetch_lines = 0)
          run(tile, begin / t.depth, end - begin, p, panel, c);
      }
    }
  }
  release_tiles();
}

}  // namespace
#endif
