// The dense weight of a low-rank and a sparse matrix: a register tile of the product, kept in the first cache until the
// mask and the values have been put on it; then its one way to memory.

// What a tile of the weight is made of, in memory: `rows` rows of each.
struct WeightLines {
  const char* at[3] = {};  // values, weight, mask
  int64_t row[3] = {};
  int bytes[3] = {};
  int rows = 0;
};

TC_INLINE void fetch_row(const WeightLines& l, int row) {
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const char* at = l.at[i] + row * l.row[i];
    for (int byte = 0; byte < l.bytes[i]; byte += 64) {
      if (i == 1) __builtin_prefetch(at + byte, 1);
      else __builtin_prefetch(at + byte);
    }
  }
}

// As multiply_tile() into a tile of floats. Meanwhile, spread over the product as no core waits for so many lines at
// once, it asks for what the next tile is made of.
template <int kRows, int kUnits, class Dot>
void multiply_weight_tile(const Tile& t, const WeightLines& next) {
  Accumulators<kRows, kUnits> acc;
  for_each(acc, [](int, int, auto& x) TC_LAMBDA { x = x.zero(); });
  constexpr int kGroup = (kRows + 1) / 2;
  constexpr int kSteps = 4;
  const int64_t row = t.a_row, row3 = row * 3, row5 = row * 5;
  const char* rows[2] = {t.a, t.a + kGroup * row};
  const char* b = t.b;
  const int64_t b_k = t.b_k;
  int64_t k = t.k;
  const int pace = k < kSteps ? next.rows : static_cast<int>((next.rows + k / kSteps - 1) / (k / kSteps));
  int fetched = 0;
  for (; k >= kSteps; k -= kSteps, b += kSteps * b_k) {
    for (const int end = fetched + pace < next.rows ? fetched + pace : next.rows; fetched < end; ++fetched)
      fetch_row(next, fetched);
#pragma GCC unroll 4
    for (int i = 0; i < kSteps; ++i)
      multiply_step<kRows, kUnits, false, Dot>(acc, rows, row, row3, row5, i * 4, b + i * b_k, 0);
    rows[0] += kSteps * 4;
    rows[1] += kSteps * 4;
  }
  for (; k > 0; --k, b += b_k) {
    multiply_step<kRows, kUnits, false, Dot>(acc, rows, row, row3, row5, 0, b, 0);
    rows[0] += 4;
    rows[1] += 4;
  }
  for (; fetched < next.rows; ++fetched) fetch_row(next, fetched);
  store_float(acc, t, Accumulators<kRows, kUnits>::kLastLanes);
}

using WeightTileFunction = void (*)(const Tile&, const WeightLines&);

// [rows - 1][units - 1]
template <class Dot, int... kIndex>
constexpr auto make_weight_tile_table(std::integer_sequence<int, kIndex...>) {
  return std::array<WeightTileFunction, sizeof...(kIndex)>{
      multiply_weight_tile<kIndex / kMaxUnits + 1, kIndex % kMaxUnits + 1, Dot>...};
}

template <class T>
inline SparseWeightPlan sparse_weight_plan(const SparseWeightParams& p, int64_t threads) {
  const SparseWeightShape& s = p.shape;
  SparseWeightPlan g;
  g.parts = threads;
  if (s.rank == 0) {
    g.phases = 1;
    return g;
  }
  g.cut_columns = s.m < 2 * kMaxRows * threads;
  // Rows of a are read in words where they lie.
  const bool whole_words = !T::kNarrow && (!T::kPairs || s.rank % 2 == 0);
  g.rows = whole_words ? 0 : words<T>(s.rank);
  constexpr int64_t kStreamBytes = int64_t{1} << 25;  // what no cache keeps for whoever reads it
  g.streams = sizeof(typename T::Element) == 4 && s.n % 16 == 0 && s.m * s.n * 4 > kStreamBytes &&
              reinterpret_cast<uintptr_t>(p.w) % 64 == 0;
  constexpr int64_t kCacheBytes = int64_t{1} << 20;
  g.fetches = s.m * s.n * 2 * static_cast<int64_t>(sizeof(typename T::Element)) > kCacheBytes;
  g.own = round_up(words<T>(s.rank) * padded_columns(s.n), 16);
  g.own_words = round_up(g.rows * (g.cut_columns ? s.m : (s.m + threads - 1) / threads), 16);
  g.scratch_bytes = static_cast<size_t>(g.own + g.own_words * threads) * 4;
  return g;
}

template <class T>
class SparseWeight {
 public:
  SparseWeight(const SparseWeightParams& p, const SparseWeightPlan& g, int64_t part)
      : p_(p), s_(p.shape), g_(g), part_(part), k_(words<T>(p.shape.rank)), packed_(static_cast<float*>(p.scratch)) {}

  void run(int64_t phase) {
    if (s_.rank == 0) return store_kept<E>(s_, p_.values, p_.values_row, p_.w, part_, g_.parts);
    if (phase == 0) {
      pack_columns<T>(static_cast<const E*>(s_.b), 1, 0, s_.rank, s_.b_row, s_.n, 1, packed_, part_, g_.parts);
      return;
    }
    const int64_t units = unit_count(s_.n);
    const int64_t first = g_.cut_columns ? 0 : s_.m * part_ / g_.parts;
    const int64_t last = g_.cut_columns ? s_.m : s_.m * (part_ + 1) / g_.parts;
    if (last == first) return;
    a_ = static_cast<const char*>(s_.a) + first * s_.a_row * kBytes;
    a_row_ = s_.a_row * kBytes;
    if (g_.rows) {
      float* rows = packed_ + g_.own + part_ * g_.own_words;
      pack_rows<T>(static_cast<const E*>(s_.a) + first * s_.a_row, last - first, s_.a_row, 1, 0, s_.rank, 1, rows);
      a_ = reinterpret_cast<const char*>(rows);
      a_row_ = k_ * 4;
    }
    // As many columns at a time as the second cache holds of b.
    constexpr int64_t kCacheWords = 80 * 1024;
    const int64_t block = kCacheWords / (k_ * kUnit) < kMaxUnits ? kMaxUnits : kCacheWords / (k_ * kUnit);
    const int64_t begin = g_.cut_columns ? units * part_ / g_.parts : 0;
    const int64_t end = g_.cut_columns ? units * (part_ + 1) / g_.parts : units;
    for (int64_t from = 0, unit = 0; unit < end; from = unit) {
      while (unit < units && (unit == from || unit - from < block)) unit += panel_units(units - unit);
      run_block(from, unit, begin, end, first, last - first);
    }
#if defined(TC_X86)
    if (g_.streams) __builtin_ia32_sfence();
#endif
  }

 private:
  using E = typename T::Element;
  static constexpr int64_t kBytes = sizeof(E);
  static constexpr int kPitch = kMaxUnits * kUnit;  // of the tile in the first cache, in words

  // Panels that begin in [from, to) and in [begin, end), for `rows` rows.
  void run_block(int64_t from, int64_t to, int64_t begin, int64_t end, int64_t first, int64_t rows) {
    const int64_t units = unit_count(s_.n);
    static constexpr auto kTable =
        make_weight_tile_table<typename T::Dot>(std::make_integer_sequence<int, kMaxRows * kMaxUnits>{});
    const RowSplit split(rows, false);
    alignas(64) float sums[kMaxRows * kPitch];
    Tile t;
    t.a_row = a_row_;
    t.k = k_;
    t.c = reinterpret_cast<char*>(sums);
    t.c_row = kPitch * 4;
    const auto columns_at = [&](int64_t unit) {
      const int64_t left = s_.n - unit * kUnit, width = panel_units(units - unit) * kUnit;
      return static_cast<int>(left < width ? left : width);
    };
    const auto height_of = [&](int tile) { return split.height + (tile < split.taller ? 1 : 0); };
    int64_t row = 0;
    for (int tile = 0; tile < split.tiles; ++tile) {
      const int height = height_of(tile);
      t.a = a_ + row * a_row_;
      for (int64_t unit = from; unit < to;) {
        const int wide = panel_units(units - unit);
        const int64_t column = unit * kUnit, after = unit + wide;
        if (unit >= begin && unit < end) {
          t.b = reinterpret_cast<const char*>(packed_ + column * k_);
          t.b_k = wide * kUnit * 4;
          WeightLines next;
          if (!g_.fetches) next.rows = 0;
          else if (after < to && after < end) next = lines(first + row, height, after * kUnit, columns_at(after));
          else if (tile + 1 < split.tiles)
            next = lines(first + row + height, height_of(tile + 1), from * kUnit, columns_at(from));
          kTable[static_cast<size_t>((height - 1) * kMaxUnits + wide - 1)](t, next);
          finish_tile(sums, first + row, height, column, columns_at(unit));
        }
        unit = after;
      }
      row += height;
    }
  }

  WeightLines lines(int64_t row, int height, int64_t column, int columns) const {
    WeightLines l;
    l.rows = height;
    l.row[0] = p_.values_row * kBytes;
    l.row[1] = s_.n * kBytes;
    l.row[2] = s_.mask_row;
    l.at[0] = static_cast<const char*>(p_.values) + row * l.row[0] + column * kBytes;
    l.at[1] = static_cast<const char*>(p_.w) + row * l.row[1] + column * kBytes;
    l.at[2] = reinterpret_cast<const char*>(s_.mask) + row * l.row[2] + (s_.bits ? column / 8 : column);
    l.bytes[0] = columns * static_cast<int>(kBytes);
    l.bytes[1] = g_.streams ? 0 : l.bytes[0];
    l.bytes[2] = 1;
    return l;
  }

  void finish_tile(const float* sums, int64_t row, int height, int64_t column, int columns) const {
    if (s_.bits) {
      if (s_.masking) finish<true, true>(sums, row, height, column, columns);
      else finish<true, false>(sums, row, height, column, columns);
    } else {
      if (s_.masking) finish<false, true>(sums, row, height, column, columns);
      else finish<false, false>(sums, row, height, column, columns);
    }
  }

  template <bool kBits, bool kMasking>
  void finish(const float* sums, int64_t row, int height, int64_t column, int columns) const {
    const E* values = static_cast<const E*>(p_.values) + row * p_.values_row + column;
    const uint8_t* mask = s_.mask + row * s_.mask_row;
    E* w = static_cast<E*>(p_.w) + row * s_.n + column;
    const auto put = [&](int i, int lanes) TC_LAMBDA {
      const Kept kept = kept_of<kBits>(mask, column + i, lanes);
      const Wide value = load_kept(values + i, kept, lanes), low = Wide::load(sums + i);
      return kMasking ? where(kept, value, low) : add(low, value);
    };
    for (int r = 0; r < height; ++r) {
      int i = 0;
      for (; i + Wide::kLanes <= columns; i += Wide::kLanes) {
        const Wide v = put(i, Wide::kLanes);
        if constexpr (kBytes == 4) {
          if (g_.streams) v.stream(w + i);
          else v.store(w + i);
        } else {
          store_bf16(v, w + i, Wide::kLanes);
        }
      }
      if (i < columns) store_lanes(put(i, columns - i), w + i, columns - i);
      sums += kPitch;
      values += p_.values_row;
      mask += s_.mask_row;
      w += s_.n;
    }
  }

  const SparseWeightParams& p_;
  const SparseWeightShape& s_;
  const SparseWeightPlan& g_;
  int64_t part_, k_;
  float* packed_;
  const char* a_ = nullptr;
  int64_t a_row_ = 0;
};
