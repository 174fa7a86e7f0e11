// A matrix product of any size out of register tiles: columns in panels, rows in tiles of even height.

// Columns are cut into panels of 1..kMaxUnits units, wide ones first and without a lone last unit where a wider
// split exists: one narrow panel costs nearly as many loads as a wide one.
inline int64_t unit_count(int64_t columns) { return (columns + kUnit - 1) / kUnit; }

inline int panel_units(int64_t units_left) {
  if (units_left <= kMaxUnits) return static_cast<int>(units_left);
  return units_left == kMaxUnits + 1 && kMaxUnits > 2 ? kMaxUnits - 1 : kMaxUnits;
}

inline int64_t padded_columns(int64_t columns) { return unit_count(columns) * kUnit; }

struct Product {
  // Rows come in segments (image rows); `rows` of them each.
  int64_t segments = 1, rows = 0;
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
};

// Offsets of a product with one tap.
constexpr int64_t kNoOffset[1] = {0};

// Pieces of the product: every `part` of `parts` does an even share of (panel, segment group) pairs.
template <AOrder kOrder, bool kMaskB, class Dot>
inline void multiply(const Product& p, int64_t part = 0, int64_t parts = 1) {
  if (p.rows <= 0 || p.segments <= 0 || p.columns <= 0) return;
  const bool pairs = p.store == Store::kBfloat16Pairs;
  const int64_t group = p.rows * 2 <= kMaxRows && !pairs ? 2 : 1;  // segments a tile
  const int64_t groups = (p.segments + group - 1) / group;
  // Segments of one long row run are cut further when there are several parts to fill.
  int64_t tiles = (p.rows + kMaxRows - 1) / kMaxRows;
  if (pairs) tiles = (p.rows / 2 + kMaxRows / 2 - 1 + p.rows % 2) / (kMaxRows / 2);
  const int64_t total_units = unit_count(p.columns);
  const int64_t cost = total_units * groups * tiles;
  const int64_t begin = cost * part / parts, end = cost * (part + 1) / parts;
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
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t segment = g * group;
      const bool two = group == 2 && segment + 1 < p.segments;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t at = unit * groups * tiles + (g * tiles + tile) * units;
        if (at < begin || at >= end) continue;
        int64_t first, last;
        if (pairs) {
          const int64_t row_pairs = (p.rows + 1) / 2;
          first = 2 * (row_pairs * tile / tiles);
          last = 2 * (row_pairs * (tile + 1) / tiles);
          if (last > p.rows) last = p.rows;
        } else {
          first = p.rows * tile / tiles;
          last = p.rows * (tile + 1) / tiles;
        }
        const int height = static_cast<int>(two ? 2 * p.rows : last - first);
        t.a = p.a + segment * p.a_segment + first * (kOrder == AOrder::kAlongK ? p.a_row : 4);
        t.a_jump = two ? p.a_segment - p.rows * (kOrder == AOrder::kAlongK ? p.a_row : 4) : 0;
        t.c = p.c + segment * p.c_segment + (pairs ? first / 2 : first) * p.c_row + column * p.c_column;
        t.c_jump = two ? p.c_segment - p.rows * p.c_row : 0;
        t.init = p.init_mode == Init::kColumns ? p.init + column : p.init ? p.init + first : nullptr;
        tile_function<kOrder, kMaskB, Dot>(height, units)(t);
      }
    }
    unit += units;
  }
}

// Transposes 32-bit words: to[j * to_row + i] = from[i * from_row + j] (strides in words).
inline void transpose_words(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to,
                            int64_t to_row) {
  int64_t i = 0;
#if defined(TC_AVX512) || defined(TC_AVX2)
  for (; i + 8 <= rows; i += 8) {
    int64_t j = 0;
    for (; j + 8 <= columns; j += 8) {
      __m256 r[8], s[8];
#pragma GCC unroll 8
      for (int q = 0; q < 8; ++q) r[q] = _mm256_loadu_ps(from + (i + q) * from_row + j);
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
        _mm256_storeu_ps(to + (j + q) * to_row + i, _mm256_permute2f128_ps(r[q], r[q + 4], 0x20));
        _mm256_storeu_ps(to + (j + q + 4) * to_row + i, _mm256_permute2f128_ps(r[q], r[q + 4], 0x31));
      }
    }
    for (; j < columns; ++j) {
      for (int q = 0; q < 8; ++q) to[j * to_row + i + q] = from[(i + q) * from_row + j];
    }
  }
#endif
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * to_row + i] = from[i * from_row + j];
  }
}
