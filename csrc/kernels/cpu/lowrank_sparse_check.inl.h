// Whether a packed sparse matrix is one. Kernels rely on all that is asked for here: whatever the numbers are, what
// passes leads nowhere out of the arrays.

inline int64_t count_bits(const uint8_t* at, int64_t bytes) {
  int64_t count = 0;
  for (; bytes >= 8; bytes -= 8, at += 8) {
    uint64_t word;
    __builtin_memcpy(&word, at, 8);
    count += __builtin_popcountll(word);
  }
  for (; bytes > 0; --bytes, ++at) count += __builtin_popcount(*at);
  return count;
}

inline SparseFault bits_fault(const SparseMatrix& s) {
  const int64_t segments = s.segments();
  for (int64_t i = 0; s.n % 8 != 0 && i < s.m; ++i) {
    if (s.bits[i * s.bit_row() + s.n / 8] >> (s.n % 8) != 0) return SparseFault::kBitBehind;
  }
  for (int64_t i = 0; i < s.m; ++i) {
    const uint8_t* row = s.bits + i * s.bit_row();
    for (int64_t g = 0; g < segments; ++g) {
      const int32_t* at = s.offsets + i * segments + g;
      if (count_bits(row + g * (kSegment / 8), (s.segment_width(g) + 7) / 8) != at[1] - at[0])
        return SparseFault::kBitCount;
    }
  }
  return SparseFault::kNone;
}

inline SparseFault columns_fault(const SparseMatrix& s) {
  const int64_t segments = s.segments();
  bool descends = false;
  for (int64_t i = 0; i < s.m * segments; ++i) {
    const uint16_t* columns = s.columns + s.offsets[i];
    const int64_t count = s.offsets[i + 1] - s.offsets[i], width = s.segment_width(i % segments);
    uint16_t later = 0;
    for (int64_t k = 1; k < count; ++k) later |= columns[k] <= columns[k - 1];
    descends = descends || later;
    if (count > 0 && columns[count - 1] >= width) return SparseFault::kColumn;
    // Among columns that do not ascend the largest need not be the last.
    for (int64_t k = 0; later && k < count; ++k) {
      if (columns[k] >= width) return SparseFault::kColumn;
    }
  }
  return descends ? SparseFault::kOrder : SparseFault::kNone;
}

inline SparseFault sparse_fault(const SparseMatrix& s) {
  const int64_t rows = s.m * s.segments();
  if (s.offsets[0] != 0 || s.offsets[rows] != s.count) return SparseFault::kEnds;
  for (int64_t i = 0; i < rows; ++i) {
    if (s.offsets[i + 1] < s.offsets[i]) return SparseFault::kDescends;
  }
  return s.bits ? bits_fault(s) : columns_fault(s);
}
