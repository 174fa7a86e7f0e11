// x times a packed sparse matrix, with rows of x side by side: each value is broadcast and multiplies one column of
// them, which is contiguous once x is turned. As many rows at a time as the second cache holds.

// Rows of a block, at most `most`: whole vectors, one, two or four.
inline int64_t turned_lanes(int64_t rows, int64_t columns) {
  constexpr int64_t kCacheWords = 64 * 1024;
  int64_t vectors = 4;
  while (vectors > 1 && ((vectors / 2) * Wide::kLanes >= rows || vectors * Wide::kLanes * columns > kCacheWords))
    vectors /= 2;
  return vectors * Wide::kLanes;
}

// The first of the matrix's rows that part `part` of `parts` does: shares of equal work.
inline int64_t sparse_share(const SparseMatrix& s, int64_t part, int64_t parts) {
  constexpr int64_t kRowWork = 16;  // what a row costs beside its values
  const int64_t segments = s.segments(), target = (s.count + kRowWork * s.m) * part / parts;
  int64_t low = 0, high = s.m;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (s.offsets[middle * segments] + kRowWork * middle < target) low = middle + 1;
    else high = middle;
  }
  return part == parts ? s.m : low;
}

// Columns of the bits of one segment; room for exactly as many as there are.
inline void decode_bits(const uint8_t* bits, int64_t bytes, uint16_t* to, const uint16_t* end) {
#if defined(TC_AVX512)
  const __m512i step = _mm512_set1_epi32(16);
  __m512i column = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < bytes; i += 2, column = _mm512_add_epi32(column, step)) {
    const unsigned word = bits[i] | (i + 1 < bytes ? bits[i + 1] << 8 : 0);
    const int count = __builtin_popcount(word);
    const __m256i found = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(static_cast<__mmask16>(word), column));
    if (end - to >= 16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), found);
    else _mm256_mask_storeu_epi16(to, Wide::mask(count), found);
    to += count;
  }
#else
  (void)end;
  for (int64_t i = 0; i < bytes; ++i) {
    for (unsigned left = bits[i]; left != 0; left &= left - 1)
      *to++ = static_cast<uint16_t>(8 * i + __builtin_ctz(left));
  }
#endif
}

// Columns of rows [begin, end) of the matrix.
inline void decode_rows(const SparseMatrix& s, int64_t begin, int64_t end, uint16_t* columns) {
  const int64_t segments = s.segments();
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t g = 0; g < segments; ++g) {
      const int32_t* at = s.offsets + i * segments + g;
      decode_bits(s.bits + i * s.bit_row() + g * (kSegment / 8), (s.segment_width(g) + 7) / 8, columns + at[0],
                  columns + at[1]);
    }
  }
}

// Columns [begin, end) of some rows, side by side: to[column * lanes + row]; lanes without a row are zero.
template <class E>
inline void turn_rows(const E* from, int64_t from_row, int64_t rows, int64_t begin, int64_t end, float* to,
                      int64_t lanes) {
  if (rows < lanes) clear(to + begin * lanes, (end - begin) * lanes);
  if constexpr (sizeof(E) == 4) {
    transpose_words(from + begin, from_row, rows, end - begin, to + begin * lanes, lanes);
  } else {
    constexpr int64_t kBlock = 32;
    float wide[4 * Wide::kLanes * kBlock];
    for (int64_t c = begin; c < end; c += kBlock) {
      const int64_t some = end - c < kBlock ? end - c : kBlock;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < some; ++i) wide[r * kBlock + i] = to_float(from[r * from_row + c + i]);
      }
      transpose_words(wide, kBlock, rows, some, to + c * lanes, lanes);
    }
  }
}

inline SparseLinearPlan sparse_linear_plan(const SparseLinearParams& p, int64_t threads) {
  SparseLinearPlan g;
  g.parts = threads;
  g.lanes = turned_lanes(p.rows, p.sparse.n);
  g.blocks = (p.rows + g.lanes - 1) / g.lanes;
  g.phases = 1 + 2 * g.blocks;
  g.columns = round_up(p.sparse.n * g.lanes, 16);  // behind the turned rows
  g.own = g.columns + round_up(p.sparse.bits ? (p.sparse.count + 1) / 2 : 0, 16);
  g.own_words = 2 * kTurnedRows * g.lanes;
  g.scratch_bytes = static_cast<size_t>(g.own + g.own_words * threads) * 4;
  return g;
}

template <class E>
class SparseLinear {
 public:
  SparseLinear(const SparseLinearParams& p, const SparseLinearPlan& g, int64_t part)
      : p_(p), s_(p.sparse), g_(g), part_(part), turned_(static_cast<float*>(p.scratch)) {
    decoded_ = reinterpret_cast<uint16_t*>(turned_ + g.columns);
    own_ = turned_ + g.own + part * g.own_words;
  }

  void run(int64_t phase) {
    if (phase == 0) {
      if (s_.bits) decode_rows(s_, share(part_), share(part_ + 1), decoded_);
      return;
    }
    const int64_t first = (phase - 1) / 2 * g_.lanes;
    const int64_t rows = p_.rows - first < g_.lanes ? p_.rows - first : g_.lanes;
    if (phase % 2 != 0) {
      turn_rows(static_cast<const E*>(p_.x) + first * p_.x_row, p_.x_row, rows, s_.n * part_ / g_.parts,
                s_.n * (part_ + 1) / g_.parts, turned_, g_.lanes);
    } else if (g_.lanes == Wide::kLanes) {
      multiply<1>(first, rows);
    } else if (g_.lanes == 2 * Wide::kLanes) {
      multiply<2>(first, rows);
    } else {
      multiply<4>(first, rows);
    }
  }

 private:
  int64_t share(int64_t part) const { return sparse_share(s_, part, g_.parts); }

  template <int kVectors>
  void multiply(int64_t first, int64_t rows) const {
    const int64_t begin = share(part_), end = share(part_ + 1);
    float *sums = own_, *turned_back = own_ + kTurnedRows * g_.lanes;
    for (int64_t i = begin; i < end; i += kTurnedRows) {
      const int64_t some = end - i < kTurnedRows ? end - i : kTurnedRows;
      for (int64_t j = 0; j < some; ++j) multiply_row<kVectors>(i + j, sums + j * g_.lanes);
      transpose_words(sums, g_.lanes, some, g_.lanes, turned_back, kTurnedRows);
      for (int64_t r = 0; r < rows; ++r) {
        E* y = static_cast<E*>(p_.y) + (first + r) * s_.m + i;
        for (int64_t j = 0; j < some; j += Wide::kLanes) {
          const int lanes = static_cast<int>(some - j < Wide::kLanes ? some - j : Wide::kLanes);
          store_lanes(load_lanes(turned_back + r * kTurnedRows + j, lanes), y + j, lanes);
        }
      }
    }
  }

  template <int kVectors>
  void multiply_row(int64_t i, float* to) const {
    constexpr int kAtOnce = 4 / kVectors;  // sums that do not wait for each other
    constexpr int64_t kLanes = kVectors * Wide::kLanes;
    const uint16_t* columns = s_.bits ? decoded_ : s_.columns;
    const E* values = static_cast<const E*>(s_.values);
    Wide sum[kAtOnce][kVectors];
    for (auto& one : sum) {
      for (Wide& v : one) v = Wide::zero();
    }
    const auto add_one = [&](const float* x, int64_t k, int at) TC_LAMBDA {
      const float value = to_float(values[k]);
      const Wide a = Wide::broadcast(&value);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sum[at][v] = fma(a, Wide::load(x + columns[k] * kLanes + v * Wide::kLanes), sum[at][v]);
    };
    const int64_t segments = s_.segments();
    for (int64_t g = 0; g < segments; ++g) {
      const float* x = turned_ + g * kSegment * kLanes;
      int64_t k = s_.offsets[i * segments + g];
      const int64_t end = s_.offsets[i * segments + g + 1];
      for (; k + kAtOnce <= end; k += kAtOnce) {
#pragma GCC unroll 4
        for (int at = 0; at < kAtOnce; ++at) add_one(x, k + at, at);
      }
      for (; k < end; ++k) add_one(x, k, 0);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      for (int at = 1; at < kAtOnce; ++at) sum[0][v] = add(sum[0][v], sum[at][v]);
      sum[0][v].store(to + v * Wide::kLanes);
    }
  }

  const SparseLinearParams& p_;
  const SparseMatrix& s_;
  const SparseLinearPlan& g_;
  int64_t part_;
  float *turned_, *own_;
  uint16_t* decoded_;
};
