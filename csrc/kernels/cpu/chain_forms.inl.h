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

// Of a step on floats.
inline ChainForm step_form(const ChainStep& s) {
  ChainForm f;
  if (s.n_count == 0 || s.n[s.n_count - 1].out != 1) {
    for (int i = 0; i < s.row_count; ++i) {
      if (s.rows[i].out != 1) continue;
      f.rows = s.rows[i].in == 1;
      f.scatter = !f.rows && s.n_count > 0;
    }
  }
  return f;
}

template <class T>
inline ChainForm chain_form(const ChainProgram& p, int at) {
  const ChainStep& s = p.steps[at];
  ChainForm f = step_form(s);
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
