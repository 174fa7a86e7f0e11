// Activations of a chain with some of their dims side by side, as the sums for a matrix need them.

// One step's activations, or their gradients, with the dims in `inner` side by side behind all rows: as they lie where
// they do already, else copied.
struct DenseRows {
  const char* at;
  ChainLoops rows;  // `in`: bytes between rows
};

// `row_stride` and `inner_stride` tell a dim's stride in this array.
template <class RowStride, class InnerStride>
inline DenseRows dense_rows(const ChainRows& from, const ChainStep& s, const ChainDim* inner, int inner_count,
                            int64_t inner_size, const RowStride& row_stride, const InnerStride& inner_stride,
                            int64_t rows, float* to) {
  DenseRows d;
  const bool together = uniform_stride(inner, inner_count, inner_stride) == 1;
  int64_t kept = 1;
  for (int i = 0; i < s.row_count; ++i) kept *= s.rows[i].size;
  if (together) {
    d.at = from.at;
    d.rows.loop[d.rows.count++] = {rows, from.row, 0, 0};
    for (int i = 0; i < s.row_count; ++i)
      d.rows.loop[d.rows.count++] = {s.rows[i].size, row_stride(s.rows[i]) * 4, 0, 0};
    return d;
  }
  d.at = reinterpret_cast<const char*>(to);
  d.rows.loop[d.rows.count++] = {rows, kept * inner_size * 4, 0, 0};
  int64_t inside = kept * inner_size;
  for (int i = 0; i < s.row_count; ++i) {
    inside /= s.rows[i].size;
    d.rows.loop[d.rows.count++] = {s.rows[i].size, inside * 4, 0, 0};
  }
  // Along the last kept dim, if it is contiguous, and a uniform run of the inner ones, blocks are transposed.
  const ChainDim* m = s.row_count ? &s.rows[s.row_count - 1] : nullptr;
  const int64_t m_size = m && row_stride(*m) == 1 ? m->size : 1;
  int64_t run = 1, step = 0;
  for (int i = inner_count - 1; i >= 0 && (run == 1 || inner_stride(inner[i]) == run * step); --i) {
    if (run == 1) step = inner_stride(inner[i]);
    run *= inner[i].size;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = reinterpret_cast<const float*>(from.at + r * from.row);
    for (int64_t k = 0; k < kept; k += m_size, to += m_size * inner_size) {
      const float* source = row + matrix_offset(s.rows, s.row_count, row_stride, k);
      for (int64_t i = 0; i < inner_size; i += run)
        transpose_words(source + matrix_offset(inner, inner_count, inner_stride, i), step, run, m_size, to + i,
                        inner_size);
    }
  }
  return d;
}
