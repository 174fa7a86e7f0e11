// Rows of an embedding in tensor-train or tensor-ring form. The leading cores' product is kept from one row to the
// next as far as the digits agree; the last core's slice then gives the row.

template <class Entry>
inline void embedding_rows(const EmbeddingParams& p, int64_t parts, int64_t part, char* memory) {
  const EmbeddingShape& s = p.shape;
  EmbeddingWork<Entry> work(p, parts, part, false, memory);
  const int64_t last = s.cores - 1, rank = s.rank[last], dim_last = s.dim[last];
  const int64_t height = work.height[last] / s.rank[0], dim = height * dim_last;
  char* y = static_cast<char*>(p.y);
  const int32_t* before = nullptr;
  for (int64_t u = work.begin; u < work.end; ++u) {
    const int32_t* digits = p.digits + u * s.cores;
    work.advance(s, digits, first_change(digits, before));
    before = digits;
    const Slice slice = work.slices[last].at(digits[last]);
    char* to = y + p.place[p.first[u]] * dim * Entry::kBytes;
    float* row = Entry::kIsFloat ? reinterpret_cast<float*>(to) : work.row;
    for (int64_t q = 0; q < s.rank[0]; ++q) {
      small_product({height, dim_last, rank, work.product[last] + q * height * rank, rank, 1,
                     slice.data + q * rank * dim_last, slice.row, row, dim_last, q > 0});
    }
    if (!Entry::kIsFloat) {
      for (int64_t i = 0; i < dim; ++i) Entry::store(row[i], to + i * Entry::kBytes);
    }
    for (int64_t i = p.first[u] + 1; i < p.first[u + 1]; ++i) {
      __builtin_memcpy(y + p.place[i] * dim * Entry::kBytes, to, static_cast<size_t>(dim * Entry::kBytes));
    }
  }
}
