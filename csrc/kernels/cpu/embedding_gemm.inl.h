// Small matrix products over unpacked operands, as the rows of an embedding take them.

// C [m, n] = A B, or C + A B: A broadcast entry by entry, so that its strides may be any; rows of B and C contiguous.
struct SmallProduct {
  int64_t m, n, k;
  const float* a;
  int64_t a_row, a_column;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
  bool add;
};

// kRows x kVectors vectors of C in registers; of the only vector `lanes` where kMasked.
template <class V, int kRows, int kVectors, bool kMasked>
TC_INLINE void product_tile(const SmallProduct& p, int64_t row, int64_t column, int lanes) {
  static_assert(kVectors == 1 || !kMasked, "a masked vector stands alone");
  V sum[kRows][kVectors];
  float* c = p.c + row * p.c_row + column;
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      const float* from = c + i * p.c_row + j * V::kLanes;
      sum[i][j] = !p.add ? V::zero() : kMasked ? V::load_first(from, lanes) : V::load(from);
    }
  }
  const float* a = p.a + row * p.a_row;
  const float* b = p.b + column;
  for (int64_t k = 0; k < p.k; ++k) {
    V right[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      right[j] = kMasked ? V::load_first(b, lanes) : V::load(b + j * V::kLanes);
    }
    for (int i = 0; i < kRows; ++i) {
      const V left = V::broadcast(a + i * p.a_row);
      for (int j = 0; j < kVectors; ++j) sum[i][j] = fma(left, right[j], sum[i][j]);
    }
    a += p.a_column;
    b += p.b_row;
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + i * p.c_row + j * V::kLanes;
      if (kMasked) {
        sum[i][j].store_first(to, lanes);
      } else {
        sum[i][j].store(to);
      }
    }
  }
}

template <class V, int kRows, int kVectors, bool kMasked>
inline void product_rows(const SmallProduct& p, int64_t row, int64_t column, int lanes) {
  for (; row + kRows <= p.m; row += kRows) product_tile<V, kRows, kVectors, kMasked>(p, row, column, lanes);
  if constexpr (kRows > 1) {
    if (row < p.m) product_rows<V, kRows / 2, kVectors, kMasked>(p, row, column, lanes);
  }
}

inline void small_product(const SmallProduct& p) {
#if defined(TC_AVX512)
  constexpr int kAccumulators = 16, kVectors = 4;
#else
  constexpr int kAccumulators = 8, kVectors = 2;
#endif
  int64_t column = 0;
  for (; column + kVectors * Wide::kLanes <= p.n; column += kVectors * Wide::kLanes) {
    product_rows<Wide, kAccumulators / kVectors, kVectors, false>(p, 0, column, 0);
  }
  for (; column + Wide::kLanes <= p.n; column += Wide::kLanes) {
    product_rows<Wide, kAccumulators, 1, false>(p, 0, column, 0);
  }
  if (kHasHalf && column + Half::kLanes <= p.n) {
    product_rows<Half, kAccumulators, 1, false>(p, 0, column, 0);
    column += Half::kLanes;
  }
  if (column < p.n) product_rows<Half, kAccumulators, 1, true>(p, 0, column, static_cast<int>(p.n - column));
}
