// Forward pass of the bottleneck convolution.
//
// A piece of work is a run of output rows. It slides a window of rank-in rows Z (with their zero borders) down the
// image, and for each block of output rows makes the rank-out rows V and leaves them through the last factor
// straight to y. Nothing of full size is stored. A ring makes several rank spaces that share the core.
//
// Rank-space rows come in two layouts. "Columns": [pixel][rank], pixels along the tile's rows, ranks along its
// vectors. "Rows": [rank][pixel], the other way round; then no rank is padded to a vector. Channels-last data enters
// and leaves in columns form, contiguous data in rows form, and the core runs in whichever is cheaper; the
// activations between are transposed where the two meet (they are small there).

template <class T>
class BottleneckForward : public BottleneckEnter<T> {
 public:
  BottleneckForward(const BottleneckConvParams& p, const BottleneckGeometry& g, float* scratch, float* shared)
      : Enter(p, g, scratch, shared), v_(shared + g.v), v_other_(shared + g.v_other) {
    taps_a_ = reinterpret_cast<int64_t*>(own_ + g_.taps);
    taps_b_ = taps_a_ + s_.taps();
    describe_taps();
  }

  // Output rows [begin, end) of all images, counted through the batch.
  void run_rows(int64_t begin, int64_t end) {
    widen_bias();
    // Filling a row leaves its borders alone, and rows move whole: once cleared they stay clear.
    for (int64_t row = 0; row < g_.window_rows; ++row) this->clear_borders(z_ + row * g_.z_row);
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
          this->fill(n, top + rows * part / parts, top + rows * (part + 1) / parts, top);
        else this->fill(n, top, top + rows, top, part, parts);
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
  using Enter = BottleneckEnter<T>;
  using Enter::g_;
  using Enter::kBytes;
  using Enter::l_;
  using Enter::own_;
  using Enter::p_;
  using Enter::s_;
  using Enter::w_;
  using Enter::z_;
  using typename Enter::Dot;
  using typename Enter::E;

  void describe_taps() {
    // Columns form with undilated columns and one ring index: the taps of a kernel row are contiguous in Z and count
    // as one.
    merged_ = !g_.core_rows && p_.dilation_w == 1 && s_.ring == 1 && !s_.depthwise;
    const int64_t across = merged_ ? 1 : s_.kernel_w;
    const int64_t words_a = g_.words_mid / s_.ring;
    tap_count_ = s_.kernel_h * across;
    tap_k_ = merged_ ? s_.kernel_w * words_a : words_a;
    for (int64_t y = 0; y < s_.kernel_h; ++y) {
      for (int64_t x = 0; x < across; ++x) {
        const int64_t t = y * across + x;
        const int64_t pixel = x * p_.dilation_w;
        const int64_t in_z = (y * p_.dilation_h * g_.z_row + (g_.core_rows ? pixel : pixel * g_.words_mid)) * 4;
        if (g_.core_rows && !s_.depthwise) {
          taps_a_[t] = t * words_a * 4;
          taps_b_[t] = in_z;
        } else {
          taps_a_[t] = in_z;
          taps_b_[t] = t * (s_.depthwise ? 1 : tap_k_);
        }
      }
    }
  }

  void widen_bias() {
    float* bias = own_ + g_.bias;
    const int64_t n = s_.c_out;
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
      this->fill(n, filled, bottom, new_top);
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

  // While the core runs, the lines of the next window's input rows and of the output rows to be stored travel. A
  // depthwise core is too short for that: there it is while the last stage runs, for the output rows after its own.
  void ask_ahead(int64_t n, int64_t x_first, int64_t x_rows, int64_t y_first, int64_t y_rows) {
    read_ = write_ = Prefetch{};
    if (x_first >= 0 && x_first < p_.height) {
      const int64_t rows = x_first + x_rows < p_.height ? x_rows : p_.height - x_first;
      read_ = lines_of(this->x_row(n, x_first), p_.x_strides, rows * p_.width, s_.c_in);
    }
    if (s_.depthwise) y_first += y_rows;
    if (y_first + y_rows > p_.out_height) return;
    const E* y = static_cast<const E*>(p_.y) + n * p_.y_strides.n + y_first * p_.y_strides.h;
    write_ = lines_of(y, p_.y_strides, y_rows * p_.out_width, s_.c_out);
  }

  // `rows` output rows of V from Z, whose first row is the first tap of the first of them.
  void core(const float* z, int64_t rows, int64_t part, int64_t parts) {
    if (s_.depthwise) core_depthwise(z, rows, part, parts);
    else if (g_.core_rows) core_in_rows(z, rows, part, parts);
    else core_in_columns(z, rows, part, parts);
  }

  Product core_product() const {
    Product m;
    m.k = tap_k_;
    m.taps = tap_count_;
    m.a_tap = taps_a_;
    m.b_tap = taps_b_;
    m.read = read_;
    m.write = write_;
    return m;
  }

  void core_in_columns(const float* z, int64_t rows, int64_t part, int64_t parts) {
    const int64_t words_a = g_.words_mid / s_.ring, words_b = g_.words_out / s_.ring;
    // The ring indices of a pixel are further rows of the tiles, as far apart as pixels would be without a ring.
    const bool together = s_.ring == 1 || p_.stride_w == 1;
    Product m = core_product();
    m.segments = rows;
    m.rows = together ? p_.out_width * s_.ring : p_.out_width;
    m.a_row = p_.stride_w * (together ? words_a : g_.words_mid) * 4;
    m.a_segment = p_.stride_h * g_.z_row * 4;
    m.b = reinterpret_cast<const char*>(w_ + l_.core_columns);
    m.columns = s_.rank_out;
    m.c_row = (together ? words_b : g_.words_out) * 4;
    m.c_segment = p_.out_width * g_.words_out * 4;
    m.store = T::kPairs ? Store::kBfloat16 : Store::kFloat;
    m.c_column = T::kPairs ? 2 : 4;
    if (T::kPairs && s_.out() % 2 && part == 0)
      this->clear_last_halves(v_, rows * p_.out_width, g_.words_out, g_.words_out);
    for (int64_t q = 0; q < (together ? 1 : s_.ring); ++q) {
      m.a = reinterpret_cast<const char*>(z + q * words_a);
      m.c = reinterpret_cast<char*>(v_ + q * words_b);
      if (g_.streams) multiply<AOrder::kAlongK, false, Dot, true>(m);
      else multiply<AOrder::kAlongK, false, Dot>(m, part, parts);
      m.read = m.write = Prefetch{};
    }
  }

  void core_in_rows(const float* z, int64_t rows, int64_t part, int64_t parts) {
    const int64_t words_a = g_.words_mid / s_.ring, words_b = g_.words_out / s_.ring;
    Product m = core_product();
    m.rows = s_.rank_out;
    m.a = reinterpret_cast<const char*>(w_ + l_.core_rows);
    m.a_row = s_.taps() * words_a * 4;
    m.b_packed = false;
    m.b_k = g_.z_pitch * 4;
    m.columns = p_.out_width;
    m.c_row = g_.v_pitch * 4;
    m.store = T::kPairs ? Store::kBfloat16Pairs : Store::kFloat;
    for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i) {
      for (int64_t q = 0; q < s_.ring; ++q) {
        m.b = reinterpret_cast<const char*>(z + i * p_.stride_h * g_.z_row + q * words_a * g_.z_pitch);
        m.c = reinterpret_cast<char*>(v_ + i * p_.out_width + q * words_b * g_.v_pitch);
        if (g_.streams) multiply<AOrder::kAlongK, false, Dot, true>(m);
        else multiply<AOrder::kAlongK, false, Dot>(m);
        m.read = m.write = Prefetch{};
      }
    }
  }

  void core_depthwise(const float* z, int64_t rows, int64_t part, int64_t parts) {
    Depthwise d;
    d.words = g_.words_mid;
    d.pixels = p_.out_width;
    d.taps = tap_count_;
    d.z_tap = taps_a_;
    d.w_tap = taps_b_;
    for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i) {
      d.z = z + i * p_.stride_h * g_.z_row;
      if (g_.core_rows) {
        d.weights = w_ + l_.core_rows;
        d.z_pitch = g_.z_pitch;
        d.to = v_ + i * p_.out_width;
        d.to_pitch = g_.v_pitch;
        depthwise_lines<T>(d);
      } else {
        d.weights = w_ + l_.core_columns;
        d.z_pitch = p_.stride_w * g_.words_mid;
        d.to = v_ + i * p_.out_width * g_.words_out;
        d.to_pitch = g_.words_out;
        depthwise_pixels<T>(d);
      }
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
    if (p_.residual) m.residual = static_cast<const char*>(p_.residual) + (m.c - static_cast<const char*>(p_.y));
    m.relu = p_.relu;
    if (!g_.y_rows) {
      m.rows = pixels;
      m.b = reinterpret_cast<const char*>(w_ + l_.out_columns);
      m.columns = s_.c_out;
      m.init_mode = Init::kColumns;
      m.c_row = p_.y_strides.w * kBytes;
      m.a = reinterpret_cast<const char*>(v_);
      if (g_.core_rows) {
        m.a_k = g_.v_pitch * 4;
        multiply<AOrder::kAlongM, false, Dot>(m, part, parts);
      } else {
        m.a_row = g_.words_out * 4;
        last_product(m, part, parts);
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
    m.rows = s_.c_out;
    m.a = reinterpret_cast<const char*>(w_ + l_.out_rows);
    m.a_row = g_.words_out * 4;
    m.b = reinterpret_cast<const char*>(v);
    m.b_packed = false;
    m.b_k = g_.v_pitch * 4;
    m.columns = pixels;
    m.init_mode = Init::kRows;
    m.c_row = p_.y_strides.c * kBytes;
    last_product(m, part, parts);
  }

  void last_product(Product& m, int64_t part, int64_t parts) const {
    if (!s_.depthwise || !g_.streams) {
      multiply<AOrder::kAlongK, false, Dot>(m, part, parts);
      return;
    }
    m.read = read_;
    m.write = write_;
    multiply<AOrder::kAlongK, false, Dot, true>(m);
  }

  float *v_, *v_other_;
  int64_t *taps_a_, *taps_b_;
  Prefetch read_, write_;
  int64_t tap_count_ = 0, tap_k_ = 0;
  bool merged_ = false;
};
