// How each step of a chain runs, whatever the number of rows, and its matrix in that form.
//
// "Columns": the activations are broadcast and the matrix lies in vector panels along n, where n is contiguous in the
// result. "Rows": the matrix is broadcast and the activations are read in vectors along a kept dim, where that is
// contiguous before and after; then no rank is padded to a vector.

struct ChainForm {
  bool rows = false;      // else columns
  bool scatter = false;   // columns form into a temporary, then to where the result belongs
  bool pairs = false;     // activations are pairs of bfloat16 along k
  bool odd_pair = false;  // the row of k is odd and was stored with a zero behind it
};

inline bool has_unit_k(const ChainStep& s) { return s.k_count == 0 || s.k[s.k_count - 1].in == 1; }

// Elements of the last dims of k that lie side by side.
inline int64_t inner_k(const ChainStep& s) {
  if (s.k_count == 0) return 1;
  int64_t run = s.k[s.k_count - 1].size;
  for (int i = s.k_count - 2; i >= 0 && s.k[i].in == s.k[i + 1].size * s.k[i + 1].in; --i) run *= s.k[i].size;
  return run;
}

// Elements of the last dims of n that lie side by side in the result.
inline int64_t inner_n(const ChainStep& s) {
  if (s.n_count == 0) return 1;
  int64_t run = s.n[s.n_count - 1].size;
  for (int i = s.n_count - 2; i >= 0 && s.n[i].out == s.n[i + 1].size * s.n[i + 1].out; --i) run *= s.n[i].size;
  return run;
}

template <class T>
inline ChainForm chain_form(const ChainProgram& p, int at) {
  const ChainStep& s = p.steps[at];
  ChainForm f;
  if (s.n_count == 0 || s.n[s.n_count - 1].out != 1) {
    for (int i = 0; i < s.row_count; ++i) {
      if (s.rows[i].out != 1) continue;
      f.rows = s.rows[i].in == 1;
      f.scatter = !f.rows && s.n_count > 0;
    }
  }
  if constexpr (T::kPairs) {
    if (f.rows || !has_unit_k(s)) return f;
    if (at > 0 && chain_form<Bfloat16Widened>(p, at - 1).scatter) return f;
    const bool odd = inner_k(s) % 2 != 0;
    f.odd_pair = odd && at > 0 && s.row_count == 0 && s.k_size == inner_k(s) && p.steps[at - 1].row_count == 0;
    f.pairs = !odd || f.odd_pair;
  }
  return f;
}

// Elements of a row between two steps, or of x or y.
template <class T>
inline int64_t chain_row(const ChainProgram& p, int at) {
  if (at == p.count) return p.out_features;
  return p.steps[at].in_size + (T::kPairs && chain_form<T>(p, at).odd_pair);
}

// Order in which a sorted list of dims visits the matrix, in steps of `stride` where that is uniform, else 0.
template <class Stride>
inline int64_t uniform_stride(const ChainDim* dims, int count, const Stride& stride) {
  for (int i = 0; i + 1 < count; ++i) {
    if (stride(dims[i]) != dims[i + 1].size * stride(dims[i + 1])) return 0;
  }
  return count == 0 ? 1 : stride(dims[count - 1]);
}

// Offset in the matrix of entry `i` of a sorted list of dims.
template <class Stride>
inline int64_t matrix_offset(const ChainDim* dims, int count, const Stride& stride, int64_t i) {
  int64_t offset = 0;
  for (int d = count - 1; d >= 0; --d) {
    offset += i % dims[d].size * stride(dims[d]);
    i /= dims[d].size;
  }
  return offset;
}

inline int64_t row_of(const ChainDim& n) { return n.in; }
inline int64_t column_of(const ChainDim& k) { return k.out; }

inline int64_t packed_run(const ChainStep& s, const ChainForm& f) { return f.scatter ? s.n_size : inner_n(s); }

// Words of a packed matrix.
template <class T>
inline int64_t packed_words(const ChainStep& s, const ChainForm& f) {
  const int64_t k = f.pairs ? (s.k_size + 1) / 2 : s.k_size;
  if (f.rows) return round_up(s.n_size * k, 16);
  const int64_t run = packed_run(s, f);
  return round_up(s.n_size / run * k * padded_columns(run), 16);
}

// Entry (n, k) of the matrix is from[row * new_stride + column * sum_stride].
template <class T>
inline void pack_step(const ChainStep& s, const ChainForm& f, const typename T::Element* from, int64_t new_stride,
                      int64_t sum_stride, float* to) {
  const int64_t k_step = uniform_stride(s.k, s.k_count, column_of) * sum_stride;
  const int64_t n_step = uniform_stride(s.n, s.n_count, row_of) * new_stride;
  const auto entry = [&](int64_t n, int64_t k) {
    return from[matrix_offset(s.n, s.n_count, row_of, n) * new_stride +
                matrix_offset(s.k, s.k_count, column_of, k) * sum_stride];
  };
  if (f.rows) {
    if (k_step && n_step) {
      pack_rows<T>(from, s.n_size, n_step, 1, 0, s.k_size, k_step, to);
      return;
    }
    for (int64_t n = 0; n < s.n_size; ++n) {
      for (int64_t k = 0; k < s.k_size; ++k) *to++ = to_float(entry(n, k));
    }
    return;
  }
  const int64_t run = packed_run(s, f), words_k = words<T>(s.k_size);
  for (int64_t first = 0; first < s.n_size; first += run, to += words_k * padded_columns(run)) {
    if (k_step && n_step) {
      pack_columns<T>(from + first * n_step, 1, 0, s.k_size, k_step, run, n_step, to);
      continue;
    }
    for (int64_t unit = 0, units = unit_count(run); unit < units;) {
      const int wide = panel_units(units - unit);
      const int64_t width = wide * kUnit;
      uint32_t* panel = reinterpret_cast<uint32_t*>(to) + unit * kUnit * words_k;
      for (int64_t w = 0; w < words_k; ++w) {
        for (int64_t i = 0; i < width; ++i, ++panel) {
          const int64_t n = unit * kUnit + i, k = T::kPairs ? 2 * w : w;
          typename T::Element both[2] = {};
          if (n < run) both[0] = entry(first + n, k);
          if (n < run && T::kPairs && k + 1 < s.k_size) both[1] = entry(first + n, k + 1);
          *panel = make_word<T>(both, 0, 1, false);
        }
      }
      unit += wide;
    }
  }
}
