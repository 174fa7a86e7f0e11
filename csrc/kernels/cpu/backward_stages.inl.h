// The stages of the backward pass, each on rank-space rows [pixel][rank] that its caller keeps: Z and V are made again,
// the gradients descend (dV from dy, dZ from dV, dx from dZ), the weight gradients accumulate. All float32; bfloat16
// data is widened on the way in.

template <class T>
class BackwardStages {
 public:
  BackwardStages(const BottleneckBackwardParams& q, const BackwardGeometry& g, int64_t part)
      : q_(q),
        p_(q.forward),
        s_(q.forward.shape),
        g_(g),
        part_(part),
        shared_(static_cast<float*>(q.scratch)),
        own_(shared_ + g.shared_words + part * g.part_words) {
    const int64_t taps = s_.kernel_h * s_.kernel_w;
    kernel_a_ = reinterpret_cast<int64_t*>(own_ + g_.taps);
    kernel_b_ = kernel_a_ + taps;
    rows_a_ = kernel_b_ + taps;
    rows_b_ = rows_a_ + g_.row_slots;
    factor_in_ = weight(q.weights.factor_in, g_.wide_in);
    factor_out_ = weight(q.weights.factor_out, g_.wide_out);
    core_ = weight(q.weights.core, g_.wide_core);
  }

  // This part's share of the weights as floats.
  void widen_weights() {
    if constexpr (kBytes == 2) {
      widen(q_.weights.factor_in, g_.wide_in, s_.c_in * s_.mid());
      widen(q_.weights.core, g_.wide_core, s_.core_elements());
      widen(q_.weights.factor_out, g_.wide_out, s_.c_out * s_.out());
    }
  }

  // This part's share of the weights in the forms the products read; after all have widened theirs.
  void pack() { pack_backward(s_, g_, core_, factor_in_, q_.grad_x && q_.grad_x_strides.c == 1, part_, shared_); }

 protected:
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

  ImageRows x_images() const {
    const Strides4& st = p_.x_strides;
    return {static_cast<const char*>(p_.x), st.h * kBytes, st.w * kBytes, st.c * kBytes, st.n * kBytes, g_.x_rows};
  }

  ImageRows y_images() const {
    const Strides4& st = q_.grad_y_strides;
    return {static_cast<const char*>(q_.grad_y), st.h * kBytes, st.w * kBytes, st.c * kBytes, st.n * kBytes, g_.y_rows};
  }

  // The zero borders of a row of Z.
  void clear_sides_of_z(float* row) const {
    const int64_t left = p_.pad_left < g_.z_width ? p_.pad_left : g_.z_width;
    const int64_t right = (left + g_.z_used) * s_.mid();
    clear(row, left * s_.mid());
    clear(row + right, g_.z_row - right);
  }

  void clear_sides_of_dv(float* row) const {
    const int64_t right = (g_.dv_left + p_.out_width) * s_.out();
    clear(row, g_.dv_left * s_.out());
    clear(row + right, g_.dv_row - right);
  }

  // Rows of x into Z, of dy into dV, both from the pixel after the left border.
  void enter_z(const ImageRows& x, int64_t rows, float* z, int64_t part, int64_t parts) {
    enter(x, rows, p_.width, g_.z_used, s_.c_in, factor_in_, s_.mid(), z, g_.z_row, own_ + g_.flat, g_.flat_pitch,
          g_.x_block, part, parts);
  }

  void enter_dv(const ImageRows& y, int64_t rows, float* dv, int64_t part, int64_t parts) {
    enter(y, rows, p_.out_width, p_.out_width, s_.c_out, factor_out_, s_.out(), dv + g_.dv_left * s_.out(), g_.dv_row,
          own_ + g_.flat, g_.flat_pitch, g_.y_block, part, parts);
  }

  void run(const Product& m, int64_t part, int64_t parts) const {
    if (g_.streams && parts == 1) multiply<AOrder::kAlongK, false, FloatDot, true>(m);
    else multiply<AOrder::kAlongK, false, FloatDot>(m, part, parts);
  }

  // A product for every ring index, `a_ring` and `c_ring` words apart. Where pixels are neighbours on both sides, the
  // ring indices of a pixel are further rows of the tiles.
  void run_ring(Product& m, const float* a, int64_t a_ring, float* c, int64_t c_ring, bool neighbours, int64_t part,
                int64_t parts) const {
    if (neighbours && s_.ring > 1) {
      m.rows *= s_.ring;
      m.a_row = a_ring * 4;
      m.c_row = c_ring * 4;
    }
    for (int64_t q = 0; q < (neighbours ? 1 : s_.ring); ++q) {
      m.a = reinterpret_cast<const char*>(a + q * a_ring);
      m.c = reinterpret_cast<char*>(c + q * c_ring);
      run(m, part, parts);
      m.read = m.write = Prefetch{};
    }
  }

  // With the taps that the tables hold.
  Depthwise depthwise(int64_t taps) const {
    Depthwise d;
    d.weights = shared_ + g_.core;
    d.words = s_.rank_in;
    d.taps = taps;
    d.z_tap = kernel_a_;
    d.w_tap = kernel_b_;
    return d;
  }

  // This part's share of `rows` rows.
  static void run_depthwise(Depthwise& d, const float* z, int64_t z_row, float* to, int64_t to_row, int64_t rows,
                            int64_t part, int64_t parts) {
    for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r) {
      d.z = z + r * z_row;
      d.to = to + r * to_row;
      depthwise_pixels<Float32>(d);
    }
  }

  // `rows` rows of V from Z, whose first row is the first tap of the first of them.
  void make_v(const float* z, int64_t rows, float* v, const Prefetch& next, int64_t part, int64_t parts) {
    const bool merged = g_.merged_z && !s_.depthwise;
    const int64_t across = merged ? 1 : s_.kernel_w;
    Product m;
    m.k = s_.rank_in * (merged ? s_.kernel_w : 1);
    m.taps = s_.kernel_h * across;
    for (int64_t y = 0; y < s_.kernel_h; ++y) {
      for (int64_t x = 0; x < across; ++x) {
        kernel_a_[y * across + x] = (y * p_.dilation_h * g_.z_row + x * p_.dilation_w * s_.mid()) * 4;
        kernel_b_[y * across + x] = (y * across + x) * (s_.depthwise ? 1 : m.k);
      }
    }
    if (s_.depthwise) {
      fetch(next, 0);
      Depthwise d = depthwise(m.taps);
      d.pixels = p_.out_width;
      d.z_pitch = p_.stride_w * s_.rank_in;
      d.to_pitch = s_.rank_in;
      run_depthwise(d, z, p_.stride_h * g_.z_row, v, p_.out_width * s_.rank_in, rows, part, parts);
      return;
    }
    m.a_tap = kernel_a_;
    m.b_tap = kernel_b_;
    m.segments = rows;
    m.a_row = p_.stride_w * s_.mid() * 4;
    m.rows = p_.out_width;
    m.a_segment = p_.stride_h * g_.z_row * 4;
    m.b = reinterpret_cast<const char*>(shared_ + g_.core);
    m.columns = s_.rank_out;
    m.c_row = s_.out() * 4;
    m.c_segment = p_.out_width * s_.out() * 4;
    m.read = next;
    run_ring(m, z, s_.rank_in, v, s_.rank_out, p_.stride_w == 1, part, parts);
  }

  // sum[tap][a][b] = (sum if `add`) + Z^T dV. Undilated taps of a kernel row are neighbours in Z and make one taller
  // product. Rows of Z and dV as in make_v and enter_dv.
  void accumulate_core(const float* z, const float* dv, int64_t images, int64_t rows, float* sum, bool add,
                       int64_t part, int64_t parts) {
    if (s_.depthwise) {
      accumulate_depthwise(z, dv, images, rows, sum, add, part, parts);
      return;
    }
    const int64_t across = g_.merged_z ? 1 : s_.kernel_w;
    const int64_t taps = across == 1 ? s_.kernel_w : 1;
    // Neighbouring pixels: the ring indices are further steps, else further taps.
    const bool neighbours = p_.stride_w == 1;
    const int64_t ring = neighbours ? 1 : s_.ring;
    Product m;
    m.rows = taps * s_.rank_in;
    m.k = p_.out_width * (s_.ring / ring);
    m.taps = images * rows * ring;
    m.a_tap = rows_a_;
    m.b_tap = rows_b_;
    for (int64_t n = 0; n < images; ++n) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t q = 0; q < ring; ++q) {
          const int64_t tap = (n * rows + r) * ring + q;
          rows_a_[tap] = (n * g_.z_image() + r * p_.stride_h * g_.z_row + q * s_.rank_in) * 4;
          rows_b_[tap] = (n * g_.dv_image() + r * g_.dv_row + q * s_.rank_out) * 4;
        }
      }
    }
    m.a_k = neighbours ? s_.rank_in * 4 : p_.stride_w * s_.mid() * 4;
    m.b = reinterpret_cast<const char*>(dv + g_.dv_left * s_.out());
    m.b_packed = false;
    m.b_k = neighbours ? s_.rank_out * 4 : s_.out() * 4;
    m.columns = s_.rank_out;
    m.c_row = s_.rank_out * 4;
    m.init_mode = add ? Init::kAccumulate : Init::kZero;
    for (int64_t y = 0; y < s_.kernel_h; ++y) {
      for (int64_t x = 0; x < across; ++x) {
        m.a = reinterpret_cast<const char*>(z + y * p_.dilation_h * g_.z_row + x * p_.dilation_w * s_.mid());
        m.c = reinterpret_cast<char*>(sum + (y * s_.kernel_w + x) * s_.rank_in * s_.rank_out);
        multiply<AOrder::kAlongM, false, FloatDot>(m, part, parts);
      }
    }
  }

  void accumulate_depthwise(const float* z, const float* dv, int64_t images, int64_t rows, float* sum, bool add,
                            int64_t part, int64_t parts) {
    DepthwiseGradient d;
    d.z = z;
    d.z_image = g_.z_image();
    d.z_row = p_.stride_h * g_.z_row;
    d.z_pixel = p_.stride_w * s_.rank_in;
    d.dv = dv + g_.dv_left * s_.rank_out;
    d.dv_image = g_.dv_image();
    d.dv_row = g_.dv_row;
    d.dv_pixel = s_.rank_out;
    d.images = images;
    d.rows = rows;
    d.pixels = p_.out_width;
    d.rank = s_.rank_in;
    d.taps = s_.taps();
    d.z_tap = kernel_a_;
    d.sum = sum;
    d.add = add;
    for (int64_t t = 0; t < d.taps; ++t)
      kernel_a_[t] = (t / s_.kernel_w * p_.dilation_h * g_.z_row + t % s_.kernel_w * p_.dilation_w * s_.rank_in) * 4;
    depthwise_gradient(d, part, parts);
  }

  // `count` rows of dZ, every stride-th from input row i, from a window of dV whose first row is output row `dv_top`.
  // Each residue class of columns modulo the stride meets its own taps. A single row leaves out the taps that meet no
  // output row; several rows need zero rows there.
  void make_dz(const float* dv, int64_t dv_top, int64_t i, int64_t count, float* to, const Prefetch& next,
               const Prefetch& target, int64_t part, int64_t parts) {
    Product m;
    m.read = next;
    m.write = target;
    m.packed_taps = s_.kernel_h * s_.kernel_w;
    m.k = s_.rank_out;
    m.a_tap = kernel_a_;
    m.b_tap = kernel_b_;
    m.b = reinterpret_cast<const char*>(shared_ + g_.core_back);
    m.columns = s_.rank_in;
    m.a_row = s_.out() * 4;
    m.a_segment = g_.dv_row * 4;
    m.c_row = p_.stride_w * s_.mid() * 4;
    m.c_segment = p_.stride_h * p_.width * s_.mid() * 4;
    m.segments = count;
    for (int64_t start = 0; start < p_.stride_w && start < p_.width; ++start) {
      m.rows = (p_.width - start + p_.stride_w - 1) / p_.stride_w;
      m.taps = 0;
      for (int64_t ky = s_.kernel_h - 1; ky >= 0; --ky) {
        const int64_t scaled = i + p_.pad_top - ky * p_.dilation_h, row = floor_div(scaled, p_.stride_h);
        if (scaled != row * p_.stride_h) continue;
        if (count == 1 && (row < 0 || row >= p_.out_height)) continue;
        const int64_t base = (row - dv_top) * g_.dv_row;
        for (int64_t kx = s_.kernel_w - 1; kx >= 0; --kx) {
          const int64_t column = start + p_.pad_left - kx * p_.dilation_w;
          if (column % p_.stride_w) continue;
          const int64_t pixel = floor_div(column, p_.stride_w) + g_.dv_left;
          kernel_a_[m.taps] = (base + pixel * s_.out()) * 4;
          const int64_t reverse = (s_.kernel_h - 1 - ky) * s_.kernel_w + s_.kernel_w - 1 - kx;
          kernel_b_[m.taps] = s_.depthwise ? ky * s_.kernel_w + kx : reverse * s_.rank_out;
          ++m.taps;
          if (g_.merged && !s_.depthwise)
            break;  // the taps of this kernel row lie one after the other in dV and in the weight
        }
      }
      if (s_.depthwise) {
        fetch(m.read, 0);
        fetch(m.write, 0);
        m.read = m.write = Prefetch{};
        Depthwise d = depthwise(m.taps);
        d.pixels = m.rows;
        d.z_pitch = s_.rank_in;
        d.to_pitch = p_.stride_w * s_.rank_in;
        run_depthwise(d, dv, g_.dv_row, to + start * s_.rank_in, m.c_segment / 4, count, part, parts);
        continue;
      }
      if (g_.merged) {
        m.k = s_.rank_out * s_.kernel_w;
        m.packed_taps = s_.kernel_h;
      }
      run_ring(m, dv, s_.rank_out, to + start * s_.mid(), s_.rank_in, p_.stride_w == 1, part, parts);
    }
  }

  // Input rows [i0, i1) of dx from dZ.
  void leave(int64_t n, int64_t i0, int64_t i1, const float* dz, int64_t part, int64_t parts) {
    const Strides4& st = q_.grad_x_strides;
    E* to = static_cast<E*>(q_.grad_x) + n * st.n + i0 * st.h;
    Product m;
    m.k = s_.mid();
    m.a_row = s_.mid() * 4;
    m.store = kBytes == 2 ? Store::kBfloat16 : Store::kFloat;
    m.c_column = kBytes;
    m.c = reinterpret_cast<char*>(to);
    if (st.c == 1) {
      m.rows = (i1 - i0) * p_.width;
      m.a = reinterpret_cast<const char*>(dz);
      m.b = reinterpret_cast<const char*>(shared_ + g_.x_columns);
      m.columns = s_.c_in;
      m.c_row = st.w * kBytes;
      multiply<AOrder::kAlongK, false, FloatDot>(m, part, parts);
      return;
    }
    float* flat = own_ + g_.flat;
    m.rows = s_.c_in;
    m.a = reinterpret_cast<const char*>(factor_in_);
    m.b = reinterpret_cast<const char*>(flat);
    m.b_packed = false;
    m.b_k = g_.flat_pitch * 4;
    m.c_row = st.c * kBytes;
    for (int64_t i = i0; i < i1; i += g_.x_block) {
      m.columns = (i + g_.x_block < i1 ? g_.x_block : i1 - i) * p_.width;
      transpose_words(dz + (i - i0) * p_.width * s_.mid(), s_.mid(), m.columns, s_.mid(), flat, g_.flat_pitch);
      m.c = reinterpret_cast<char*>(to + (i - i0) * st.h);
      multiply<AOrder::kAlongK, false, FloatDot>(m, part, parts);
    }
  }

  int64_t share(int64_t n, int64_t next) const { return n * (part_ + next) / g_.threads; }

  // The first part's own memory, where all parts' sums are added up.
  float* first_sums() const { return shared_ + g_.shared_words; }

  // Adds the other parts' sums to the first's.
  void add_parts(int64_t offset, int64_t n) const {
    float* sum = first_sums() + offset;
    for (int64_t i = 1; i < g_.threads; ++i) {
      const float* other = sum + i * g_.part_words;
      for (int64_t j = 0; j < n; ++j) sum[j] += other[j];
    }
  }

  // Adds up and writes this part's share of sums that lie in torch's order.
  void write_share(int64_t offset, int64_t n, void* to) const {
    add_parts(offset + share(n, 0), share(n, 1) - share(n, 0));
    write_sums(first_sums() + offset, n, to);
  }

  // Writes this part's share of sums that lie in torch's order.
  void write_sums(const float* sum, int64_t n, void* to) const {
    for (int64_t i = share(n, 0); to && i < share(n, 1); ++i) static_cast<E*>(to)[i] = from_float(sum[i]);
  }

  // to[j * to_row + i] = from[i * from_row + j]
  static void write_transposed(const float* from, int64_t from_row, int64_t rows, int64_t columns, E* to,
                               int64_t to_row) {
    if constexpr (kBytes == 4) {
      transpose_words(from, from_row, rows, columns, to, to_row);
    } else {
      for (int64_t j = 0; j < columns; ++j) {
        for (int64_t i = 0; i < rows; ++i) to[j * to_row + i] = from_float(from[i * from_row + j]);
      }
    }
  }

  // Input ranks [first, last) of the core's sums, [tap][a][b] or depthwise [tap][rank], in torch's order, tap last.
  void write_core(const float* sums, int64_t first, int64_t last) const {
    const int64_t taps = s_.kernel_h * s_.kernel_w;
    E* to = static_cast<E*>(q_.grad_core);
    if (s_.depthwise) {
      write_transposed(sums + first, s_.rank_in, taps, last - first, to + first * taps, taps);
      return;
    }
    for (int64_t a = first; a < last; ++a)
      write_transposed(sums + a * s_.rank_out, s_.rank_in * s_.rank_out, taps, s_.rank_out, to + a * taps,
                       s_.rank_in * taps);
  }

  const BottleneckBackwardParams& q_;
  const BottleneckConvParams& p_;
  const BottleneckShape& s_;
  const BackwardGeometry& g_;
  const int64_t part_;
  float *shared_, *own_;
  const float *factor_in_, *factor_out_, *core_;
  int64_t *kernel_a_, *kernel_b_, *rows_a_, *rows_b_;

 private:
  // A weight as floats: in place, or where widen_weights() puts it.
  const float* weight(const void* from, int64_t copy) const {
    return kBytes == 4 ? static_cast<const float*>(from) : shared_ + copy;
  }

  void widen(const void* from, int64_t copy, int64_t n) {
    const int64_t first = share(n, 0), last = share(n, 1);
    widen_run<E>(static_cast<const char*>(from) + first * kBytes, 1, 0, last - first, 1, shared_ + copy + first);
  }
};
