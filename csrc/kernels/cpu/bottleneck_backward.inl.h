// Backward pass of the bottleneck convolution.
//
// A piece of work is a run of output rows, taken in bands small enough for the cache. For each band the rank-space
// activations are made again (Z from x, V from Z), the gradients descend (dV from dy, dZ from dV, dx from dZ), and the
// weight gradients accumulate into the piece's own sums, which a second phase adds up in a fixed order. Rows of Z and
// dV that the next band needs are kept, none is made twice within a piece. Sums are float32; bfloat16 data is widened
// on the way in.

template <class T>
class BottleneckBackward {
 public:
  BottleneckBackward(const BottleneckBackwardParams& q, const BackwardGeometry& g, int64_t part)
      : q_(q),
        p_(q.forward),
        s_(q.forward.shape),
        g_(g),
        packed_(static_cast<const float*>(q.scratch)),
        own_(static_cast<float*>(q.scratch) + g.packed_words + part * g.part_words) {
    kernel_a_ = reinterpret_cast<int64_t*>(own_ + g_.taps);
    kernel_b_ = kernel_a_ + s_.kernel_h * s_.kernel_w;
    rows_a_ = kernel_b_ + s_.kernel_h * s_.kernel_w;
    rows_b_ = rows_a_ + g_.band + g_.in_band;
    factor_in_ = weight(q.weights.factor_in, g_.wide_in);
    factor_out_ = weight(q.weights.factor_out, g_.wide_out);
    core_ = weight(q.weights.core, g_.wide_core);
  }

  // The weights in the forms the products read, one form after the other, dealt out to the parts. Every part widens
  // narrow weights for itself.
  void pack(int64_t part) {
    if constexpr (kBytes == 2) {
      widen(q_.weights.factor_in, g_.wide_in, s_.c_in * s_.rank_in);
      widen(q_.weights.core, g_.wide_core, s_.kernel_h * s_.kernel_w * s_.rank_in * s_.rank_out);
      widen(q_.weights.factor_out, g_.wide_out, s_.c_out * s_.rank_out);
    }
    pack_backward(s_, g_, core_, factor_out_, factor_in_, part, static_cast<float*>(q_.scratch));
  }

  // Output rows [begin, end) of all images, counted through the batch.
  void run_rows(int64_t begin, int64_t end) {
    if (q_.grad_bias) clear(own_ + g_.sum_bias, s_.c_out);
    while (begin < end) {
      const int64_t n = begin / p_.out_height, first = begin % p_.out_height;
      int64_t last = first + (end - begin);
      if (last > p_.out_height) last = p_.out_height;
      run_image_rows(n, first, last);
      begin += last - first;
    }
    // The first product of each sum overwrites what the memory held; sums that had none are cleared.
    if (q_.grad_core && !added_.core) clear(own_ + g_.sum_core, s_.kernel_h * s_.kernel_w * s_.rank_in * s_.rank_out);
    if (q_.grad_factor_out && !added_.out) clear(own_ + g_.sum_out, s_.c_out * s_.rank_out);
    if (q_.grad_factor_in && !added_.in) clear(own_ + g_.sum_in, s_.c_in * s_.rank_in);
  }

  // Adds up the pieces' sums, in their order, and writes an even share of the weight gradients.
  void reduce(int64_t part) {
    const int64_t taps = s_.kernel_h * s_.kernel_w, ab = s_.rank_in * s_.rank_out;
    add_share(part, g_.sum_out, s_.c_out * s_.rank_out, q_.grad_factor_out);
    add_share(part, g_.sum_in, s_.c_in * s_.rank_in, q_.grad_factor_in);
    add_share(part, g_.sum_bias, s_.c_out, q_.grad_bias);
    if (!q_.grad_core) return;
    // Sums of the core are [tap][a][b]; torch's order is [b][a][tap].
    E* to = static_cast<E*>(q_.grad_core);
    for (int64_t a = s_.rank_in * part / g_.threads; a < s_.rank_in * (part + 1) / g_.threads; ++a) {
      for (int64_t t = 0; t < taps; ++t) add_parts(g_.sum_core + t * ab + a * s_.rank_out, s_.rank_out);
      const float* sum = first_sums() + g_.sum_core + a * s_.rank_out;
      for (int64_t b = 0; b < s_.rank_out; ++b) {
        E* run = to + (b * s_.rank_in + a) * taps;
        for (int64_t t = 0; t < taps; ++t) run[t] = from_float(sum[t * ab + b]);
      }
    }
  }

 private:
  using E = typename T::Element;
  static constexpr int64_t kBytes = sizeof(E);

  static E from_float(float f) {
    if constexpr (kBytes == 4) {
      return f;
    } else {
      uint32_t u;
      __builtin_memcpy(&u, &f, sizeof(u));
      if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<E>((u >> 16) | 0x40u);
      return static_cast<E>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    }
  }

  // A weight as floats: in place, or where pack() widens it to.
  const float* weight(const void* from, int64_t copy) const {
    return kBytes == 4 ? static_cast<const float*>(from) : own_ + copy;
  }

  void widen(const void* from, int64_t copy, int64_t n) {
    for (int64_t i = 0; i < n; ++i) own_[copy + i] = to_float(static_cast<const E*>(from)[i]);
  }

  float* first_sums() const { return static_cast<float*>(q_.scratch) + g_.packed_words; }

  // Adds the other parts' sums to the first's.
  void add_parts(int64_t offset, int64_t n) const {
    float* sum = first_sums() + offset;
    for (int64_t i = 1; i < g_.threads; ++i) {
      const float* other = sum + i * g_.part_words;
      for (int64_t j = 0; j < n; ++j) sum[j] += other[j];
    }
  }

  void add_share(int64_t part, int64_t offset, int64_t n, void* to) const {
    if (!to) return;
    const int64_t begin = n * part / g_.threads, end = n * (part + 1) / g_.threads;
    add_parts(offset + begin, end - begin);
    const float* sum = first_sums() + offset;
    for (int64_t i = begin; i < end; ++i) static_cast<E*>(to)[i] = from_float(sum[i]);
  }

  ImageRows x_image(int64_t n) const {
    const Strides4& st = p_.x_strides;
    return {static_cast<const char*>(p_.x) + n * st.n * kBytes, st.h * kBytes, st.w * kBytes, st.c * kBytes, g_.x_rows};
  }

  ImageRows y_image(int64_t n) const {
    const Strides4& st = q_.grad_y_strides;
    return {static_cast<const char*>(q_.grad_y) + n * st.n * kBytes, st.h * kBytes, st.w * kBytes, st.c * kBytes,
            g_.y_rows};
  }

  // The input row at which output row `row`'s share of the image begins.
  int64_t input_row(int64_t row) const {
    if (row <= 0) return 0;
    if (row >= p_.out_height) return p_.height;
    const int64_t i = row * p_.stride_h - p_.pad_top;
    return i < 0 ? 0 : i > p_.height ? p_.height : i;
  }

  void run_image_rows(int64_t n, int64_t first, int64_t last) {
    const ImageRows x_all = x_image(n), y_all = y_image(n);
    int64_t z_top = 0, z_filled = 0, dv_top = 0, dv_filled = 0;
    bool started = false;
    for (int64_t b0 = first; b0 < last; b0 += g_.band) {
      const int64_t b1 = b0 + g_.band < last ? b0 + g_.band : last;
      const int64_t i0 = input_row(b0), i1 = input_row(b1);
      // Rows of dV for this band's weight gradients and for the input rows it finishes.
      // Its first row only ever moves down: rows once left behind are not made again.
      const int64_t reach = g_.need_dz ? (g_.halo - 1) / p_.stride_h : 0;
      const int64_t dv_first = b0 > reach ? b0 - reach : 0;
      slide(own_ + g_.dv, g_.dv_row, dv_top, dv_filled, dv_first, started);
      const int64_t y_first = g_.need_dv && dv_filled < b0 ? dv_filled : b0;
      const ImageRows y_new = readable<E>(y_all, g_.gather_y, y_first, b1, p_.out_width, s_.c_out, own_ + g_.y_copy);
      ImageRows y_band = y_new;
      y_band.data += (b0 - y_first) * y_new.row;
      if (g_.need_dv) descend(y_new, y_first, b1, dv_top);
      dv_filled = b1;
      if (q_.grad_bias) accumulate_bias(y_band, b1 - b0, p_.out_width, s_.c_out, own_ + g_.sum_bias);
      if (g_.need_z) {
        const int64_t top = b0 * p_.stride_h - p_.pad_top;
        const int64_t bottom = (b1 - 1) * p_.stride_h - p_.pad_top + g_.halo;
        slide(own_ + g_.z, g_.z_row, z_top, z_filled, top, started);
        refill(x_all, z_filled, bottom, z_top);
        z_filled = bottom;
      }
      if (g_.need_v) {
        remake_v(b1 - b0, ahead(q_.grad_y, q_.grad_y_strides, n, b1, g_.band, p_.out_height, p_.out_width, s_.c_out));
        accumulate(y_band, b1 - b0, p_.out_width, s_.c_out, own_ + g_.v, p_.out_width * s_.rank_out, s_.rank_out,
                   own_ + g_.sum_out, std::exchange(added_.out, true), rows_a_, rows_b_);
      }
      if (q_.grad_core) accumulate_core(b1 - b0, own_ + g_.dv + (b0 - dv_top) * g_.dv_row);
      if (g_.need_dz && i0 < i1) finish_input_rows(n, x_all, i0, i1, dv_top);
      started = true;
    }
  }

  // Moves the window so that its first row is `top`; rows before `filled` stay.
  static void slide(float* window, int64_t row, int64_t& top, int64_t& filled, int64_t new_top, bool started) {
    if (started && filled > new_top) {
      if (new_top > top)
        __builtin_memmove(window, window + (new_top - top) * row, static_cast<size_t>((filled - new_top) * row) * 4);
    } else {
      filled = new_top;
    }
    top = new_top;
  }

  // Input rows [from, to) into the window of Z whose first row is `top`, with their zero borders.
  void refill(const ImageRows& x, int64_t from, int64_t to, int64_t top) {
    float* z = own_ + g_.z;
    const int64_t left = p_.pad_left < g_.z_width ? p_.pad_left : g_.z_width;
    for (int64_t row = from; row < to; ++row) {
      float* at = z + (row - top) * g_.z_row;
      if (row < 0 || row >= p_.height) {
        clear(at, g_.z_row);
        continue;
      }
      const int64_t right = (left + g_.z_used) * s_.rank_in;
      clear(at, left * s_.rank_in);
      clear(at + right, g_.z_row - right);
    }
    const int64_t first = from < 0 ? 0 : from;
    const int64_t last = to > p_.height ? p_.height : to;
    if (first >= last || g_.z_used <= 0) return;
    const ImageRows rows = readable<E>(x, g_.gather_x, first, last, p_.width, s_.c_in, own_ + g_.x_copy);
    enter(rows, last - first, g_.z_used, s_.c_in, factor_in_, packed_ + g_.in_rows, s_.rank_in,
          z + (first - top) * g_.z_row + left * s_.rank_in, g_.z_row, own_ + g_.flat, g_.flat_pitch);
  }

  // Output rows [from, to) of grad_y into the window of dV whose first row is `top`.
  void descend(const ImageRows& y, int64_t from, int64_t to, int64_t top) {
    float* dv = own_ + g_.dv + (from - top) * g_.dv_row;
    const int64_t left = g_.dv_left * s_.rank_out, right = (g_.dv_left + p_.out_width) * s_.rank_out;
    for (int64_t r = 0; r < to - from; ++r) {
      clear(dv + r * g_.dv_row, left);
      clear(dv + r * g_.dv_row + right, g_.dv_row - right);
    }
    enter(y, to - from, p_.out_width, s_.c_out, factor_out_, packed_ + g_.out_rows, s_.rank_out, dv + left, g_.dv_row,
          own_ + g_.flat, g_.flat_pitch);
  }

  // Lines of the next band, asked for while this one is multiplied.
  Prefetch ahead(const void* image, const Strides4& strides, int64_t n, int64_t row, int64_t rows, int64_t height,
                 int64_t width, int64_t channels) const {
    if (!g_.streams || !image || row < 0 || row >= height) return {};
    const int64_t pixels = width * (rows < height - row ? rows : height - row);
    return lines_of(static_cast<const E*>(image) + n * strides.n + row * strides.h, strides, pixels, channels);
  }

  void run(const Product& m) const {
    if (g_.streams) multiply<AOrder::kAlongK, false, FloatDot, true>(m);
    else multiply<AOrder::kAlongK, false, FloatDot>(m);
  }

  void remake_v(int64_t rows, const Prefetch& next) {
    const int64_t across = p_.dilation_w == 1 ? 1 : s_.kernel_w;
    Product m;
    m.k = s_.rank_in * (across == 1 ? s_.kernel_w : 1);
    m.taps = s_.kernel_h * across;
    for (int64_t y = 0; y < s_.kernel_h; ++y) {
      for (int64_t x = 0; x < across; ++x) {
        kernel_a_[y * across + x] = (y * p_.dilation_h * g_.z_row + x * p_.dilation_w * s_.rank_in) * 4;
        kernel_b_[y * across + x] = (y * across + x) * m.k;
      }
    }
    m.a_tap = kernel_a_;
    m.b_tap = kernel_b_;
    m.segments = rows;
    m.rows = p_.out_width;
    m.a = reinterpret_cast<const char*>(own_ + g_.z);
    m.a_row = p_.stride_w * s_.rank_in * 4;
    m.a_segment = p_.stride_h * g_.z_row * 4;
    m.b = reinterpret_cast<const char*>(packed_ + g_.core);
    m.columns = s_.rank_out;
    m.c = reinterpret_cast<char*>(own_ + g_.v);
    m.c_row = s_.rank_out * 4;
    m.c_segment = p_.out_width * s_.rank_out * 4;
    m.read = next;
    run(m);
  }

  // sum[tap][a][b] += Z^T dV. Undilated taps of a kernel row are neighbours in Z and make one taller product.
  void accumulate_core(int64_t rows, const float* dv) {
    const int64_t across = p_.dilation_w == 1 ? 1 : s_.kernel_w;
    const int64_t taps = across == 1 ? s_.kernel_w : 1;
    Product m;
    m.rows = taps * s_.rank_in;
    m.k = p_.out_width;
    m.taps = rows;
    m.a_tap = rows_a_;
    m.b_tap = rows_b_;
    for (int64_t r = 0; r < rows; ++r) {
      rows_a_[r] = r * p_.stride_h * g_.z_row * 4;
      rows_b_[r] = r * g_.dv_row * 4;
    }
    m.a_k = p_.stride_w * s_.rank_in * 4;
    m.b = reinterpret_cast<const char*>(dv + g_.dv_left * s_.rank_out);
    m.b_packed = false;
    m.b_k = s_.rank_out * 4;
    m.columns = s_.rank_out;
    m.c_row = s_.rank_out * 4;
    m.init_mode = std::exchange(added_.core, true) ? Init::kAccumulate : Init::kZero;
    for (int64_t y = 0; y < s_.kernel_h; ++y) {
      for (int64_t x = 0; x < across; ++x) {
        m.a =
            reinterpret_cast<const char*>(own_ + g_.z + y * p_.dilation_h * g_.z_row + x * p_.dilation_w * s_.rank_in);
        m.c = reinterpret_cast<char*>(own_ + g_.sum_core + (y * s_.kernel_w + x) * s_.rank_in * s_.rank_out);
        multiply<AOrder::kAlongM, false, FloatDot>(m);
      }
    }
  }

  // dZ, and from it dx and the gradient of factor_in, for input rows [i0, i1).
  void finish_input_rows(int64_t n, const ImageRows& x_all, int64_t i0, int64_t i1, int64_t dv_top) {
    float* dz = own_ + g_.dz;
    const int64_t dz_row = p_.width * s_.rank_in;
    for (int64_t i = i0; i < i1; ++i) transposed_row(n, i, dz + (i - i0) * dz_row, dv_top);
    if (q_.grad_x) leave(n, i0, i1, dz);
    if (q_.grad_factor_in) {
      const ImageRows x = readable<E>(x_all, g_.gather_x, i0, i1, p_.width, s_.c_in, own_ + g_.x_copy);
      accumulate(x, i1 - i0, p_.width, s_.c_in, dz, dz_row, s_.rank_in, own_ + g_.sum_in,
                 std::exchange(added_.in, true), rows_a_, rows_b_);
    }
  }

  // One row of dZ: each residue class of columns modulo the stride meets its own taps.
  void transposed_row(int64_t n, int64_t i, float* to, int64_t dv_top) {
    Product m;
    m.read = ahead(p_.x, p_.x_strides, n, i + g_.band * p_.stride_h, 1, p_.height, p_.width, s_.c_in);
    m.write = ahead(q_.grad_x, q_.grad_x_strides, n, i, 1, p_.height, p_.width, s_.c_in);
    m.packed_taps = s_.kernel_h * s_.kernel_w;
    m.k = s_.rank_out;
    m.a_tap = kernel_a_;
    m.b_tap = kernel_b_;
    m.b = reinterpret_cast<const char*>(packed_ + g_.core_back);
    m.columns = s_.rank_in;
    m.a_row = s_.rank_out * 4;
    m.c_row = p_.stride_w * s_.rank_in * 4;
    const float* dv = own_ + g_.dv;
    for (int64_t start = 0; start < p_.stride_w && start < p_.width; ++start) {
      m.rows = (p_.width - start + p_.stride_w - 1) / p_.stride_w;
      m.taps = 0;
      for (int64_t ky = s_.kernel_h - 1; ky >= 0; --ky) {
        const int64_t row = i + p_.pad_top - ky * p_.dilation_h;
        if (row < 0 || row % p_.stride_h || row / p_.stride_h >= p_.out_height) continue;
        const int64_t base = (row / p_.stride_h - dv_top) * g_.dv_row;
        for (int64_t kx = s_.kernel_w - 1; kx >= 0; --kx) {
          const int64_t column = start + p_.pad_left - kx * p_.dilation_w;
          if (column % p_.stride_w) continue;
          const int64_t pixel = floor_div(column, p_.stride_w) + g_.dv_left;
          kernel_a_[m.taps] = (base + pixel * s_.rank_out) * 4;
          kernel_b_[m.taps] = ((s_.kernel_h - 1 - ky) * s_.kernel_w + s_.kernel_w - 1 - kx) * s_.rank_out;
          ++m.taps;
          if (g_.merged) break;  // the taps of this kernel row lie one after the other in dV and in the weight
        }
      }
      m.a = reinterpret_cast<const char*>(dv);
      m.c = reinterpret_cast<char*>(to + start * s_.rank_in);
      if (g_.merged) {
        m.k = s_.rank_out * s_.kernel_w;
        m.packed_taps = s_.kernel_h;
      }
      run(m);
      m.read = m.write = Prefetch{};
    }
  }

  // dx rows [i0, i1) from dZ.
  void leave(int64_t n, int64_t i0, int64_t i1, const float* dz) {
    const Strides4& st = q_.grad_x_strides;
    E* to = static_cast<E*>(q_.grad_x) + n * st.n + i0 * st.h;
    Product m;
    m.k = s_.rank_in;
    m.store = kBytes == 2 ? Store::kBfloat16 : Store::kFloat;
    m.c_column = kBytes;
    m.c = reinterpret_cast<char*>(to);
    if (st.c == 1) {
      m.rows = (i1 - i0) * p_.width;
      m.a = reinterpret_cast<const char*>(dz);
      m.a_row = s_.rank_in * 4;
      m.b = reinterpret_cast<const char*>(packed_ + g_.x_columns);
      m.columns = s_.c_in;
      m.c_row = st.w * kBytes;
      multiply<AOrder::kAlongK, false, FloatDot>(m);
      return;
    }
    float* flat = own_ + g_.flat;
    m.rows = s_.c_in;
    m.a = reinterpret_cast<const char*>(packed_ + g_.x_rows_form);
    m.a_row = s_.rank_in * 4;
    m.b = reinterpret_cast<const char*>(flat);
    m.b_packed = false;
    m.b_k = g_.flat_pitch * 4;
    m.columns = p_.width;
    m.c_row = st.c * kBytes;
    for (int64_t i = i0; i < i1; ++i) {
      transpose_words(dz + (i - i0) * p_.width * s_.rank_in, s_.rank_in, p_.width, s_.rank_in, flat, g_.flat_pitch);
      m.c = reinterpret_cast<char*>(to + (i - i0) * st.h);
      multiply<AOrder::kAlongK, false, FloatDot>(m);
    }
  }

  const BottleneckBackwardParams& q_;
  const BottleneckConvParams& p_;
  const BottleneckShape& s_;
  const BackwardGeometry& g_;
  const float *packed_, *factor_in_, *factor_out_, *core_;
  float* own_;
  struct {
    bool core = false, out = false, in = false;
  } added_;
  int64_t *kernel_a_, *kernel_b_, *rows_a_, *rows_b_;
};
