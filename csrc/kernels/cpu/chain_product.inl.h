// One step of a chain for some rows of x: loops around the register-tiled product.

// A loop over what is kept or brought: strides in bytes, of the packed matrix in words.
struct ChainLoop {
  int64_t size = 1, in = 0, out = 0, matrix = 0;
};

struct ChainLoops {
  int count = 0;
  ChainLoop loop[2 * kMaxChainDims + 1];

  // Inside the last one; one with it where they go on in each other.
  void add(const ChainLoop& next) {
    if (next.size == 1) return;
    if (count > 0) {
      ChainLoop& last = loop[count - 1];
      if (last.in == next.size * next.in && last.out == next.size * next.out &&
          last.matrix == next.size * next.matrix) {
        last = {last.size * next.size, next.in, next.out, next.matrix};
        return;
      }
    }
    loop[count++] = next;
  }
  ChainLoop take(int at) {
    const ChainLoop taken = loop[at];
    for (int i = at; i + 1 < count; ++i) loop[i] = loop[i + 1];
    --count;
    return taken;
  }
  ChainLoop take_largest() {
    int at = -1;
    for (int i = 0; i < count; ++i) {
      if (at < 0 || loop[i].size > loop[at].size) at = i;
    }
    return at < 0 ? ChainLoop{} : take(at);
  }
  int64_t iterations() const {
    int64_t n = 1;
    for (int i = 0; i < count; ++i) n *= loop[i].size;
    return n;
  }
};

// Activations of a block, or x or y.
struct ChainRows {
  char* at = nullptr;
  int64_t row = 0;      // bytes between rows of x
  int64_t element = 4;  // bytes
  Store store = Store::kFloat;
  const char* residual = nullptr;  // added before the store, laid out as this
  bool relu = false;
};

inline int64_t chain_taps(const ChainStep& s, const ChainForm& f) {
  if (s.k_count == 0) return 1;
  if (!f.rows && !has_unit_k(s)) {
    for (int i = 0; i < s.row_count; ++i) {
      if (s.rows[i].in == 1) return s.k_size / inner_k(s);
    }
    return s.k_size;
  }
  return s.k_size / inner_k(s);
}

// A row of columns for a single row of activations: the sum is kept in several vectors, as one would wait for itself.
template <int kUnits, class Dot>
void multiply_one_row(const Tile& t) {
  using Acc = Accumulators<1, kUnits>;
  constexpr int kPhases = 4;
  const int last_lanes = t.columns - (kUnits * kUnit - Acc::kLastLanes);
  Accumulators<1, kUnits> acc[kPhases];
  initialise(acc[0], t, last_lanes);
  for (int i = 1; i < kPhases; ++i) for_each(acc[i], [](int, int, auto& x) TC_LAMBDA { x = x.zero(); });
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const char* a = t.a + t.a_tap[tap];
    const char* const rows[2] = {a, a};
    const char* b = t.b + t.b_tap[tap] * t.b_tap_scale;
    int64_t k = 0;
    for (; k + kPhases <= t.k; k += kPhases, b += kPhases * t.b_k) {
#pragma GCC unroll 4
      for (int i = 0; i < kPhases; ++i)
        multiply_step<1, kUnits, false, Dot>(acc[i], rows, 0, 0, 0, (k + i) * 4, b + i * t.b_k, 0);
    }
    for (; k < t.k; ++k, b += t.b_k) multiply_step<1, kUnits, false, Dot>(acc[0], rows, 0, 0, 0, k * 4, b, 0);
  }
#pragma GCC unroll 4
  for (int w = 0; w < Acc::kWides; ++w)
    acc[0].wide[0][w] = add(add(acc[0].wide[0][w], acc[1].wide[0][w]), add(acc[2].wide[0][w], acc[3].wide[0][w]));
  if constexpr (Acc::kHalves > 0)
    acc[0].half[0][0] = add(add(acc[0].half[0][0], acc[1].half[0][0]), add(acc[2].half[0][0], acc[3].half[0][0]));
  if (t.residual || t.relu) finish(acc[0], t, last_lanes);
  if (t.store == Store::kBfloat16) store_half_words(acc[0], t, last_lanes);
  else store_float(acc[0], t, last_lanes);
}

template <class Dot, int... kIndex>
constexpr auto make_row_table(std::integer_sequence<int, kIndex...>) {
  return std::array<TileFunction, sizeof...(kIndex)>{multiply_one_row<kIndex + 1, Dot>...};
}

// As multiply() for one row.
template <class Dot>
inline void multiply_row(const Product& p, int64_t part, int64_t parts) {
  static constexpr auto kTable = make_row_table<Dot>(std::make_integer_sequence<int, kMaxUnits>{});
  const int64_t units = unit_count(p.columns);
  const int64_t begin = units * part / parts, end = units * (part + 1) / parts;
  Tile t;
  t.a = p.a;
  t.k = p.k;
  t.taps = p.taps;
  t.a_tap = p.a_tap;
  t.b_tap = p.b_tap;
  t.init_mode = p.init_mode;
  t.store = p.store;
  t.relu = p.relu;
  t.c_row = 0;
  for (int64_t unit = 0; unit < units;) {
    const int wide = panel_units(units - unit);
    const int64_t column = unit * kUnit, width = wide * kUnit;
    if (unit >= begin && unit < end) {
      t.columns = static_cast<int>(p.columns - column < width ? p.columns - column : width);
      t.b = p.b + column * 4 * p.k * p.taps;
      t.b_k = t.b_tap_scale = width * 4;
      t.init = p.init_mode == Init::kColumns ? p.init + column : nullptr;
      t.c = p.c + column * p.c_column;
      t.residual = p.residual ? p.residual + (t.c - p.c) : nullptr;
      kTable[static_cast<size_t>(wide - 1)](t);
    }
    unit += wide;
  }
}

template <class T>
class ChainProduct {
 public:
  // `columns`: columns stored in columns form, one more than n where the next step wants pairs. `init`: one value a
  // column, or null. Calls may differ in rows.
  ChainProduct(const ChainStep& s, const ChainForm& f, const float* matrix, int64_t columns, const float* init,
               int64_t* taps)
      : s_(s), f_(f), matrix_(matrix), columns_(columns), init_(init), taps_(taps) {}

  // The same product with other strides.
  ChainProduct(const ChainProduct& other, const ChainStep& s)
      : s_(s), f_(other.f_), matrix_(other.matrix_), columns_(0), init_(nullptr), taps_(other.taps_) {}

  void run(const ChainRows& in, const ChainRows& out, int64_t rows, int64_t part, int64_t parts) {
    describe(in, out, rows);
    const int64_t times = loops_.iterations();
    // Loops are cut where there are enough, products otherwise.
    const bool cut = times >= 4 * parts || times % parts == 0;
    const int64_t begin = cut ? times * part / parts : 0, end = cut ? times * (part + 1) / parts : times;
    const char *a = p_.a, *b = p_.b;
    char* c = p_.c;
    for (int64_t i = begin; i < end; ++i) {
      int64_t at = i, of_in = 0, of_out = 0, of_matrix = 0;
      for (int d = loops_.count - 1; d >= 0; --d) {
        const ChainLoop& l = loops_.loop[d];
        of_in += at % l.size * l.in;
        of_out += at % l.size * l.out;
        of_matrix += at % l.size * l.matrix;
        at /= l.size;
      }
      p_.a = a + (f_.rows ? of_matrix * 4 : of_in);
      p_.b = b + (f_.rows ? of_in : of_matrix * 4);
      p_.c = c + of_out;
      if (out.residual) p_.residual = out.residual + of_out;
      if (cut) multiply_all(0, 1);
      else multiply_all(part, parts);
    }
  }

 private:
  using Dot = typename T::Dot;

  void describe(const ChainRows& in, const ChainRows& out, int64_t rows) {
    const int64_t e = in.element, to = out.element;
    loops_.count = 0;
    loops_.add({rows, in.row, out.row, 0});
    for (int i = 0; i < s_.row_count; ++i) loops_.add({s_.rows[i].size, s_.rows[i].in * e, s_.rows[i].out * to, 0});
    p_ = Product{};
    p_.c = out.at;
    p_.store = out.store;
    p_.relu = out.relu;
    p_.c_column = to;
    if (f_.rows) describe_rows(in, to);
    else describe_columns(in, to);
  }

  void describe_columns(const ChainRows& in, int64_t to) {
    const int64_t e = in.element;
    const int64_t run = packed_run(s_, f_), chunk = words<T>(s_.k_size) * padded_columns(run);
    along_m_ = false;
    ChainLoop tile;
    if (has_unit_k(s_)) {
      tile = loops_.take_largest();
    } else {
      for (int i = 0; i < loops_.count && !along_m_; ++i) {
        if (loops_.loop[i].in != e) continue;
        along_m_ = true;
        tile = loops_.take(i);
      }
      if (!along_m_) tile = loops_.take_largest();
    }
    const ChainLoop segments = loops_.take_largest();
    p_.rows = tile.size;
    p_.a_row = tile.in;
    // Rows this far apart share the sets of the first cache, which has eight ways.
    constexpr int kWays = 7;
    if (tile.in % 2048 == 0 && tile.in > 0 && kMaxRows > kWays) p_.tallest = kWays;
    p_.c_row = tile.out;
    p_.segments = segments.size;
    p_.a_segment = segments.in;
    p_.c_segment = segments.out;
    p_.a = in.at;
    p_.b = reinterpret_cast<const char*>(matrix_);
    p_.columns = columns_ > run ? columns_ : run;
    if (init_) {
      p_.init = init_;
      p_.init_mode = Init::kColumns;
    }
    for (int i = 0, outer = outer_n(); i < outer; ++i) {
      int64_t after = 1;  // runs a step of this dim passes
      for (int j = i + 1; j < outer; ++j) after *= s_.n[j].size;
      loops_.add({s_.n[i].size, 0, s_.n[i].out * to, after * chunk});
    }
    const bool inner = has_unit_k(s_) || along_m_;
    const int64_t k = inner ? inner_k(s_) : 1;
    p_.a_k = along_m_ && s_.k_count > 0 ? s_.k[s_.k_count - 1].in * e : 4;
    p_.k = words<T>(k);
    p_.taps = s_.k_size / k;
    for (int64_t t = 0; t < p_.taps; ++t) {
      taps_[t] = tap_offset(t * k) * e;
      taps_[p_.taps + t] = t * p_.k;
    }
    p_.a_tap = taps_;
    p_.b_tap = taps_ + p_.taps;
  }

  void describe_rows(const ChainRows& in, int64_t to) {
    const int64_t e = in.element, run = n_run();
    for (int i = 0; i < loops_.count; ++i) {
      if (loops_.loop[i].in != e || loops_.loop[i].out != to) continue;
      p_.columns = loops_.take(i).size;
      break;
    }
    p_.rows = run;
    p_.c_row = s_.n_count ? s_.n[s_.n_count - 1].out * to : 0;
    p_.a = reinterpret_cast<const char*>(matrix_);
    p_.a_row = s_.k_size * 4;
    p_.b = in.at;
    p_.b_packed = false;
    int64_t after = run;
    int outer = s_.n_count;
    for (int64_t inside = 1; inside < run; --outer) inside *= s_.n[outer - 1].size;
    for (int i = 0; i < outer; ++i) {
      after = run;
      for (int j = i + 1; j < outer; ++j) after *= s_.n[j].size;
      loops_.add({s_.n[i].size, 0, s_.n[i].out * to, after * s_.k_size});
    }
    const int64_t k = inner_k(s_);
    p_.k = k;
    p_.b_k = s_.k_count ? s_.k[s_.k_count - 1].in * e : 0;
    p_.taps = s_.k_size / k;
    for (int64_t t = 0; t < p_.taps; ++t) {
      taps_[t] = t * k * 4;
      taps_[p_.taps + t] = tap_offset(t * k) * e;
    }
    p_.a_tap = taps_;
    p_.b_tap = taps_ + p_.taps;
  }

  // Dims of n in front of the run that lies side by side.
  int outer_n() const {
    if (f_.scatter) return 0;
    int outer = s_.n_count;
    for (int64_t inside = 1, run = inner_n(s_); inside < run; --outer) inside *= s_.n[outer - 1].size;
    return outer;
  }

  // Rows of the matrix whose results lie at one distance.
  int64_t n_run() const { return inner_n(s_); }

  // Offset in a row of entry `k` of the dims summed over, in elements.
  int64_t tap_offset(int64_t k) const {
    int64_t offset = 0;
    for (int d = s_.k_count - 1; d >= 0; --d) {
      offset += k % s_.k[d].size * s_.k[d].in;
      k /= s_.k[d].size;
    }
    return offset;
  }

  void multiply_all(int64_t part, int64_t parts) {
    if (f_.rows) {
      if (p_.columns % kUnit) multiply<AOrder::kAlongK, true, Dot>(p_, part, parts);
      else multiply<AOrder::kAlongK, false, Dot>(p_, part, parts);
    } else if (along_m_) {
      multiply<AOrder::kAlongM, false, Dot>(p_, part, parts);
    } else if (p_.rows == 1 && p_.segments == 1) {
      multiply_row<Dot>(p_, part, parts);
    } else {
      multiply<AOrder::kAlongK, false, Dot>(p_, part, parts);
    }
  }

  const ChainStep& s_;
  const ChainForm f_;
  const float* matrix_;
  int64_t columns_;
  const float* init_;
  int64_t* taps_;
  Product p_;
  ChainLoops loops_;
  bool along_m_ = false;
};

// One step for `rows` rows. Where n is not contiguous in the result, row by row into a temporary that has n inside, and
// from there to where it belongs.
template <class T>
inline void multiply_chain_step(const ChainStep& s, const ChainForm& f, const float* matrix, int64_t columns,
                                const float* init, int64_t* taps, float* temporary, const ChainRows& in,
                                const ChainRows& out, int64_t rows, int64_t part, int64_t parts) {
  ChainProduct<T> product(s, f, matrix, columns, init, taps);
  if (!f.scatter) {
    product.run(in, out, rows, part, parts);
    return;
  }
  const auto after = [](const ChainDim& d) { return d.out; };
  ChainStep dense = s;
  int64_t inside = s.n_size;
  for (int i = s.row_count - 1; i >= 0; --i) {
    dense.rows[i].out = inside;
    inside *= s.rows[i].size;
  }
  const int64_t kept = s.out_size / s.n_size;
  ChainRows one = in, to;
  to.at = reinterpret_cast<char*>(temporary);
  for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r) {
    one.at = in.at + r * in.row;
    ChainProduct<T>(product, dense).run(one, to, 1, 0, 1);
    float* row = reinterpret_cast<float*>(out.at + r * out.row);
    for (int64_t n = 0; n < s.n_size; ++n) {
      float* column = row + matrix_offset(s.n, s.n_count, after, n);
      for (int64_t m = 0; m < kept; ++m)
        column[matrix_offset(s.rows, s.row_count, after, m)] = temporary[m * s.n_size + n];
    }
  }
}
