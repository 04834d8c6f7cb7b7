// The tiles of AMX: eight registers of up to 16 rows of 64 bytes, as instructions or emulated.
//
// The emulation does in scalar code what the instructions' manual says, traps where they would
// fault, and is what the tests run: nothing here depends on which of the two is compiled.
#pragma once

#if defined(MIXTURA_EMULATE_AMX) || \
    (defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__))
#define MIXTURA_TILES 1

namespace {

// A number that is known when compiled.
template <int N> struct Number {
  static constexpr int value = N;
};

constexpr int kTiles = 8;
constexpr int kTileRows = 16;
constexpr int kTileWords = 16;  // 32 bits each, of a row

// What LDTILECFG reads.
struct TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64, "LDTILECFG reads 64 bytes");

#if defined(MIXTURA_EMULATE_AMX)

struct EmulatedTiles {
  TileShapes shapes;
  alignas(64) uint8_t bytes[kTiles][kTileRows][4 * kTileWords];
};

thread_local EmulatedTiles emulated_tiles;

FN void fault_unless(bool is_allowed) {
  if (!is_allowed) __builtin_trap();
}

static void shape_tiles(const TileShapes& shapes) {
  for (int t = 0; t < kTiles; ++t)
    fault_unless(shapes.rows[t] <= kTileRows && shapes.row_bytes[t] <= 4 * kTileWords);
  fault_unless(shapes.palette == 1 && shapes.start_row == 0);
  emulated_tiles = {};
  emulated_tiles.shapes = shapes;
}

static void release_tiles() { emulated_tiles = {}; }

template <int T> static void zero_tile() {
  EmulatedTiles& e = emulated_tiles;
  fault_unless(e.shapes.rows[T] && e.shapes.row_bytes[T]);
  __builtin_memset(e.bytes[T], 0, sizeof e.bytes[T]);
}

template <int T> static void load_tile(const void* from, int64_t stride) {
  zero_tile<T>();
  EmulatedTiles& e = emulated_tiles;
  for (int row = 0; row < e.shapes.rows[T]; ++row)
    __builtin_memcpy(e.bytes[T][row], (const uint8_t*)from + row * stride, e.shapes.row_bytes[T]);
}

template <int T> static void store_tile(void* to, int64_t stride) {
  EmulatedTiles& e = emulated_tiles;
  fault_unless(e.shapes.rows[T] && e.shapes.row_bytes[T]);
  for (int row = 0; row < e.shapes.rows[T]; ++row)
    __builtin_memcpy((uint8_t*)to + row * stride, e.bytes[T][row], e.shapes.row_bytes[T]);
}

// Row `row` of a tile of products, after what the instructions check of their three tiles.
template <int C, int A, int B> FN uint8_t* sums_of_row(int row) {
  static_assert(C != A && C != B && A != B, "an instruction's tiles are three");
  EmulatedTiles& e = emulated_tiles;
  const TileShapes& s = e.shapes;
  fault_unless(s.rows[C] && s.row_bytes[C] && s.row_bytes[A]);
  fault_unless(s.rows[C] == s.rows[A] && s.row_bytes[C] == s.row_bytes[B]);
  fault_unless(s.row_bytes[A] == 4 * s.rows[B]);
  return e.bytes[C][row];
}

FN float without_denormals(float x) { return __builtin_fabsf(x) < 0x1p-126f ? 0.0f : x; }

FN float bf16_to_float(uint32_t bits) {
  float x;
  bits <<= 16;
  __builtin_memcpy(&x, &bits, 4);
  return without_denormals(x);
}

// TDPBF16PS: the first and the second of all pairs are summed apart, then together, then added.
template <int C, int A, int B> static void dot_tiles_bf16() {
  const EmulatedTiles& e = emulated_tiles;
  const int words = e.shapes.row_bytes[A] / 4, columns = e.shapes.row_bytes[C] / 4;
  for (int m = 0; m < e.shapes.rows[C]; ++m) {
    float* c = (float*)sums_of_row<C, A, B>(m);
    const uint16_t* a = (const uint16_t*)e.bytes[A][m];
    float sums[2][kTileWords] = {};
    for (int k = 0; k < words; ++k) {
      const uint16_t* b = (const uint16_t*)e.bytes[B][k];
      for (int j = 0; j < 2; ++j)
        for (int n = 0; n < columns; ++n)
          sums[j][n] = without_denormals(__builtin_fmaf(
              bf16_to_float(a[2 * k + j]), bf16_to_float(b[2 * n + j]), sums[j][n]));
    }
    for (int n = 0; n < columns; ++n)
      c[n] = without_denormals(without_denormals(c[n]) +
                               without_denormals(sums[0][n] + sums[1][n]));
  }
}

// TDPBSSD: all bytes are signed.
template <int C, int A, int B> static void dot_tiles_int8() {
  const EmulatedTiles& e = emulated_tiles;
  const int words = e.shapes.row_bytes[A] / 4, columns = e.shapes.row_bytes[C] / 4;
  for (int m = 0; m < e.shapes.rows[C]; ++m) {
    int32_t* c = (int32_t*)sums_of_row<C, A, B>(m);
    const int8_t* a = (const int8_t*)e.bytes[A][m];
    for (int k = 0; k < words; ++k) {
      const int8_t* b = (const int8_t*)e.bytes[B][k];
      for (int n = 0; n < columns; ++n)
        for (int j = 0; j < 4; ++j) c[n] += a[4 * k + j] * b[4 * n + j];
    }
  }
}

#else

// Of assembly, as the intrinsics of GCC do not say that a tile's load reads memory.
FN void shape_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }

FN void release_tiles() { asm volatile("tilerelease"); }

template <int T> FN void zero_tile() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }

template <int T> FN void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T> FN void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}

// C += A times B, in pairs of bf16.
template <int C, int A, int B> FN void dot_tiles_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// C += A times B, in fours of signed bytes.
template <int C, int A, int B> FN void dot_tiles_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace
#endif
