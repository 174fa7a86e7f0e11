// Gradients of the low-rank + sparse weight. The gradient of the weight is gone through once, in blocks that the second
// cache holds: what the mask keeps of a block is the values' gradient, and the block itself, without that where the
// sparse part replaces the other, goes into both factors' sums.

template <class T>
inline SparseWeightBackwardPlan sparse_weight_backward_plan(const SparseWeightBackwardParams& q, int64_t threads) {
  const SparseWeightShape& s = q.shape;
  SparseWeightBackwardPlan g;
  if (!q.grad_a && !q.grad_b) {
    g.phases = 1;
    g.parts = threads;
    return g;
  }
  constexpr int64_t kHeight = 64, kWidth = 512;
  const int64_t most = (s.m + kMaxRows - 1) / kMaxRows;
  g.parts = threads < most ? threads : most;
  const int64_t share = (s.m + g.parts - 1) / g.parts;
  g.height = share < kHeight ? share : kHeight;
  g.width = kWidth;
  constexpr int64_t kPanel = kMaxUnits * kUnit;
  const int64_t panels = g.width / kPanel;
  int64_t at = q.grad_a ? round_up(padded_columns(s.rank) * s.n, 16) : 0;  // b transposed, in panels
  g.sums = at;
  // Rows must not all begin in one set of the first cache.
  g.sums_row = padded_columns(s.n) + (padded_columns(s.n) % 512 == 0 ? 16 : 0);
  g.sums_words = q.grad_b ? round_up(s.rank * g.sums_row, 16) : 0;
  g.own = at + g.sums_words * g.parts;
  at = 0;
  const auto take = [&at](int64_t words) {
    const int64_t from = at;
    at += round_up(words, 16);
    return from;
  };
  g.panel = take(panels * (g.height + 1) * kPanel);
  g.a_rows = take(T::kNarrow && q.grad_b ? g.height * s.rank : 0);
  g.a_sums = take(q.grad_a ? g.height * padded_columns(s.rank) : 0);
  g.taps = take(4 * panels);  // of 64 bits
  g.own_words = at;
  g.scratch_bytes = static_cast<size_t>(g.own + g.own_words * g.parts) * 4;
  return g;
}

template <class T>
class SparseWeightBackward {
 public:
  SparseWeightBackward(const SparseWeightBackwardParams& q, const SparseWeightBackwardPlan& g, int64_t part)
      : q_(q), s_(q.shape), g_(g), part_(part) {
    float* memory = static_cast<float*>(q.scratch);
    turned_ = memory;
    all_sums_ = memory + g.sums;
    sums_ = all_sums_ + part * g.sums_words;
    float* own = memory + g.own + part * g.own_words;
    panel_ = own + g.panel;
    a_rows_ = own + g.a_rows;
    a_sums_ = own + g.a_sums;
    a_tap_ = reinterpret_cast<int64_t*>(own + g.taps);
    b_tap_ = a_tap_ + g.width / kPanel;
  }

  void run(int64_t phase) {
    if (g_.phases == 1) {
      if (q_.grad_values) store_kept<E>(s_, q_.grad, q_.grad_row, q_.grad_values, part_, g_.parts);
    } else if (phase == 0) {
      if (q_.grad_a) {
        pack_columns<T>(static_cast<const E*>(s_.b), 1, 0, s_.n, 1, s_.rank, s_.b_row, turned_, part_, g_.parts);
      }
    } else if (phase == 1) {
      const int64_t begin = s_.m * part_ / g_.parts, end = s_.m * (part_ + 1) / g_.parts;
      for (int64_t row = begin; row < end; row += g_.height) {
        const int64_t rows = end - row < g_.height ? end - row : g_.height;
        for (int64_t column = 0; column < s_.n; column += g_.width) {
          const int64_t columns = s_.n - column < g_.width ? s_.n - column : g_.width;
          make_block(row, rows, column, columns);
          if (q_.grad_b) add_to_b(row, rows, column, columns, row == begin);
          if (q_.grad_a) add_to_a(rows, column, columns);
        }
        if (q_.grad_a) store_a(row, rows);
      }
    } else if (q_.grad_b) {
      sum_b();
    }
  }

 private:
  using E = typename T::Element;
  static constexpr int kPanel = kMaxUnits * kUnit;

  int64_t panel_words() const { return (g_.height + 1) * kPanel; }  // one row more, so that panels differ in sets

  void make_block(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    if (s_.bits) {
      if (s_.masking) make<true, true>(row, rows, column, columns);
      else make<true, false>(row, rows, column, columns);
    } else {
      if (s_.masking) make<false, true>(row, rows, column, columns);
      else make<false, false>(row, rows, column, columns);
    }
  }

  template <bool kBits, bool kMasking>
  void make(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    for (int64_t r = 0; r < rows; ++r) {
      const E* grad = static_cast<const E*>(q_.grad) + (row + r) * q_.grad_row + column;
      const uint8_t* mask = s_.mask + (row + r) * s_.mask_row;
      E* values = q_.grad_values ? static_cast<E*>(q_.grad_values) + (row + r) * s_.n + column : nullptr;
      for (int64_t first = 0; first < columns; first += kPanel) {
        float* to = panel_ + first / kPanel * panel_words() + r * panel_width(columns - first);
        const int64_t last = columns - first < kPanel ? columns : first + kPanel;
        for (int64_t i = first; i < last; i += Wide::kLanes) {
          const int lanes = static_cast<int>(last - i < Wide::kLanes ? last - i : Wide::kLanes);
          const Kept kept = kept_of<kBits>(mask, column + i, lanes);
          const Wide g = load_lanes(grad + i, lanes);
          if (values) store_lanes(where(kept, g, Wide::zero()), values + i, lanes);
          const Wide low = kMasking ? where(kept, Wide::zero(), g) : g;
          // A panel is a number of units wide, which may be half vectors.
          if (lanes == Wide::kLanes) low.store(to + (i - first));
          else low.store_first(to + (i - first), static_cast<int>(padded_columns(lanes)));
        }
      }
    }
  }

  // Words of a row of the panel that begins so many columns before the end of a block.
  static int64_t panel_width(int64_t columns) { return columns < kPanel ? padded_columns(columns) : kPanel; }

  void add_to_b(int64_t row, int64_t rows, int64_t column, int64_t columns, bool first) {
    Tile t;
    t.taps = 1;
    t.a_tap = t.b_tap = kNoOffset;
    t.k = rows;
    const float* a = a_strip(row, rows, column);
    t.a_k = (T::kNarrow ? s_.rank : s_.a_row) * 4;
    t.init_mode = first ? Init::kZero : Init::kAccumulate;
    t.c_row = g_.sums_row * 4;
    const RowSplit split(s_.rank, false);
    for (int64_t at = 0; at < columns; at += kPanel) {
      const int64_t width = panel_width(columns - at);
      t.b = reinterpret_cast<const char*>(panel_ + at / kPanel * panel_words());
      t.b_k = width * 4;
      t.columns = static_cast<int>(width);
      int64_t r = 0;
      for (int tile = 0; tile < split.tiles; ++tile) {
        const int height = split.height + (tile < split.taller ? 1 : 0);
        t.a = reinterpret_cast<const char*>(a + r);
        t.c = reinterpret_cast<char*>(sums_ + r * g_.sums_row + column + at);
        tile_function<AOrder::kAlongM, false, false, FloatDot>(height, static_cast<int>(width / kUnit))(t);
        r += height;
      }
    }
  }

  // Rows of a as floats; widened once, for the strip's first block.
  const float* a_strip(int64_t row, int64_t rows, int64_t column) {
    const E* from = static_cast<const E*>(s_.a) + row * s_.a_row;
    if constexpr (!T::kNarrow) {
      return from;
    } else {
      for (int64_t r = 0; r < rows && column == 0; ++r) {
        for (int64_t i = 0; i < s_.rank; ++i) a_rows_[r * s_.rank + i] = to_float(from[r * s_.a_row + i]);
      }
      return a_rows_;
    }
  }

  void add_to_a(int64_t rows, int64_t column, int64_t columns) {
    const int64_t whole = columns / kPanel, rest = columns % kPanel;
    for (int64_t i = 0; i < whole; ++i) {
      a_tap_[i] = i * panel_words() * 4;
      b_tap_[i] = column + i * kPanel;
    }
    Init mode = column == 0 ? Init::kZero : Init::kAccumulate;
    if (whole > 0) multiply_a(rows, panel_, kPanel, kPanel, whole, b_tap_, mode);
    if (rest == 0) return;
    if (whole > 0) mode = Init::kAccumulate;
    b_tap_[0] = column + whole * kPanel;
    a_tap_[0] = 0;
    multiply_a(rows, panel_ + whole * panel_words(), padded_columns(rest), rest, 1, b_tap_, mode);
  }

  // Rows of the block times b transposed: `taps` panels of `k` columns, `width` words a row.
  void multiply_a(int64_t rows, const float* panel, int64_t width, int64_t k, int64_t taps, const int64_t* b_tap,
                  Init mode) {
    Tile t;
    t.a_row = width * 4;
    t.k = k;
    t.taps = taps;
    t.a_tap = a_tap_;
    t.b_tap = b_tap;
    t.init_mode = mode;
    t.c_row = padded_columns(s_.rank) * 4;
    const RowSplit split(rows, false);
    for (int64_t units = unit_count(s_.rank), unit = 0; unit < units;) {
      const int wide = panel_units(units - unit);
      t.b = reinterpret_cast<const char*>(turned_ + unit * kUnit * s_.n);
      t.b_k = t.b_tap_scale = wide * kUnit * 4;
      t.columns = wide * kUnit;
      int64_t r = 0;
      for (int tile = 0; tile < split.tiles; ++tile) {
        const int height = split.height + (tile < split.taller ? 1 : 0);
        t.a = reinterpret_cast<const char*>(panel + r * width);
        t.c = reinterpret_cast<char*>(a_sums_ + r * padded_columns(s_.rank) + unit * kUnit);
        tile_function<AOrder::kAlongK, false, false, FloatDot>(height, wide)(t);
        r += height;
      }
      unit += wide;
    }
  }

  void store_a(int64_t row, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      store_row(a_sums_ + r * padded_columns(s_.rank), s_.rank, static_cast<E*>(q_.grad_a) + (row + r) * s_.rank);
    }
  }

  static void store_row(const float* from, int64_t count, E* to) {
    for (int64_t i = 0; i < count; i += Wide::kLanes) {
      const int lanes = static_cast<int>(count - i < Wide::kLanes ? count - i : Wide::kLanes);
      store_lanes(load_lanes(from + i, lanes), to + i, lanes);
    }
  }

  void sum_b() const {
    for (int64_t r = s_.rank * part_ / g_.parts; r < s_.rank * (part_ + 1) / g_.parts; ++r) {
      E* to = static_cast<E*>(q_.grad_b) + r * s_.n;
      for (int64_t i = 0; i < s_.n; i += Wide::kLanes) {
        const int lanes = static_cast<int>(s_.n - i < Wide::kLanes ? s_.n - i : Wide::kLanes);
        const float* from = all_sums_ + r * g_.sums_row + i;
        Wide sum = load_lanes(from, lanes);
        for (int64_t part = 1; part < g_.parts; ++part) sum = add(sum, load_lanes(from + part * g_.sums_words, lanes));
        store_lanes(sum, to + i, lanes);
      }
    }
  }

  const SparseWeightBackwardParams& q_;
  const SparseWeightShape& s_;
  const SparseWeightBackwardPlan& g_;
  int64_t part_;
  float *turned_, *all_sums_, *sums_, *panel_, *a_rows_, *a_sums_;
  int64_t *a_tap_, *b_tap_;
};
