// Register-tiled matrix product, the one inner loop of all CPU kernels:
//
//   C[m, n] = init + sum over taps, k of A[m, tap, k] * B[tap, k, n]
//
// A is read one 32-bit word at a time and broadcast, B and C are read and written in vectors along n. Which of the
// two is the activation and which the weight is the caller's choice: pixels along m and channels along n suits
// channels-last data, channels along m and pixels along n suits contiguous data and ranks that are no multiple of
// the vector. Taps make a spatial convolution one accumulation.
//
// A word is a float, or a pair of bfloat16 values along k where the processor has a dot product for pairs.

enum class Init { kZero, kColumns, kRows, kAccumulate };
enum class Store { kFloat, kBfloat16, kBfloat16Pairs, kStream };  // kStream: floats past the caches, rows aligned

// Cache lines to ask for while a product runs: `count` places `pitch` bytes apart, `lines` lines at each.
struct Prefetch {
  const char* at = nullptr;
  int64_t pitch = 64, count = 0, lines = 1;
};

struct Tile {
  const char* a;       // row m, step k of tap t lies at a + m * a_row + a_tap[t] + k * a_k (bytes)
  int64_t a_row;       // only read where A is contiguous along k; else rows are neighbouring words
  int64_t a_k;         // only read where A is contiguous along m
  int64_t a_jump = 0;  // extra distance of the second half of the rows (two image rows in one tile)
  const char* b;       // column vector of step k of tap t lies at b + b_tap[t] + k * b_k
  int64_t b_k;
  int64_t k;  // steps a tap
  int64_t taps;
  const int64_t* a_tap;  // bytes
  const int64_t* b_tap;  // in units of b_tap_scale bytes
  int64_t b_tap_scale = 1;
  const float* init = nullptr;  // kColumns: one value a column, whole vectors readable; kRows: one a row
  Init init_mode = Init::kZero;
  char* c;
  int64_t c_row;
  int64_t c_jump = 0;
  Store store = Store::kFloat;
  const char* residual = nullptr;  // added to the sums: what C's place holds in an array of C's layout and element
  bool relu = false;               // negative results become zero; neither this nor the residual with pairs
  Prefetch read, write;            // one tap's share
  int columns;  // valid columns; the rest of the last vector is neither read from masked B nor written
};

// The lines of `pixels` neighbouring pixels of an image.
template <class E>
inline Prefetch lines_of(const E* at, const Strides4& strides, int64_t pixels, int64_t channels) {
  constexpr int64_t kBytes = sizeof(E);
  Prefetch p;
  p.at = reinterpret_cast<const char*>(at);
  p.pitch = strides.c == 1 ? 64 : strides.c * kBytes;
  p.count = strides.c == 1 ? pixels * strides.w * kBytes / 64 : channels;
  p.lines = strides.c == 1 ? 1 : pixels * kBytes / 64 + 1;
  return p;
}

// Lines to be written go to the second cache like those to be read: a block's are too many for the first.
// Inlined by force: GCC takes a function that only prefetches for one without effect, and drops the calls.
TC_INLINE void fetch(const Prefetch& p, int64_t tap) {
  const char* at = p.at + tap * p.count * p.pitch;
  for (int64_t i = 0; i < p.count; ++i, at += p.pitch) {
    for (int64_t l = 0; l < p.lines; ++l) __builtin_prefetch(at + 64 * l, 0, 2);
  }
}

struct FloatDot {
  static constexpr int kElementsPerWord = 1;
  template <class V>
  static V apply(V a, V b, V c) {
    return fma(a, b, c);
  }
};

#if defined(TC_BF16_DOT)
struct PairDot {
  static constexpr int kElementsPerWord = 2;
  template <class V>
  static V apply(V a, V b, V c) {
    return dot_pairs(a, b, c);
  }
};
#endif

enum class AOrder { kAlongK, kAlongM };  // which of A's directions is contiguous

template <int kRows, int kUnits>
struct Accumulators {
  static constexpr int kWides = kUnits / kWideUnits;
  static constexpr int kHalves = kHasHalf ? kUnits % kWideUnits : 0;
  static constexpr int kLastLanes = kHalves ? Half::kLanes : Wide::kLanes;
  static constexpr int kHalfStart = kWides * Wide::kLanes;
  Wide wide[kRows][kWides > 0 ? kWides : 1];
  Half half[kRows][kHalves > 0 ? kHalves : 1];
};

template <int kRows, int kUnits, bool kMaskB, class Dot>
TC_INLINE void multiply_step(Accumulators<kRows, kUnits>& acc, const char* const (&rows)[2], int64_t row, int64_t row3,
                             int64_t row5, int64_t offset, const char* b, int last_lanes) {
  using Acc = Accumulators<kRows, kUnits>;
  constexpr int kGroup = (kRows + 1) / 2;
  Wide bw[Acc::kWides > 0 ? Acc::kWides : 1];
  Half bh;
#pragma GCC unroll 4
  for (int w = 0; w < Acc::kWides; ++w) {
    const char* p = b + w * Wide::kLanes * 4;
    const bool last = kMaskB && !Acc::kHalves && w == Acc::kWides - 1;
    bw[w] = last ? Wide::load_first(p, last_lanes) : Wide::load(p);
  }
  if constexpr (Acc::kHalves > 0) {
    const char* p = b + Acc::kHalfStart * 4;
    bh = kMaskB ? Half::load_first(p, last_lanes) : Half::load(p);
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    const int i = m < kGroup ? m : m - kGroup;
    const char* p = rows[m < kGroup ? 0 : 1] + offset;
    // Seven rows from one base and three strides: each is a single addressing mode.
    const char* q = i == 0   ? p
                    : i == 1 ? p + row
                    : i == 2 ? p + row * 2
                    : i == 3 ? p + row3
                    : i == 4 ? p + row * 4
                    : i == 5 ? p + row5
                             : p + row3 * 2;
    if constexpr (Acc::kWides > 0) {
      const Wide a = Wide::broadcast(q);
#pragma GCC unroll 4
      for (int w = 0; w < Acc::kWides; ++w) acc.wide[m][w] = Dot::apply(a, bw[w], acc.wide[m][w]);
      if constexpr (Acc::kHalves > 0) acc.half[m][0] = Dot::apply(low(a), bh, acc.half[m][0]);
    } else {
      acc.half[m][0] = Dot::apply(Half::broadcast(q), bh, acc.half[m][0]);
    }
  }
}

// Calls each(m, w, vector) for every accumulator; w counts words from the tile's first column.
template <int kRows, int kUnits, class F>
TC_INLINE void for_each(Accumulators<kRows, kUnits>& acc, const F& each) {
  using Acc = Accumulators<kRows, kUnits>;
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int w = 0; w < Acc::kWides; ++w) each(m, w * Wide::kLanes, acc.wide[m][w]);
    if constexpr (Acc::kHalves > 0) each(m, Acc::kHalfStart, acc.half[m][0]);
  }
}

template <int kRows>
TC_INLINE char* row_of_c(const Tile& t, int m) {
  return t.c + m * t.c_row + (m < (kRows + 1) / 2 ? 0 : t.c_jump);
}

template <int kRows, int kUnits>
TC_INLINE void initialise(Accumulators<kRows, kUnits>& acc, const Tile& t, int last_lanes) {
  using Acc = Accumulators<kRows, kUnits>;
  constexpr int kLast = kUnits * kUnit - Acc::kLastLanes;  // where the last vector starts
  switch (t.init_mode) {
    case Init::kZero: for_each(acc, [](int, int, auto& x) TC_LAMBDA { x = x.zero(); }); break;
    case Init::kColumns: for_each(acc, [&](int, int w, auto& x) TC_LAMBDA { x = x.load(t.init + w); }); break;
    case Init::kRows: for_each(acc, [&](int m, int, auto& x) TC_LAMBDA { x = x.broadcast(t.init + m); }); break;
    case Init::kAccumulate:
      for_each(acc, [&](int m, int w, auto& x) TC_LAMBDA {
        const char* p = row_of_c<kRows>(t, m) + w * 4;
        x = w == kLast ? x.load_first(p, last_lanes) : x.load(p);
      });
      break;
  }
}

// What follows the sums before they are stored.
template <int kRows, int kUnits>
TC_INLINE void finish(Accumulators<kRows, kUnits>& acc, const Tile& t, int last_lanes) {
  using Acc = Accumulators<kRows, kUnits>;
  constexpr int kLast = kUnits * kUnit - Acc::kLastLanes;
  const int64_t distance = t.residual - t.c;
  if (t.residual && t.store == Store::kFloat) {
    for_each(acc, [&](int m, int w, auto& x) TC_LAMBDA {
      const char* p = row_of_c<kRows>(t, m) + distance + w * 4;
      x = add(x, w == kLast ? x.load_first(p, last_lanes) : x.load(p));
    });
  } else if (t.residual) {
    for_each(acc, [&](int m, int w, auto& x) TC_LAMBDA {
      auto r = x.zero();
      load_bf16(r, row_of_c<kRows>(t, m) + distance + w * 2, w == kLast ? last_lanes : x.kLanes);
      x = add(x, r);
    });
  }
  if (t.relu) for_each(acc, [](int, int, auto& x) TC_LAMBDA { x = relu(x); });
}

template <int kRows, int kUnits>
TC_INLINE void store_float(Accumulators<kRows, kUnits>& acc, const Tile& t, int last_lanes) {
  using Acc = Accumulators<kRows, kUnits>;
  constexpr int kLast = kUnits * kUnit - Acc::kLastLanes;
  if (last_lanes == Acc::kLastLanes) {
    for_each(acc, [&](int m, int w, auto& x) TC_LAMBDA { x.store(row_of_c<kRows>(t, m) + w * 4); });
    return;
  }
  for_each(acc, [&](int m, int w, auto& x) TC_LAMBDA {
    char* p = row_of_c<kRows>(t, m) + w * 4;
    if (w == kLast) x.store_first(p, last_lanes);
    else x.store(p);
  });
}

template <int kRows, int kUnits>
TC_INLINE void store_stream(Accumulators<kRows, kUnits>& acc, const Tile& t, int last_lanes) {
  if (last_lanes != Accumulators<kRows, kUnits>::kLastLanes) return store_float(acc, t, last_lanes);
  for_each(acc, [&](int m, int w, auto& x) TC_LAMBDA { x.stream(row_of_c<kRows>(t, m) + w * 4); });
}

template <int kRows, int kUnits>
TC_INLINE void store_half_words(Accumulators<kRows, kUnits>& acc, const Tile& t, int last_lanes) {
  using Acc = Accumulators<kRows, kUnits>;
  constexpr int kLast = kUnits * kUnit - Acc::kLastLanes;
  for_each(acc, [&](int m, int w, auto& x)
                    TC_LAMBDA { store_bf16(x, row_of_c<kRows>(t, m) + w * 2, w == kLast ? last_lanes : x.kLanes); });
}

#if defined(TC_BF16_DOT)
// Rows 2j and 2j+1 become row j of words; an odd last row pairs with zero.
template <int kRows, int kUnits>
TC_INLINE void store_pairs(const Accumulators<kRows, kUnits>& acc, const Tile& t, int last_lanes) {
  using Acc = Accumulators<kRows, kUnits>;
#pragma GCC unroll 16
  for (int m = 0; m < kRows; m += 2) {
    char* c = t.c + (m / 2) * t.c_row;
#pragma GCC unroll 4
    for (int w = 0; w < Acc::kWides; ++w) {
      const bool last = !Acc::kHalves && w == Acc::kWides - 1;
      const Wide hi = m + 1 < kRows ? acc.wide[m + 1 < kRows ? m + 1 : m][w] : Wide::zero();
      pair_bf16(acc.wide[m][w], hi).store_first(c + w * Wide::kLanes * 4, last ? last_lanes : Wide::kLanes);
    }
    if constexpr (Acc::kHalves > 0) {
      const Half hi = m + 1 < kRows ? acc.half[m + 1 < kRows ? m + 1 : m][0] : Half::zero();
      pair_bf16(acc.half[m][0], hi).store_first(c + Acc::kHalfStart * 4, last_lanes);
    }
  }
}
#endif

template <int kRows, int kUnits, AOrder kOrder, bool kMaskB, bool kFetch, class Dot>
void multiply_tile(const Tile& t) {
  using Acc = Accumulators<kRows, kUnits>;
  constexpr int kGroup = (kRows + 1) / 2;
  const int last_lanes = t.columns - (kUnits * kUnit - Acc::kLastLanes);
  Acc acc;
  initialise(acc, t, last_lanes);
  const int64_t row = kOrder == AOrder::kAlongM ? 4 : t.a_row, row3 = row * 3, row5 = row * 5;
  const int64_t b_k = t.b_k;
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const char* a0 = t.a + t.a_tap[tap];
    const char* rows[2] = {a0, a0 + kGroup * row + t.a_jump};
    const char* b = t.b + t.b_tap[tap] * t.b_tap_scale;
    if constexpr (kFetch) {
      fetch(t.read, tap);
      fetch(t.write, tap);
    }
    int64_t k = t.k;
    if constexpr (kOrder == AOrder::kAlongK) {
      for (; k >= 4; k -= 4) {
        multiply_step<kRows, kUnits, kMaskB, Dot>(acc, rows, row, row3, row5, 0, b, last_lanes);
        multiply_step<kRows, kUnits, kMaskB, Dot>(acc, rows, row, row3, row5, 4, b + b_k, last_lanes);
        multiply_step<kRows, kUnits, kMaskB, Dot>(acc, rows, row, row3, row5, 8, b + 2 * b_k, last_lanes);
        multiply_step<kRows, kUnits, kMaskB, Dot>(acc, rows, row, row3, row5, 12, b + 3 * b_k, last_lanes);
        rows[0] += 16;
        rows[1] += 16;
        b += 4 * b_k;
      }
      for (; k > 0; --k) {
        multiply_step<kRows, kUnits, kMaskB, Dot>(acc, rows, row, row3, row5, 0, b, last_lanes);
        rows[0] += 4;
        rows[1] += 4;
        b += b_k;
      }
    } else {
      for (; k > 0; --k) {
        multiply_step<kRows, kUnits, kMaskB, Dot>(acc, rows, row, row3, row5, 0, b, last_lanes);
        rows[0] += t.a_k;
        rows[1] += t.a_k;
        b += b_k;
      }
    }
  }
  if (t.residual || t.relu) finish(acc, t, last_lanes);
  switch (t.store) {
    case Store::kFloat: store_float(acc, t, last_lanes); break;
    case Store::kBfloat16: store_half_words(acc, t, last_lanes); break;
    case Store::kStream: store_stream(acc, t, last_lanes); break;
    case Store::kBfloat16Pairs:
#if defined(TC_BF16_DOT)
      store_pairs(acc, t, last_lanes);
#endif
      break;
  }
}

using TileFunction = void (*)(const Tile&);

// [rows - 1][units - 1]
template <AOrder kOrder, bool kMaskB, bool kFetch, class Dot, int... kIndex>
constexpr auto make_tile_table(std::integer_sequence<int, kIndex...>) {
  return std::array<TileFunction, sizeof...(kIndex)>{
      multiply_tile<kIndex / kMaxUnits + 1, kIndex % kMaxUnits + 1, kOrder, kMaskB, kFetch, Dot>...};
}

template <AOrder kOrder, bool kMaskB, bool kFetch, class Dot>
inline TileFunction tile_function(int rows, int units) {
  static constexpr auto kTable =
      make_tile_table<kOrder, kMaskB, kFetch, Dot>(std::make_integer_sequence<int, kMaxRows * kMaxUnits>{});
  return kTable[static_cast<size_t>((rows - 1) * kMaxUnits + units - 1)];
}
