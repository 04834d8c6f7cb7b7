// Rows times panels in tiles of AMX: 16 words of a panel are one, and so are 16 words of 16 rows.
//
// Integers are summed exactly and groups are added up as in block.h, so that int8 products are
// bitwise those of its blocks. Sums of bf16 are made in another order; they are made here whatever
// the number of rows, so that a row's result does not depend on the rows beside it.
#pragma once

#if defined(MIXTURA_TILES)
namespace {

constexpr int kTileBlock = 2 * kTileRows;                  // rows that are multiplied side by side
constexpr int64_t kSumsStride = 2 * kPanel * 4;            // bytes: of a row and two panels
constexpr int64_t kUnpackedWords = 128;                    // of each of two panels: 16 KiB
static_assert(kRowChunk % kTileRows == 0, "the rows' buffer ends with a tile");

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

static void shape_tiles_for(int depth) {
  TileShapes shapes{};
  shapes.palette = 1;
  for (int t = 0; t < kTiles; ++t) {  // 0 .. 3: sums; 4, 5: rows; 6, 7: panels
    shapes.rows[t] = (uint8_t)(t < 6 ? kTileRows : depth);
    shapes.row_bytes[t] = (uint16_t)(t == 4 || t == 5 ? 4 * depth : kWordBytes);
  }
  shape_tiles(shapes);
}

template <Arithmetic A, int C, int X, int W> FN void dot_tiles() {
  if constexpr (A == Arithmetic::INT8) dot_tiles_int8<C, X, W>();
  else dot_tiles_bf16<C, X, W>();
}

struct TileRun {
  const uint32_t* x;       // of the first row and word
  int64_t x_stride;        // words
  const uint8_t* values;   // of the first word of the first of two panels
  int64_t panel_stride, word_stride;  // bytes
  int64_t words;
  int depth;
  const uint8_t* fetch;    // what is read next of the first panel; null: nothing is
  int64_t fetch_words;     // for each tile of words
};

// 16 or 32 rows times two panels, into sums[row][32].
template <Arithmetic A, int ROW_TILES> static void run_tiles(const TileRun& r, uint8_t* sums) {
  zero_tile<0>();
  zero_tile<1>();
  if constexpr (ROW_TILES == 2) {
    zero_tile<2>();
    zero_tile<3>();
  }
  const int64_t row_stride = 4 * r.x_stride;
  const uint8_t* fetch = r.fetch;
  for (int64_t word = 0; word < r.words; word += r.depth) {
    const uint8_t* first = r.values + word * r.word_stride;
    const uint8_t* second = first + r.panel_stride;
    int64_t word_stride = r.word_stride;
    alignas(64) uint8_t ends[2][kTileWords * kWordBytes];
    if (r.words - word < r.depth) {  // the end of the panels; that of the rows has zeros behind it
      __builtin_memset(ends, 0, sizeof ends);
      for (int64_t n = 0; n < r.words - word; ++n) {
        __builtin_memcpy(ends[0] + n * kWordBytes, first + n * r.word_stride, kWordBytes);
        __builtin_memcpy(ends[1] + n * kWordBytes, second + n * r.word_stride, kWordBytes);
      }
      first = ends[0];
      second = ends[1];
      word_stride = kWordBytes;
    }
    load_tile<6>(first, word_stride);
    load_tile<7>(second, word_stride);
    load_tile<4>(r.x + word, row_stride);
    dot_tiles<A, 0, 4, 6>();
    dot_tiles<A, 1, 4, 7>();
    if constexpr (ROW_TILES == 2) {
      load_tile<5>(r.x + kTileRows * r.x_stride + word, row_stride);
      dot_tiles<A, 2, 5, 6>();
      dot_tiles<A, 3, 5, 7>();
    }
    if (fetch == nullptr) continue;
    for (int64_t n = 0; n < r.fetch_words; ++n, fetch += kQuadBytes) {
      __builtin_prefetch(fetch, 0, 2);
      __builtin_prefetch(fetch + kWordBytes, 0, 2);
    }
  }
  store_tile<0>(sums, kSumsStride);
  store_tile<1>(sums + kWordBytes, kSumsStride);
  if constexpr (ROW_TILES == 2) {
    store_tile<2>(sums + kTileRows * kSumsStride, kSumsStride);
    store_tile<3>(sums + kTileRows * kSumsStride + kWordBytes, kSumsStride);
  }
}

// Adds the sums of MR rows, of one group where there are any, to the totals.
template <class Op, bool GROUPED, int MR>
FN void add_sums(const Block& k, int row, const uint8_t* sums, int64_t group) {
  const uint32_t* x[MR];
  F acc[MR][2];
  typename Op::Acc t[MR][2];
  float* c = k.c + row * k.c_stride;
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    x[m] = k.rows[row + m];
#pragma GCC unroll 8
    for (int n = 0; n < 2; ++n) {
      const uint8_t* sum = sums + (row + m) * kSumsStride + n * kWordBytes;
      acc[m][n] = k.accumulate ? f_load(c + m * k.c_stride + n * kPanel) : f_zero();
      if constexpr (Op::ARITHMETIC == Arithmetic::INT8)
        t[m][n] = i_add(first_sum(k, x[m], group), i_load(sum));
      else
        t[m][n] = f_load((const float*)sum);
    }
  }
  if constexpr (GROUPED) add_group<Op, MR, 2>(acc, t, x, k, group);
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < 2; ++n) {
      if constexpr (!GROUPED) acc[m][n] = f_add(acc[m][n], t[m][n]);
      f_store(c + m * k.c_stride + n * kPanel, acc[m][n]);
    }
  }
}

template <Arithmetic A, bool GROUPED>
static void add_span(const TileRun& r, const Block& k, int num_rows, int64_t group) {
  alignas(64) uint8_t sums[kTileBlock * kSumsStride];
  if (num_rows > kTileRows) run_tiles<A, 2>(r, sums);
  else run_tiles<A, 1>(r, sums);
  int row = 0;
  for (; row + 4 <= num_rows; row += 4) add_sums<Raw<A>, GROUPED, 4>(k, row, sums, group);
  for (; row < num_rows; ++row) add_sums<Raw<A>, GROUPED, 1>(k, row, sums, group);
}

// `k` as `multiply` has filled it; words here are those of rows.
static void multiply_tiles(const Matrix& m, int64_t expert, int64_t first_panel, Block k,
                           int64_t num_panels, int num_rows, Scratch& scratch) {
  const int subs = subs_per_word(m.code, m.arithmetic);
  const int64_t num_words = m.num_words * subs;
  const bool unpacks = needs_unpacking(m);
  const uint32_t* const* rows = k.rows;
  float* c = k.c;
  const auto add = m.arithmetic == Arithmetic::INT8 ? &add_span<Arithmetic::INT8, true>
                   : m.is_grouped                   ? &add_span<Arithmetic::BF16, true>
                                                    : &add_span<Arithmetic::BF16, false>;
  // A chunk is unpacked at once; spans of it are added up in the tiles. A group has at most 256
  // columns, and so fits a chunk. Both are the same for any number of rows.
  int64_t chunk = unpacks ? kUnpackedWords : num_words;
  int64_t span = chunk;
  if (m.is_grouped) {
    span = m.group_words * subs;
    chunk = chunk < span ? span : chunk / span * span;
  }
  TileRun r{};
  r.depth = tile_depth(m.is_grouped ? span : kTileWords);
  r.x_stride = tile_row_words(m);
  // What follows the last row in its tile is multiplied too, and read by no one.
  for (int row = 0; row < num_rows; ++row) {
    uint32_t* x = scratch.tile_rows + row * r.x_stride;
    __builtin_memcpy(x, rows[row], num_words * 4);
    __builtin_memset(x + num_words, 0, (r.x_stride - num_words) * 4);
  }
  shape_tiles_for(r.depth);
  for (int64_t panel = 0; panel < num_panels; panel += 2) {
    k.values = panel_at(m, expert, first_panel + panel);
    for (int64_t begin = 0; begin < num_words; begin += chunk) {
      const int64_t end = begin + chunk < num_words ? begin + chunk : num_words;
      const uint8_t* chunk_values = k.values + begin / subs * kQuadBytes;
      const uint8_t* fetch = chunk_values + kAhead;
      r.panel_stride = kWordBytes;
      r.word_stride = kQuadBytes;
      r.fetch_words = r.depth / subs;
      if (unpacks) {
        r.panel_stride = (end - begin) * kWordBytes;
        for (int n = 0; n < 2; ++n)
          unpack_panel(m, k.values + n * kWordBytes,
                       k.zeros ? k.zeros + n * k.zeros_stride : nullptr, begin / subs, end / subs,
                       scratch.unpacked + n * r.panel_stride);
        chunk_values = scratch.unpacked;
        r.word_stride = kWordBytes;
        fetch = k.values + end / subs * kQuadBytes;
      }
      for (int row = 0; row < num_rows; row += kTileBlock) {
        const int count = num_rows - row < kTileBlock ? num_rows - row : kTileBlock;
        k.rows = rows + row;
        k.c = c + row * k.c_stride + panel * kPanel;
        for (int64_t word = begin; word < end; word += span) {
          r.x = scratch.tile_rows + row * r.x_stride + word;
          r.values = chunk_values + (word - begin) * r.word_stride;
          r.words = word + span < end ? span : end - word;
          r.fetch = row == 0 ? fetch + (word - begin) / subs * kQuadBytes : nullptr;
          k.accumulate = word > 0;
          add(r, k, count, word / span);
        }
      }
    }
    k.scales += 2 * k.scales_stride;
    if (k.zeros) k.zeros += 2 * k.zeros_stride;
  }
  release_tiles();
}

}  // namespace
#endif
