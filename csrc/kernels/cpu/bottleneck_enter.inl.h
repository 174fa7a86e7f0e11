// Stage one of the forward pass: rows of x into rows of Z, the input in rank space with its zero borders, in the form
// that the core reads. See bottleneck_conv.inl.h for the two forms.

template <class T>
class BottleneckEnter {
 protected:
  using E = typename T::Element;
  using Dot = typename T::Dot;
  static constexpr int64_t kBytes = sizeof(E);

  BottleneckEnter(const BottleneckConvParams& p, const BottleneckGeometry& g, float* scratch, float* shared)
      : p_(p),
        g_(g),
        s_(g.shape),
        l_(packed_layout<T>(p.shape, p.packed_whole ? PackedForms{} : g.forms())),
        w_(static_cast<const float*>(p.packed)),
        own_(scratch),
        z_(shared + g.z) {}

  // Input rows [from, to) of image n into the window whose first row is input row `top`.
  void fill(int64_t n, int64_t from, int64_t to, int64_t top, int64_t part = 0, int64_t parts = 1) {
    for (int64_t row = from; row < to && part == 0; ++row) {
      float* z = z_ + (row - top) * g_.z_row;
      if (row < 0 || row >= p_.height) __builtin_memset(z, 0, static_cast<size_t>(g_.z_row) * 4);
      else if (g_.phased) clear_borders(z);
    }
    const int64_t first = from < 0 ? 0 : from;
    const int64_t last = to > p_.height ? p_.height : to;
    if (first >= last || g_.z_used <= 0) return;
    float* z = z_ + (first - top) * g_.z_row;
    if (g_.x_rows) fill_from_rows(n, first, last, z, part, parts);
    else fill_from_columns(n, first, last, z, part, parts);
  }

  void clear_borders(float* z) {
    const int64_t left = p_.pad_left < g_.z_width ? p_.pad_left : g_.z_width;
    const int64_t right = left + g_.z_used;
    if (g_.core_rows) {
      for (int64_t r = 0; r < g_.words_mid; ++r) {
        for (int64_t i = 0; i < left; ++i) z[r * g_.z_pitch + i] = 0.0f;
        for (int64_t i = right; i < g_.z_width; ++i) z[r * g_.z_pitch + i] = 0.0f;
      }
      return;
    }
    __builtin_memset(z, 0, static_cast<size_t>(left * g_.words_mid) * 4);
    const int64_t end = g_.z_row;
    __builtin_memset(z + right * g_.words_mid, 0, static_cast<size_t>(end - right * g_.words_mid) * 4);
    if (T::kPairs && !g_.x_rows && s_.mid() % 2)
      clear_last_halves(z + left * g_.words_mid, g_.z_used, g_.words_mid, g_.words_mid);
  }

  // The absent half of an odd rank's last pair is multiplied by zero and must not be NaN. Only that half is written:
  // another part may be writing the other.
  static void clear_last_halves(float* row, int64_t pixels, int64_t words, int64_t pitch) {
    char* p = reinterpret_cast<char*>(row) + words * 4 - 2;
    for (int64_t i = 0; i < pixels; ++i, p += pitch * 4) __builtin_memset(p, 0, 2);
  }

  const E* x_row(int64_t n, int64_t row) const {
    return static_cast<const E*>(p_.x) + n * p_.x_strides.n + row * p_.x_strides.h;
  }

  // Channels lie together: pixels along tile rows.
  void fill_from_columns(int64_t n, int64_t first, int64_t last, float* z, int64_t part, int64_t parts) {
    Product m;
    m.k = g_.words_in;
    m.b = reinterpret_cast<const char*>(w_ + l_.in_columns);
    m.columns = s_.mid();
    m.rows = g_.z_used;
    m.store = T::kPairs ? Store::kBfloat16 : Store::kFloat;
    m.c_column = T::kPairs ? 2 : 4;
    m.c_row = g_.words_mid * 4;
    if (!g_.gather_x && !g_.core_rows) {
      m.segments = last - first;
      m.a = reinterpret_cast<const char*>(x_row(n, first));
      m.a_row = p_.x_strides.w * kBytes;
      m.a_segment = p_.x_strides.h * kBytes;
      m.c = reinterpret_cast<char*>(z + p_.pad_left * g_.words_mid);
      m.c_segment = g_.z_row * 4;
      multiply<AOrder::kAlongK, false, Dot>(m, part, parts);
      return;
    }
    for (int64_t row = first; row < last; ++row, z += g_.z_row) {
      m.a = reinterpret_cast<const char*>(x_row(n, row));
      m.a_row = p_.x_strides.w * kBytes;
      if (g_.gather_x) {
        gather_pixels(x_row(n, row));
        m.a = reinterpret_cast<const char*>(own_ + g_.gathered);
        m.a_row = g_.words_in * 4;
      }
      if (!g_.core_rows) {
        m.c = reinterpret_cast<char*>(z + p_.pad_left * g_.words_mid);
        multiply<AOrder::kAlongK, false, Dot>(m);
        continue;
      }
      // Whole vectors on the way out and back in: a load that spans two recent stores would wait for both.
      const int64_t pitch = padded_columns(s_.mid()) / (T::kPairs ? 2 : 1);
      float* flat = own_ + g_.flat;
      m.columns = padded_columns(s_.mid());
      m.c = reinterpret_cast<char*>(flat);
      m.c_row = pitch * 4;
      multiply<AOrder::kAlongK, false, Dot>(m);
      if (T::kPairs && s_.mid() % 2) clear_last_halves(flat, g_.z_used, g_.words_mid, pitch);
      transpose_words(flat, pitch, g_.z_used, g_.words_mid, z + p_.pad_left, g_.z_pitch);
    }
  }

  // Pixels lie together: ranks along tile rows. Every part has some of the ranks.
  void fill_from_rows(int64_t n, int64_t first, int64_t last, float* z, int64_t part, int64_t parts) {
    const int64_t begin = g_.words_mid * part / parts, words = g_.words_mid * (part + 1) / parts - begin;
    const int64_t rank = T::kPairs ? 2 * begin : begin, per_word = T::kPairs ? 2 : 1;
    Product m;
    m.k = g_.words_in;
    m.a = reinterpret_cast<const char*>(w_ + l_.in_rows + rank * g_.words_in);
    m.a_row = g_.words_in * 4;
    m.rows = rank + words * per_word < s_.mid() ? words * per_word : s_.mid() - rank;
    m.b_packed = false;
    m.store = T::kPairs ? Store::kBfloat16Pairs : Store::kFloat;
    for (int64_t row = first; row < last; row += g_.in_block) {
      const int64_t rows = row + g_.in_block < last ? g_.in_block : last - row;
      m.columns = g_.in_block == 1 ? g_.z_used : rows * p_.width;
      const bool direct = g_.core_rows && g_.in_block == 1;
      float* to = direct ? z + begin * g_.z_pitch + p_.pad_left : own_ + g_.flat;
      m.c = reinterpret_cast<char*>(to);
      m.c_row = (direct ? g_.z_pitch : g_.flat_pitch) * 4;
      if (g_.gather_x) {
        gather_channels(x_row(n, row), m.columns);
        m.b = reinterpret_cast<const char*>(own_ + g_.gathered);
        m.b_k = g_.flat_pitch * 4;
        multiply<AOrder::kAlongK, false, Dot>(m);
      } else {
        m.b = reinterpret_cast<const char*>(x_row(n, row));
        m.b_k = p_.x_strides.c * 4;
        multiply<AOrder::kAlongK, true, Dot>(m);
      }
      for (int64_t i = 0; i < rows; ++i, z += g_.z_row) {
        if (direct) continue;
        const float* from = to + i * p_.width;
        if (g_.core_rows) {
          for (int64_t r = 0; r < words; ++r)
            copy_words(from + r * g_.flat_pitch, g_.z_used, z + (begin + r) * g_.z_pitch + p_.pad_left);
        } else {
          transpose_words(from, g_.flat_pitch, words, g_.z_used, z + p_.pad_left * g_.words_mid + begin, g_.words_mid);
        }
      }
    }
  }

  // One image row as [pixel][word].
  void gather_pixels(const E* x) {
    uint32_t* to = reinterpret_cast<uint32_t*>(own_ + g_.gathered);
    const int64_t c = s_.c_in;
    for (int64_t i = 0; i < g_.z_used; ++i) {
      const E* from = x + i * p_.x_strides.w;
      for (int64_t w = 0; w < g_.words_in; ++w) {
        const int64_t at = T::kPairs ? 2 * w : w;
        *to++ = make_word<T>(from, at * p_.x_strides.c, p_.x_strides.c, T::kPairs && at + 1 >= c);
      }
    }
  }

  // One image row as [word][pixel].
  void gather_channels(const E* x, int64_t pixels) {
    const int64_t c = s_.c_in;
    for (int64_t w = 0; w < g_.words_in; ++w) {
      uint32_t* to = reinterpret_cast<uint32_t*>(own_ + g_.gathered) + w * g_.flat_pitch;
      const int64_t at = T::kPairs ? 2 * w : w;
      const E* from = x + at * p_.x_strides.c;
      const bool single = T::kPairs && at + 1 >= c;
      for (int64_t i = 0; i < pixels; ++i) to[i] = make_word<T>(from, i, p_.x_strides.c, single);
    }
  }

  const BottleneckConvParams& p_;
  const BottleneckGeometry& g_;
  const BottleneckShape& s_;  // as the kernels hold it
  const PackedLayout l_;
  const float* w_;
  float* own_;
  float* z_;
};
