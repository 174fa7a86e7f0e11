// A matrix product of any size out of register tiles: columns in panels, rows in tiles of even height.

// Columns are cut into panels of 1..kMaxUnits units, wide ones first and without a lone last unit where a wider
// split exists: one narrow panel costs nearly as many loads as a wide one.
inline int64_t unit_count(int64_t columns) { return (columns + kUnit - 1) / kUnit; }

inline int panel_units(int64_t units_left) {
  if (units_left <= kMaxUnits) return static_cast<int>(units_left);
  return units_left == kMaxUnits + 1 && kMaxUnits > 2 ? kMaxUnits - 1 : kMaxUnits;
}

inline int64_t padded_columns(int64_t columns) { return unit_count(columns) * kUnit; }

inline void clear(float* words, int64_t n) { __builtin_memset(words, 0, static_cast<size_t>(n) * 4); }

// Short runs: a call of memcpy would cost as much as the copy.
inline void copy_words(const float* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + Wide::kLanes <= n; i += Wide::kLanes) Wide::load(from + i).store(to + i);
  if (i < n) Wide::load_first(from + i, static_cast<int>(n - i)).store_first(to + i, static_cast<int>(n - i));
}

struct Product {
  // Rows come in segments (image rows); `rows` of them each.
  int64_t segments = 1, rows = 0;
  int tallest = kMaxRows;  // rows of a tile
  const char* a = nullptr;
  int64_t a_row = 0, a_segment = 0, a_k = 4;
  int64_t k = 0, taps = 1;
  const int64_t* a_tap = nullptr;
  const int64_t* b_tap = nullptr;  // packed B: in steps of k; else bytes
  const char* b = nullptr;
  bool b_packed = true;     // panels of [packed_taps * k][panel width] one after the other
  int64_t packed_taps = 0;  // 0: as many as taps
  int64_t b_k = 0;          // step of k where B is not packed
  int64_t columns = 0;
  const float* init = nullptr;
  Init init_mode = Init::kZero;
  char* c = nullptr;
  int64_t c_row = 0, c_segment = 0;
  int64_t c_column = 4;  // bytes a column
  Store store = Store::kFloat;
  const char* residual = nullptr;  // added before the store: laid out as C, elements as stored
  bool relu = false;
  Prefetch read, write;  // spread over the tiles and taps
};

// Offsets of a product with one tap.
constexpr int64_t kNoOffset[1] = {0};

// Even heights for the tiles of n rows; rows of a pair stay together.
struct RowSplit {
  int tiles, height, taller, step;  // `taller` tiles have one step more than `height`
  RowSplit(int64_t n, bool pairs, int tallest = kMaxRows) : step(pairs ? 2 : 1) {
    const uint32_t steps = static_cast<uint32_t>((n + step - 1) / step), most = static_cast<uint32_t>(tallest / step);
    const uint32_t count = (steps + most - 1) / most;
    tiles = static_cast<int>(count);
    height = static_cast<int>(steps / count) * step;
    taller = static_cast<int>(steps % count);
  }
};

// Every part of `parts` does an even share of the product's tiles.
template <AOrder kOrder, bool kMaskB, class Dot, bool kFetch = false>
inline void multiply(const Product& p, int64_t part = 0, int64_t parts = 1) {
  if (p.rows <= 0 || p.segments <= 0 || p.columns <= 0) return;
  const bool pairs = p.store == Store::kBfloat16Pairs;
  const int64_t group = p.rows * 2 <= p.tallest && !pairs ? 2 : 1;  // segments a tile
  const int64_t groups = group == 2 ? (p.segments + 1) / 2 : p.segments;
  const RowSplit split(p.rows, pairs, p.tallest);
  const int64_t total_units = unit_count(p.columns);
  const int64_t per_unit = groups * split.tiles;
  const int64_t begin = parts == 1 ? 0 : total_units * per_unit * part / parts;
  const int64_t end = parts == 1 ? total_units * per_unit : total_units * per_unit * (part + 1) / parts;
  const int64_t a_row = kOrder == AOrder::kAlongK ? p.a_row : 4;
  Tile t;
  t.a_row = p.a_row;
  t.a_k = p.a_k;
  t.k = p.k;
  t.taps = p.taps;
  t.a_tap = p.a_tap ? p.a_tap : kNoOffset;
  t.b_tap = p.b_tap ? p.b_tap : kNoOffset;
  t.c_row = p.c_row;
  t.init_mode = p.init_mode;
  t.store = p.store;
  t.relu = p.relu;
  if constexpr (kFetch) {
    const int64_t panels = (total_units + kMaxUnits - 1) / kMaxUnits;
    const int64_t steps = panels * per_unit * (p.taps > 0 ? p.taps : 1);  // a product without taps writes zeros
    t.read = p.read;
    t.write = p.write;
    t.read.count = (p.read.count + steps - 1) / steps;
    t.write.count = (p.write.count + steps - 1) / steps;
  }
  for (int64_t unit = 0; unit < total_units;) {
    const int units = panel_units(total_units - unit);
    const int64_t column = unit * kUnit;
    const int64_t width = units * kUnit;
    t.columns = static_cast<int>(p.columns - column < width ? p.columns - column : width);
    if (p.b_packed) {
      t.b = p.b + column * 4 * p.k * (p.packed_taps ? p.packed_taps : p.taps);
      t.b_k = width * 4;
      t.b_tap_scale = t.b_k;
    } else {
      t.b = p.b + column * 4;
      t.b_k = p.b_k;
      t.b_tap_scale = 1;
    }
    if (p.init_mode == Init::kColumns) t.init = p.init + column;
    int64_t at = unit * per_unit;  // tiles are numbered so that each counts its width
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t segment = g * group;
      const bool two = group == 2 && segment + 1 < p.segments;
      t.a_jump = two ? p.a_segment - p.rows * a_row : 0;
      t.c_jump = two ? p.c_segment - p.rows * p.c_row : 0;
      const char* a = p.a + segment * p.a_segment;
      char* c = p.c + segment * p.c_segment + column * p.c_column;
      int64_t first = 0;
      for (int tile = 0; tile < split.tiles; ++tile, at += units) {
        int64_t height = split.height + (tile < split.taller ? split.step : 0);
        const int64_t row = first;
        first += height;
        if (at < begin || at >= end) continue;
        if (row + height > p.rows) height = p.rows - row;  // an odd last row of pairs
        t.a = a + row * a_row;
        t.c = c + (pairs ? row / 2 : row) * p.c_row;
        if (p.residual) t.residual = p.residual + (t.c - p.c);
        if (p.init_mode == Init::kRows) t.init = p.init + row;
        tile_function<kOrder, kMaskB, kFetch, Dot>(static_cast<int>(two ? 2 * height : height), units)(t);
        if constexpr (kFetch) {
          t.read.at += t.read.count * p.taps * t.read.pitch;
          t.write.at += t.write.count * p.taps * t.write.pitch;
        }
      }
    }
    unit += units;
  }
}

#if defined(TC_AVX512) || defined(TC_AVX2)
// A block of at most eight by eight words.
template <bool kWhole>
TC_INLINE void transpose_block(const float* from, int64_t from_row, int rows, int columns, float* to, int64_t to_row) {
  __m256 r[8], s[8];
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q) {
    if constexpr (kWhole) r[q] = Half::load(from + q * from_row).v;
    else r[q] = q < rows ? Half::load_first(from + q * from_row, columns).v : Half::zero().v;
  }
#pragma GCC unroll 4
  for (int q = 0; q < 8; q += 2) {
    s[q] = _mm256_unpacklo_ps(r[q], r[q + 1]);
    s[q + 1] = _mm256_unpackhi_ps(r[q], r[q + 1]);
  }
#pragma GCC unroll 2
  for (int q = 0; q < 8; q += 4) {
    r[q] = _mm256_shuffle_ps(s[q], s[q + 2], 0x44);
    r[q + 1] = _mm256_shuffle_ps(s[q], s[q + 2], 0xee);
    r[q + 2] = _mm256_shuffle_ps(s[q + 1], s[q + 3], 0x44);
    r[q + 3] = _mm256_shuffle_ps(s[q + 1], s[q + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    s[q] = _mm256_permute2f128_ps(r[q], r[q + 4], 0x20);
    s[q + 4] = _mm256_permute2f128_ps(r[q], r[q + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q) {
    if constexpr (kWhole) Half{s[q]}.store(to + q * to_row);
    else if (q < columns) Half{s[q]}.store_first(to + q * to_row, rows);
  }
}
#endif

// Transposes 32-bit words: to[j * to_row + i] = from[i * from_row + j] (strides in words).
inline void transpose_words(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to,
                            int64_t to_row) {
#if defined(TC_AVX512) || defined(TC_AVX2)
  for (int64_t i = 0; i < rows; i += 8) {
    const int height = static_cast<int>(rows - i < 8 ? rows - i : 8);
    for (int64_t j = 0; j < columns; j += 8) {
      const int width = static_cast<int>(columns - j < 8 ? columns - j : 8);
      const float* source = from + i * from_row + j;
      float* target = to + j * to_row + i;
      if (height == 8 && width == 8) transpose_block<true>(source, from_row, 8, 8, target, to_row);
      else transpose_block<false>(source, from_row, height, width, target, to_row);
    }
  }
#else
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * to_row + i] = from[i * from_row + j];
  }
#endif
}
