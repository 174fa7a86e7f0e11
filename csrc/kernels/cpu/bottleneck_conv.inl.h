// Forward pass of the bottleneck convolution.
//
// A piece of work is a run of output rows. It slides a window of rank-in rows Z (with their zero borders) down the
// image, and for each block of output rows makes the rank-out rows V and leaves them through the last factor
// straight to y. Nothing of full size is stored.
//
// Rank-space rows come in two layouts. "Columns": [pixel][rank], pixels along the tile's rows, ranks along its
// vectors. "Rows": [rank][pixel], the other way round; then no rank is padded to a vector. Channels-last data enters
// and leaves in columns form, contiguous data in rows form, and the core runs in whichever is cheaper; the
// activations between are transposed where the two meet (they are small there).

template <class T>
class BottleneckForward {
 public:
  BottleneckForward(const BottleneckConvParams& p, const BottleneckGeometry& g, float* scratch, float* shared)
      : p_(p),
        g_(g),
        l_(packed_layout<T>(p.shape, p.packed_whole ? PackedForms{} : g.forms())),
        w_(static_cast<const float*>(p.packed)),
        own_(scratch),
        z_(shared + g.z),
        v_(shared + g.v),
        v_other_(shared + g.v_other) {
    taps_a_ = reinterpret_cast<int64_t*>(own_ + g_.taps);
    taps_b_ = taps_a_ + p.shape.kernel_h * p.shape.kernel_w;
    describe_taps();
  }

  // Output rows [begin, end) of all images, counted through the batch.
  void run_rows(int64_t begin, int64_t end) {
    widen_bias();
    // Filling a row leaves its borders alone, and rows move whole: once cleared they stay clear.
    for (int64_t row = 0; row < g_.window_rows; ++row) clear_borders(z_ + row * g_.z_row);
    while (begin < end) {
      const int64_t n = begin / p_.out_height, first = begin % p_.out_height;
      int64_t last = first + (end - begin);
      if (last > p_.out_height) last = p_.out_height;
      run_image_rows(n, first, last);
      begin += last - first;
    }
  }

  // One stage of all images, cut in even parts; for images too small to cut by rows.
  void run_phase(int64_t phase, int64_t part, int64_t parts) {
    const int64_t z_image = g_.window_rows * g_.z_row;
    const int64_t v_rows_image = g_.words_out * g_.v_pitch;
    const int64_t v_image = g_.core_rows ? v_rows_image : p_.out_height * p_.out_width * g_.words_out;
    if (phase == 2) widen_bias();
    float *z = z_, *v = v_, *v_other = v_other_;
    for (int64_t n = 0; n < p_.batch; ++n) {
      // Where stage one transposes or gathers pixels it is cut by rows, everything else by tiles or ranks.
      if (phase == 0) {
        const int64_t rows = g_.window_rows;
        const int64_t top = -p_.pad_top;
        if (!g_.x_rows && (g_.core_rows || g_.gather_x))
          fill(n, top + rows * part / parts, top + rows * (part + 1) / parts, top);
        else fill(n, top, top + rows, top, part, parts);
      } else if (phase == 1) {
        core(z_, p_.out_height, part, parts);
      } else {
        leave(n, 0, p_.out_height, part, parts);
      }
      z_ += z_image;
      v_ += v_image;
      v_other_ += v_rows_image;
    }
    z_ = z;
    v_ = v;
    v_other_ = v_other;
  }

 private:
  using E = typename T::Element;
  using Dot = typename T::Dot;
  static constexpr int64_t kBytes = sizeof(E);

  void describe_taps() {
    const BottleneckShape& s = p_.shape;
    // Columns form with undilated columns: the taps of a kernel row are contiguous in Z and count as one.
    merged_ = !g_.core_rows && p_.dilation_w == 1;
    const int64_t across = merged_ ? 1 : s.kernel_w;
    tap_count_ = s.kernel_h * across;
    tap_k_ = merged_ ? s.kernel_w * g_.words_mid : g_.words_mid;
    for (int64_t y = 0; y < s.kernel_h; ++y) {
      for (int64_t x = 0; x < across; ++x) {
        const int64_t t = y * across + x;
        const int64_t pixel = x * p_.dilation_w;
        const int64_t in_z = (y * p_.dilation_h * g_.z_row + (g_.core_rows ? pixel : pixel * g_.words_mid)) * 4;
        if (g_.core_rows) {
          taps_a_[t] = t * g_.words_mid * 4;
          taps_b_[t] = in_z;
        } else {
          taps_a_[t] = in_z;
          taps_b_[t] = t * tap_k_;
        }
      }
    }
  }

  void widen_bias() {
    float* bias = own_ + g_.bias;
    const int64_t n = p_.shape.c_out;
    for (int64_t i = 0; i < n; ++i) bias[i] = p_.bias ? to_float(static_cast<const E*>(p_.bias)[i]) : 0.0f;
    for (int64_t i = n; i < padded_columns(n) + 16; ++i) bias[i] = 0.0f;
  }

  void run_image_rows(int64_t n, int64_t first, int64_t last) {
    int64_t top = 0, filled = 0;  // input row of the window's first row; input rows before this one are there
    bool any = false;
    for (int64_t chunk = first; chunk < last; chunk += g_.window_out) {
      const int64_t chunk_end = chunk + g_.window_out < last ? chunk + g_.window_out : last;
      const int64_t new_top = chunk * p_.stride_h - p_.pad_top;
      const int64_t bottom = (chunk_end - 1) * p_.stride_h - p_.pad_top + g_.halo;
      if (any && filled > new_top) {
        __builtin_memmove(z_, z_ + (new_top - top) * g_.z_row, static_cast<size_t>((filled - new_top) * g_.z_row) * 4);
      } else {
        filled = new_top;
      }
      fill(n, filled, bottom, new_top);
      filled = bottom;
      top = new_top;
      any = true;
      for (int64_t row = chunk; row < chunk_end; row += g_.block) {
        const int64_t rows = row + g_.block < chunk_end ? g_.block : chunk_end - row;
        if (g_.streams) ask_ahead(n, filled + (row - chunk) * p_.stride_h, rows * p_.stride_h, row, rows);
        core(z_ + (row - chunk) * p_.stride_h * g_.z_row, rows, 0, 1);
        leave(n, row, rows, 0, 1);
      }
    }
  }

  // While the core runs, the lines of the next window's input rows and of the output rows to be stored travel.
  void ask_ahead(int64_t n, int64_t x_first, int64_t x_rows, int64_t y_first, int64_t y_rows) {
    read_ = write_ = Prefetch{};
    if (x_first >= 0 && x_first < p_.height) {
      const int64_t rows = x_first + x_rows < p_.height ? x_rows : p_.height - x_first;
      read_ = lines_of(x_row(n, x_first), p_.x_strides, rows * p_.width, p_.shape.c_in);
    }
    const E* y = static_cast<const E*>(p_.y) + n * p_.y_strides.n + y_first * p_.y_strides.h;
    write_ = lines_of(y, p_.y_strides, y_rows * p_.out_width, p_.shape.c_out);
  }

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
    if (T::kPairs && !g_.x_rows && p_.shape.rank_in % 2)
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
    m.columns = p_.shape.rank_in;
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
      const int64_t pitch = padded_columns(p_.shape.rank_in) / (T::kPairs ? 2 : 1);
      float* flat = own_ + g_.flat;
      m.columns = padded_columns(p_.shape.rank_in);
      m.c = reinterpret_cast<char*>(flat);
      m.c_row = pitch * 4;
      multiply<AOrder::kAlongK, false, Dot>(m);
      if (T::kPairs && p_.shape.rank_in % 2) clear_last_halves(flat, g_.z_used, g_.words_mid, pitch);
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
    m.rows = rank + words * per_word < p_.shape.rank_in ? words * per_word : p_.shape.rank_in - rank;
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
            __builtin_memcpy(z + (begin + r) * g_.z_pitch + p_.pad_left, from + r * g_.flat_pitch,
                             static_cast<size_t>(g_.z_used) * 4);
        } else {
          transpose_words(from, g_.flat_pitch, words, g_.z_used, z + p_.pad_left * g_.words_mid + begin, g_.words_mid);
        }
      }
    }
  }

  // One image row as [pixel][word].
  void gather_pixels(const E* x) {
    uint32_t* to = reinterpret_cast<uint32_t*>(own_ + g_.gathered);
    const int64_t c = p_.shape.c_in;
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
    const int64_t c = p_.shape.c_in;
    for (int64_t w = 0; w < g_.words_in; ++w) {
      uint32_t* to = reinterpret_cast<uint32_t*>(own_ + g_.gathered) + w * g_.flat_pitch;
      const int64_t at = T::kPairs ? 2 * w : w;
      const E* from = x + at * p_.x_strides.c;
      const bool single = T::kPairs && at + 1 >= c;
      for (int64_t i = 0; i < pixels; ++i) to[i] = make_word<T>(from, i, p_.x_strides.c, single);
    }
  }

  // `rows` output rows of V from Z, whose first row is the first tap of the first of them.
  void core(const float* z, int64_t rows, int64_t part, int64_t parts) {
    Product m;
    m.k = tap_k_;
    m.taps = tap_count_;
    m.a_tap = taps_a_;
    m.b_tap = taps_b_;
    m.read = read_;
    m.write = write_;
    if (!g_.core_rows) {
      m.segments = rows;
      m.rows = p_.out_width;
      m.a = reinterpret_cast<const char*>(z);
      m.a_row = p_.stride_w * g_.words_mid * 4;
      m.a_segment = p_.stride_h * g_.z_row * 4;
      m.b = reinterpret_cast<const char*>(w_ + l_.core_columns);
      m.columns = p_.shape.rank_out;
      m.c = reinterpret_cast<char*>(v_);
      m.c_row = g_.words_out * 4;
      m.c_segment = p_.out_width * g_.words_out * 4;
      m.store = T::kPairs ? Store::kBfloat16 : Store::kFloat;
      m.c_column = T::kPairs ? 2 : 4;
      if (T::kPairs && p_.shape.rank_out % 2 && part == 0)
        clear_last_halves(v_, rows * p_.out_width, g_.words_out, g_.words_out);
      if (g_.streams) multiply<AOrder::kAlongK, false, Dot, true>(m);
      else multiply<AOrder::kAlongK, false, Dot>(m, part, parts);
      return;
    }
    m.rows = p_.shape.rank_out;
    m.a = reinterpret_cast<const char*>(w_ + l_.core_rows);
    m.a_row = p_.shape.kernel_h * p_.shape.kernel_w * g_.words_mid * 4;
    m.b_packed = false;
    m.b_k = g_.z_pitch * 4;
    m.columns = p_.out_width;
    m.c_row = g_.v_pitch * 4;
    m.store = T::kPairs ? Store::kBfloat16Pairs : Store::kFloat;
    for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i) {
      m.b = reinterpret_cast<const char*>(z + i * p_.stride_h * g_.z_row);
      m.c = reinterpret_cast<char*>(v_ + i * p_.out_width);
      if (g_.streams) multiply<AOrder::kAlongK, false, Dot, true>(m);
      else multiply<AOrder::kAlongK, false, Dot>(m);
      m.read = m.write = Prefetch{};
    }
  }

  // `rows` output rows from `row` of image n, from V to y.
  void leave(int64_t n, int64_t row, int64_t rows, int64_t part, int64_t parts) {
    const int64_t pixels = rows * p_.out_width;
    Product m;
    m.k = g_.words_out;
    m.init = own_ + g_.bias;
    E* y = static_cast<E*>(p_.y) + n * p_.y_strides.n + row * p_.y_strides.h;
    m.c = reinterpret_cast<char*>(y);
    m.store = kBytes == 2 ? Store::kBfloat16 : Store::kFloat;
    m.c_column = kBytes;
    if (!g_.y_rows) {
      m.rows = pixels;
      m.b = reinterpret_cast<const char*>(w_ + l_.out_columns);
      m.columns = p_.shape.c_out;
      m.init_mode = Init::kColumns;
      m.c_row = p_.y_strides.w * kBytes;
      m.a = reinterpret_cast<const char*>(v_);
      if (g_.core_rows) {
        m.a_k = g_.v_pitch * 4;
        multiply<AOrder::kAlongM, false, Dot>(m, part, parts);
      } else {
        m.a_row = g_.words_out * 4;
        multiply<AOrder::kAlongK, false, Dot>(m, part, parts);
      }
      return;
    }
    const float* v = v_;
    if (!g_.core_rows) {
      // With several parts each transposes all of V into its own scratch: V is tiny there.
      float* other = parts > 1 ? own_ + g_.v_other : v_other_;
      transpose_words(v_, g_.words_out, pixels, g_.words_out, other, g_.v_pitch);
      v = other;
    }
    m.rows = p_.shape.c_out;
    m.a = reinterpret_cast<const char*>(w_ + l_.out_rows);
    m.a_row = g_.words_out * 4;
    m.b = reinterpret_cast<const char*>(v);
    m.b_packed = false;
    m.b_k = g_.v_pitch * 4;
    m.columns = pixels;
    m.init_mode = Init::kRows;
    m.c_row = p_.y_strides.c * kBytes;
    multiply<AOrder::kAlongK, false, Dot>(m, part, parts);
  }

  const BottleneckConvParams& p_;
  const BottleneckGeometry& g_;
  const PackedLayout l_;
  const float* w_;
  float* own_;
  float *z_, *v_, *v_other_;
  int64_t *taps_a_, *taps_b_;
  Prefetch read_, write_;
  int64_t tap_count_ = 0, tap_k_ = 0;
  bool merged_ = false;
};
