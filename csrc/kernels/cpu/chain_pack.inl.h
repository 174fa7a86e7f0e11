// A step's matrix in the form in which the step reads it.

// The last dims of a sorted list whose entries lie at one distance in the matrix.
struct MatrixRun {
  int64_t size = 1, step = 1;
};

template <class Stride>
inline MatrixRun matrix_run(const ChainDim* dims, int count, const Stride& stride) {
  MatrixRun run;
  if (count == 0) return run;
  run = {dims[count - 1].size, stride(dims[count - 1])};
  for (int i = count - 2; i >= 0 && stride(dims[i]) == run.size * run.step; --i) run.size *= dims[i].size;
  return run;
}

// Columns at the places `at`, `k` entries of each at one distance, to rows `width` words apart.
inline void pack_column_block(const float* from, const int64_t* at, int64_t columns, int64_t k, int64_t k_step,
                              float* to, int64_t width) {
  for (int64_t first = 0, n; first < columns; first += n) {
    const int64_t step = first + 1 < columns ? at[first + 1] - at[first] : 1;
    for (n = 1; first + n < columns && at[first + n] - at[first + n - 1] == step;) ++n;
    const float* source = from + at[first];
    if (k_step == 1 && k > 1) {
      transpose_words(source, step, n, k, to + first, width);
    } else if (step == 1) {
      for (int64_t i = 0; i < k; ++i) copy_words(source + i * k_step, n, to + i * width + first);
    } else {
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t j = 0; j < n; ++j) to[i * width + first + j] = source[i * k_step + j * step];
      }
    }
  }
}

// The matrix of floats in blocks; of `parts` callers each packs its share.
inline void pack_floats(const ChainStep& s, const ChainForm& f, const float* from, int64_t new_stride,
                        int64_t sum_stride, float* to, int64_t part, int64_t parts) {
  const MatrixRun n = matrix_run(s.n, s.n_count, row_of), k = matrix_run(s.k, s.k_count, column_of);
  const int64_t n_step = n.step * new_stride, k_step = k.step * sum_stride, k_blocks = s.k_size / k.size;
  const auto row_at = [&](int64_t i) { return matrix_offset(s.n, s.n_count, row_of, i) * new_stride; };
  const auto column_at = [&](int64_t i) { return matrix_offset(s.k, s.k_count, column_of, i) * sum_stride; };
  if (f.rows) {
    const int64_t blocks = s.n_size / n.size * k_blocks;
    for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; ++b) {
      const int64_t row = b / k_blocks * n.size, column = b % k_blocks * k.size;
      const float* source = from + row_at(row) + column_at(column);
      float* target = to + row * s.k_size + column;
      if (k_step != 1 && n_step == 1) {
        transpose_words(source, k_step, k.size, n.size, target, s.k_size);
        continue;
      }
      for (int64_t i = 0; i < n.size; ++i, source += n_step, target += s.k_size) {
        if (k_step == 1) copy_words(source, k.size, target);
        else
          for (int64_t j = 0; j < k.size; ++j) target[j] = source[j * k_step];
      }
    }
    return;
  }
  constexpr int64_t kPanel = kMaxUnits * kUnit;
  const int64_t run = packed_run(s, f), padded = padded_columns(run), runs = s.n_size / run;
  int64_t panels = 0;
  for (int64_t unit = 0; unit < unit_count(run); unit += panel_units(unit_count(run) - unit)) ++panels;
  const int64_t blocks = runs * panels * k_blocks, begin = blocks * part / parts, end = blocks * (part + 1) / parts;
  for (int64_t r = begin / (panels * k_blocks), b = r * panels * k_blocks; b < end; ++r) {
    for (int64_t unit = 0; unit < unit_count(run);) {
      const int wide = panel_units(unit_count(run) - unit);
      const int64_t width = wide * kUnit, first = unit * kUnit, valid = run - first < width ? run - first : width;
      unit += wide;
      int64_t at[kPanel];
      if (b < end && b + k_blocks > begin) {
        for (int64_t i = 0; i < valid; ++i) {
          const int64_t entry = r * run + first + i;
          at[i] = i > 0 && entry % n.size ? at[i - 1] + n_step : row_at(entry);
        }
      }
      float* panel = to + (r * padded + first) * s.k_size;
      for (int64_t block = 0; block < k_blocks; ++block, ++b) {
        if (b < begin || b >= end) continue;
        float* target = panel + block * k.size * width;
        if (valid < width) clear(target, k.size * width);
        pack_column_block(from + column_at(block * k.size), at, valid, k.size, k_step, target, width);
      }
    }
  }
}

template <class T>
inline void pack_bfloat16(const ChainStep& s, const ChainForm& f, const uint16_t* from, int64_t new_stride,
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
          uint16_t both[2] = {};
          if (n < run) both[0] = entry(first + n, k);
          if (n < run && T::kPairs && k + 1 < s.k_size) both[1] = entry(first + n, k + 1);
          *panel = make_word<T>(both, 0, 1, false);
        }
      }
      unit += wide;
    }
  }
}

// Entry (n, k) of the matrix is from[row * new_stride + column * sum_stride].
template <class T>
inline void pack_step(const ChainStep& s, const ChainForm& f, const typename T::Element* from, int64_t new_stride,
                      int64_t sum_stride, float* to) {
  if constexpr (T::kPairs || T::kNarrow) pack_bfloat16<T>(s, f, from, new_stride, sum_stride, to);
  else pack_floats(s, f, from, new_stride, sum_stride, to, 0, 1);
}
