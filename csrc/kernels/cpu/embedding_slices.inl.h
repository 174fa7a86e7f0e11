// What belongs to one digit of one core, as the small products want it, and the scratch memory of one piece.

struct Float32Entry {
  static constexpr bool kIsFloat = true;
  static constexpr int64_t kBytes = 4;
  static float load(const char* p) {
    float f;
    __builtin_memcpy(&f, p, sizeof(f));
    return f;
  }
  static void store(float f, char* p) { __builtin_memcpy(p, &f, sizeof(f)); }
};

struct Bfloat16Entry {
  static constexpr bool kIsFloat = false;
  static constexpr int64_t kBytes = 2;
  static float load(const char* p) {
    uint16_t h;
    __builtin_memcpy(&h, p, sizeof(h));
    const uint32_t u = static_cast<uint32_t>(h) << 16;
    float f;
    __builtin_memcpy(&f, &u, sizeof(f));
    return f;
  }
  static void store(float f, char* p) {
    uint32_t u;
    __builtin_memcpy(&u, &f, sizeof(u));
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    u = nan ? (u | 0x400000u) : u + 0x7fffu + ((u >> 16) & 1u);
    const uint16_t h = static_cast<uint16_t>(u >> 16);
    __builtin_memcpy(p, &h, sizeof(h));
  }
};

// Where entry (r, j, r') of a slice lies in a float copy of it.
struct SliceOrder {
  int64_t rank, dim, next;
};

inline SliceOrder slice_order(const EmbeddingShape& s, int64_t core, bool transposed) {
  const int64_t rank = s.rank[core], dim = s.dim[core], next = s.rank[core + 1];
  if (core == s.cores - 1) {
    // One matrix [r, j] (or [j, r]) for each index of the ring.
    return transposed ? SliceOrder{1, rank, dim * rank} : SliceOrder{dim, 1, dim * rank};
  }
  return transposed ? SliceOrder{1, next * rank, rank} : SliceOrder{dim * next, next, 1};
}

inline int64_t slice_size(const EmbeddingShape& s, int64_t core) {
  return s.rank[core] * s.dim[core] * s.rank[core + 1];
}

struct Slice {
  const float* data;
  int64_t row;  // from one row to the next
};

// Slices of one core: in place where that is as good, otherwise copied when first asked for.
template <class Entry>
struct Slices {
  const char* core = nullptr;
  float* copies = nullptr;  // null: in place
  uint8_t* made = nullptr;
  int64_t rank = 0, vocab = 0, dim = 0, next = 0, size = 0, row = 0;
  SliceOrder order{};

  Slice at(int32_t digit) const {
    if (!copies) {
      return {reinterpret_cast<const float*>(core + digit * dim * next * Entry::kBytes), vocab * dim * next};
    }
    float* to = copies + digit * size;
    if (!made[digit]) {
      made[digit] = 1;
      copy(digit, to);
    }
    return {to, row};
  }

  void copy(int64_t digit, float* to) const {
    for (int64_t r = 0; r < rank; ++r) {
      const char* from = core + (r * vocab + digit) * dim * next * Entry::kBytes;
      for (int64_t j = 0; j < dim; ++j) {
        for (int64_t n = 0; n < next; ++n, from += Entry::kBytes) {
          to[r * order.rank + j * order.dim + n * order.next] = Entry::load(from);
        }
      }
    }
  }
};

// Hands out parts of the scratch memory; without any it only counts.
struct EmbeddingMemory {
  char* at;
  size_t used = 0;
  void* take(int64_t bytes) {
    void* found = at ? at + used : nullptr;
    used += (static_cast<size_t>(bytes) + 63) / 64 * 64;
    return found;
  }
  float* floats(int64_t count) { return static_cast<float*>(take(count * 4)); }
};

// What one piece works with.
template <class Entry>
struct EmbeddingWork {
  int64_t begin, end;  // its rows
  Slices<Entry> slices[kMaxEmbeddingCores];
  Slices<Entry> turned[kMaxEmbeddingCores];  // backward: transposed, cores 1 and up
  float* product[kMaxEmbeddingCores] = {};   // product[k]: of the leading k cores, [r_0 dim_0 .. dim_{k-1}, r_k]
  int64_t height[kMaxEmbeddingCores] = {};   // its rows
  float* row = nullptr;                      // a row of the table, or of the gradient, in float32
  float* gradient[kMaxEmbeddingCores] = {};  // backward: of product[k]
  float* sums[kMaxEmbeddingCores] = {};      // backward: of each core, slice after slice
  size_t bytes = 0;

  EmbeddingWork(const EmbeddingParams& p, int64_t parts, int64_t part, bool backward, char* memory) {
    const EmbeddingShape& s = p.shape;
    begin = p.rows * part / parts;
    end = p.rows * (part + 1) / parts;
    EmbeddingMemory m{memory};
    if (backward) take_sums(s, m, sums);
    const int64_t last = s.cores - 1;
    int64_t height_here = s.rank[0], dim = 1;
    for (int64_t k = 0; k <= last; ++k) {
      dim *= s.dim[k];
      // Copies pay where each serves some rows; the same in every piece, whose memory is laid out alike.
      const bool often = p.rows / parts >= 4 * s.vocab[k];
      const bool plain = Entry::kIsFloat && (k == 0 ? s.rank[0] == 1 : k < last || s.rank[0] == 1);
      prepare(slices[k], p, k, false, !plain || (k > 0 && often), m);
      if (backward && k > 0) prepare(turned[k], p, k, true, true, m);
      if (k > 0) {
        height[k] = height_here;
        if (k > 1) product[k] = m.floats(height_here * s.rank[k]);
        if (backward && k > 1) gradient[k] = m.floats(height_here * s.rank[k]);
      }
      height_here *= s.dim[k];
    }
    row = m.floats(dim);
    bytes = m.used;
  }

  // In front, where the other pieces find them.
  static void take_sums(const EmbeddingShape& s, EmbeddingMemory& m, float** sums) {
    for (int64_t k = 0; k < s.cores; ++k) sums[k] = m.floats(slice_size(s, k) * s.vocab[k]);
  }

  static void prepare(Slices<Entry>& t, const EmbeddingParams& p, int64_t k, bool transposed, bool copied,
                      EmbeddingMemory& m) {
    const EmbeddingShape& s = p.shape;
    const bool last = k == s.cores - 1;
    t.core = static_cast<const char*>(p.core[k]);
    t.rank = s.rank[k];
    t.vocab = s.vocab[k];
    t.dim = s.dim[k];
    t.next = s.rank[k + 1];
    t.size = slice_size(s, k);
    t.order = slice_order(s, k, transposed);
    t.row = transposed ? t.rank : last ? t.dim : t.dim * t.next;
    if (!copied) return;
    t.copies = m.floats(t.size * t.vocab);
    t.made = static_cast<uint8_t*>(m.take(t.vocab));
    if (t.made) __builtin_memset(t.made, 0, static_cast<size_t>(t.vocab));
  }

  // Makes the products of the leading cores for a row's digits, from the first digit that is another than before.
  void advance(const EmbeddingShape& s, const int32_t* digits, int64_t changed) {
    if (changed == 0) product[1] = const_cast<float*>(slices[0].at(digits[0]).data);
    for (int64_t k = changed > 1 ? changed : 1; k < s.cores - 1; ++k) {
      const Slice slice = slices[k].at(digits[k]);
      const int64_t wide = s.dim[k] * s.rank[k + 1];
      small_product(
          {height[k], wide, s.rank[k], product[k], s.rank[k], 1, slice.data, slice.row, product[k + 1], wide, false});
    }
  }
};

// The first digit in which a row differs from the one before it.
inline int64_t first_change(const int32_t* digits, const int32_t* before) {
  if (!before) return 0;
  int64_t k = 0;
  while (digits[k] == before[k]) ++k;
  return k;
}
