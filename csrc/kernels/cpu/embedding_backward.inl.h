// Gradients of the cores. Each piece goes through its rows as forward does and adds to sums of its own; what a product
// of leading cores receives is gathered over all rows that share it before it goes on to its cores. The sums of the
// pieces are added in their order, so that the result does not depend on when they ran.

// Hands the gradient of product[k + 1] on to core k and to product[k], and clears it.
template <class Entry>
inline void embedding_close(const EmbeddingShape& s, EmbeddingWork<Entry>& work, int64_t k, const int32_t* digits) {
  const int64_t wide = s.dim[k] * s.rank[k + 1], rank = s.rank[k], height = work.height[k];
  float* gradient = work.gradient[k + 1];
  // sums [r, dim r'] += productᵀ [r, height] gradient [height, dim r']
  small_product({rank, wide, height, work.product[k], 1, rank, gradient, wide,
                 work.sums[k] + digits[k] * slice_size(s, k), wide, true});
  const Slice turned = work.turned[k].at(digits[k]);
  float* to = k > 1 ? work.gradient[k] : work.sums[0] + digits[0] * slice_size(s, 0);
  small_product({height, rank, wide, gradient, wide, 1, turned.data, turned.row, to, rank, true});
  __builtin_memset(gradient, 0, static_cast<size_t>(height * wide) * 4);
}

template <class Entry>
inline void embedding_backward_rows(const EmbeddingParams& p, int64_t parts, int64_t part, char* memory) {
  const EmbeddingShape& s = p.shape;
  EmbeddingWork<Entry> work(p, parts, part, true, memory);
  const int64_t last = s.cores - 1, rank = s.rank[last], dim_last = s.dim[last];
  const int64_t height = work.height[last] / s.rank[0], dim = height * dim_last;
  for (int64_t k = 0; k <= last; ++k) {
    __builtin_memset(work.sums[k], 0, static_cast<size_t>(slice_size(s, k) * s.vocab[k]) * 4);
    if (k > 1) __builtin_memset(work.gradient[k], 0, static_cast<size_t>(work.height[k] * s.rank[k]) * 4);
  }
  const char* dy = static_cast<const char*>(p.grad_y);
  float* row = work.row;
  const int32_t* before = nullptr;
  for (int64_t u = work.begin; u < work.end; ++u) {
    const int32_t* digits = p.digits + u * s.cores;
    const int64_t changed = first_change(digits, before);
    if (before) {
      for (int64_t k = last - 1; k >= 1 && k >= changed; --k) embedding_close(s, work, k, before);
    }
    work.advance(s, digits, changed);
    before = digits;
    for (int64_t i = p.first[u]; i < p.first[u + 1]; ++i) {
      const char* from = dy + p.place[i] * dim * Entry::kBytes;
      if (i == p.first[u]) {
        for (int64_t j = 0; j < dim; ++j) row[j] = Entry::load(from + j * Entry::kBytes);
      } else {
        for (int64_t j = 0; j < dim; ++j) row[j] += Entry::load(from + j * Entry::kBytes);
      }
    }
    const Slice turned = work.turned[last].at(digits[last]);
    float* sums = work.sums[last] + digits[last] * slice_size(s, last);
    float* to = last > 1 ? work.gradient[last] : work.sums[0] + digits[0] * slice_size(s, 0);
    for (int64_t q = 0; q < s.rank[0]; ++q) {
      const int64_t block = q * height * rank, matrix = q * rank * dim_last;
      small_product(
          {rank, dim_last, height, work.product[last] + block, 1, rank, row, dim_last, sums + matrix, dim_last, true});
      small_product(
          {height, rank, dim_last, row, dim_last, 1, turned.data + matrix, turned.row, to + block, rank, true});
    }
  }
  if (before) {
    for (int64_t k = last - 1; k >= 1; --k) embedding_close(s, work, k, before);
  }
}

// Adds up one piece's share of the slices of every core, over all pieces, whose memory lies `stride` bytes apart.
template <class Entry>
inline void embedding_backward_sum(const EmbeddingParams& p, int64_t parts, int64_t part, char* memory, size_t stride) {
  const EmbeddingShape& s = p.shape;
  EmbeddingMemory first{memory};
  float* sums[kMaxEmbeddingCores];
  EmbeddingWork<Entry>::take_sums(s, first, sums);
  const int64_t apart = static_cast<int64_t>(stride / sizeof(float));
  for (int64_t k = 0; k < s.cores; ++k) {
    char* to = static_cast<char*>(p.grad_core[k]);
    if (!to) continue;
    const SliceOrder order = slice_order(s, k, false);
    const int64_t size = slice_size(s, k), vocab = s.vocab[k], dim = s.dim[k], next = s.rank[k + 1];
    for (int64_t digit = vocab * part / parts; digit < vocab * (part + 1) / parts; ++digit) {
      for (int64_t r = 0; r < s.rank[k]; ++r) {
        char* row = to + (r * vocab + digit) * dim * next * Entry::kBytes;
        for (int64_t j = 0; j < dim; ++j) {
          const float* from = sums[k] + digit * size + r * order.rank + j * order.dim;
          for (int64_t n = 0; n < next; ++n, row += Entry::kBytes, from += order.next) {
            float sum = *from;
            for (int64_t i = 1; i < parts; ++i) sum += from[i * apart];
            Entry::store(sum, row);
          }
        }
      }
    }
  }
}
