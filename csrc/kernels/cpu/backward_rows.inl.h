// The stages of a band where V, dV and dZ lie as [rank][pixel], pixels along the vectors, and no rank is padded to one.
// For ranks that fill vectors badly, and stride 1 along rows. Z is kept in both forms: V is made from [rank][pixel],
// the core's gradient reads [pixel][rank].
//
// The core's sums are [ky][b][kx][a] (undilated columns) or [ky][kx][b][a]. The factors' sums are [rank][channel] where
// channels lie together in the image, else in torch's order.

template <class T>
class RowBands : public BackwardStages<T> {
 public:
  RowBands(const BottleneckBackwardParams& q, const BackwardGeometry& g, int64_t part) : Stages(q, g, part) {
    for (int64_t t = 0; t < s_.kernel_h * s_.kernel_w; ++t) {
      kernel_a_[t] = t * s_.rank_in * 4;
      kernel_b_[t] = (t / s_.kernel_w * p_.dilation_h * g_.zr_row + t % s_.kernel_w * p_.dilation_w) * 4;
    }
    dz_a_ = kernel_a_ + 2 * s_.kernel_h * s_.kernel_w;
    dz_b_ = dz_a_ + s_.kernel_h * s_.kernel_w;
    rows_a_ = dz_b_ + s_.kernel_h * s_.kernel_w;
    rows_b_ = rows_a_ + g_.row_slots;
  }

  void pack() {
    const int64_t taps = s_.kernel_h * s_.kernel_w, a = s_.rank_in, b = s_.rank_out;
    Stages::pack();
    // [b][tap][a] and [a][tap][b]; every part some rows.
    const int64_t b0 = this->share(b, 0), b1 = this->share(b, 1), a0 = this->share(a, 0), a1 = this->share(a, 1);
    if (g_.need_v)
      pack_rows<Float32>(core_ + b0 * a * taps, b1 - b0, a * taps, taps, 1, a, taps, shared_ + g_.core + b0 * taps * a);
    if (g_.need_dz)
      pack_rows<Float32>(core_ + a0 * taps, a1 - a0, taps, taps, 1, b, a * taps,
                         shared_ + g_.core_back + a0 * taps * b);
  }

 protected:
  using Stages = BackwardStages<T>;
  using Stages::core_;
  using Stages::g_;
  using Stages::kBytes;
  using Stages::kernel_a_;
  using Stages::kernel_b_;
  using Stages::own_;
  using Stages::p_;
  using Stages::q_;
  using Stages::rows_a_;
  using Stages::rows_b_;
  using Stages::s_;
  using Stages::shared_;
  using typename Stages::E;

  float* z(int64_t row) const { return own_ + g_.z + row * g_.z_row; }
  float* zr(int64_t row) const { return own_ + g_.zr + row * g_.zr_row; }
  float* dv(int64_t row) const { return own_ + g_.dv + row * g_.dv_row; }

  void move_z(int64_t from, int64_t to) {
    __builtin_memmove(z(0), z(from), static_cast<size_t>((to - from) * g_.z_row) * 4);
    __builtin_memmove(zr(0), zr(from), static_cast<size_t>((to - from) * g_.zr_row) * 4);
  }

  void clear_z(int64_t row) {
    clear(z(row), g_.z_row);
    clear(zr(row), g_.zr_row);
  }

  // `rank` lines of `pitch` words of which only [first, last) will be written: the rest is zero.
  static void clear_sides(float* row, int64_t rank, int64_t pitch, int64_t first, int64_t last, int64_t width) {
    for (int64_t r = 0; r < rank; ++r, row += pitch) {
      for (int64_t i = 0; i < first && i < width; ++i) row[i] = 0.0f;
      for (int64_t i = last; i < width; ++i) row[i] = 0.0f;
    }
  }

  void fill_z(const ImageRows& x, int64_t rows, int64_t row) {
    for (int64_t r = row; r < row + rows; ++r) {
      this->clear_sides_of_z(z(r));
      clear_sides(zr(r), s_.mid(), g_.z_pitch, p_.pad_left, p_.pad_left + g_.z_used, g_.z_width);
    }
    if (g_.z_used <= 0) return;
    const int64_t left = p_.pad_left * s_.mid();
    if (!x.rows_form) {
      this->enter_z(x, rows, z(row) + left, 0, 1);
      for (int64_t r = row; r < row + rows; ++r)
        transpose_words(z(r) + left, s_.mid(), g_.z_used, s_.mid(), zr(r) + p_.pad_left, g_.z_pitch);
      return;
    }
    enter_rows(x, rows, p_.width, g_.z_used, s_.c_in, this->factor_in_, s_.mid(), zr(row) + p_.pad_left, g_.zr_row,
               g_.z_pitch, g_.x_block);
    for (int64_t r = row; r < row + rows; ++r)
      transpose_words(zr(r) + p_.pad_left, g_.z_pitch, s_.mid(), g_.z_used, z(r) + left, s_.mid());
  }

  void fill_dv(const ImageRows& y, int64_t rows, int64_t row) {
    const int64_t width = p_.out_width, rank = s_.out();
    for (int64_t r = row; r < row + rows; ++r)
      clear_sides(dv(r), rank, g_.dv_pitch, g_.dv_left, g_.dv_left + width, g_.dv_width);
    float* to = dv(row) + g_.dv_left;
    if (y.rows_form) {
      enter_rows(y, rows, width, width, s_.c_out, this->factor_out_, rank, to, g_.dv_row, g_.dv_pitch, g_.y_block);
      return;
    }
    float* columns = own_ + g_.dz;
    enter(y, rows, width, width, s_.c_out, this->factor_out_, rank, columns, width * rank, nullptr, 0, 1);
    for (int64_t r = 0; r < rows; ++r)
      transpose_words(columns + r * width * rank, rank, width, rank, to + r * g_.dv_row, g_.dv_pitch);
  }

  void band_v(int64_t rows, const Prefetch& next) {
    Product m;
    m.rows = s_.rank_out;
    m.k = s_.rank_in;
    m.taps = s_.kernel_h * s_.kernel_w;
    m.a_tap = kernel_a_;
    m.b_tap = kernel_b_;
    m.a = reinterpret_cast<const char*>(shared_ + g_.core);
    m.a_row = m.taps * s_.rank_in * 4;
    m.b_packed = false;
    m.b_k = g_.z_pitch * 4;
    m.columns = p_.out_width;
    m.c_row = g_.v_pitch * 4;
    m.read = next;
    m.read.count = (next.count + rows * s_.ring - 1) / (rows * s_.ring);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t q = 0; q < s_.ring; ++q) {
        m.b = reinterpret_cast<const char*>(zr(r * p_.stride_h) + q * s_.rank_in * g_.z_pitch);
        m.c = reinterpret_cast<char*>(own_ + g_.v + r * p_.out_width + q * s_.rank_out * g_.v_pitch);
        this->run(m, 0, 1);
        m.read.at += m.read.count * m.read.pitch;
      }
    }
  }

  // Input row i of dZ into the band's from its row `row`.
  void band_dz(int64_t i, int64_t row, int64_t dv_top, const Prefetch& next, const Prefetch& target) {
    Product m;
    m.rows = s_.rank_in;
    m.k = s_.rank_out;
    m.a_tap = dz_a_;
    m.b_tap = dz_b_;
    m.taps = 0;
    for (int64_t ky = 0; ky < s_.kernel_h; ++ky) {
      const int64_t scaled = i + p_.pad_top - ky * p_.dilation_h, v_row = floor_div(scaled, p_.stride_h);
      if (scaled != v_row * p_.stride_h || v_row < 0 || v_row >= p_.out_height) continue;
      for (int64_t kx = 0; kx < s_.kernel_w; ++kx, ++m.taps) {
        dz_a_[m.taps] = (ky * s_.kernel_w + kx) * s_.rank_out * 4;
        dz_b_[m.taps] = ((v_row - dv_top) * g_.dv_row + p_.pad_left - kx * p_.dilation_w + g_.dv_left) * 4;
      }
    }
    m.a = reinterpret_cast<const char*>(shared_ + g_.core_back);
    m.a_row = s_.kernel_h * s_.kernel_w * s_.rank_out * 4;
    m.b_packed = false;
    m.b_k = g_.dv_pitch * 4;
    m.columns = p_.width;
    m.c_row = g_.dz_pitch * 4;
    m.read = next;
    m.write = target;
    for (int64_t q = 0; q < s_.ring; ++q) {
      m.b = reinterpret_cast<const char*>(dv(0) + q * s_.rank_out * g_.dv_pitch);
      m.c = reinterpret_cast<char*>(own_ + g_.dz + row * p_.width + q * s_.rank_in * g_.dz_pitch);
      this->run(m, 0, 1);
      m.read = m.write = Prefetch{};
    }
  }

  void add_core(int64_t dv_row, int64_t rows, bool add) {
    const int64_t across = g_.merged ? s_.kernel_w : 1;
    Product m;
    m.rows = s_.rank_out;
    m.k = p_.out_width;
    m.taps = rows * s_.ring;
    m.a_tap = rows_a_;
    m.b_tap = rows_b_;
    for (int64_t r = 0; r < m.taps; ++r) {
      const int64_t row = r / s_.ring, q = r % s_.ring;
      rows_a_[r] = (row * g_.dv_row + q * s_.rank_out * g_.dv_pitch) * 4;
      rows_b_[r] = (row * p_.stride_h * g_.z_row + q * s_.rank_in) * 4;
    }
    m.a = reinterpret_cast<const char*>(dv(dv_row) + g_.dv_left);
    m.a_row = g_.dv_pitch * 4;
    m.b_packed = false;
    m.b_k = s_.mid() * 4;
    m.columns = across * s_.rank_in;
    m.c_row = m.columns * 4;
    m.init_mode = add ? Init::kAccumulate : Init::kZero;
    for (int64_t t = 0; t < s_.kernel_h * s_.kernel_w; t += across) {
      const int64_t ky = t / s_.kernel_w, kx = t % s_.kernel_w;
      m.b = reinterpret_cast<const char*>(z(ky * p_.dilation_h) + kx * p_.dilation_w * s_.mid());
      m.c = reinterpret_cast<char*>(own_ + g_.sum_core + t * s_.rank_out * s_.rank_in);
      multiply<AOrder::kAlongK, false, FloatDot>(m);
    }
  }

  void add_out(const ImageRows& y, int64_t rows, bool add) {
    add_factor(y, rows, p_.out_width, s_.c_out, own_ + g_.v, g_.v_pitch, s_.out(), own_ + g_.dz, own_ + g_.sum_out,
               add);
  }

  void add_in(const ImageRows& x, int64_t rows, bool add) {
    add_factor(x, rows, p_.width, s_.c_in, own_ + g_.dz, g_.dz_pitch, s_.mid(), own_ + g_.columns, own_ + g_.sum_in,
               add);
  }

  void band_leave(int64_t n, int64_t i0, int64_t i1) {
    const Strides4& st = q_.grad_x_strides;
    const float* dz = own_ + g_.dz;
    Product m;
    m.k = s_.mid();
    m.store = kBytes == 2 ? Store::kBfloat16 : Store::kFloat;
    m.c_column = kBytes;
    m.c = reinterpret_cast<char*>(static_cast<E*>(q_.grad_x) + n * st.n + i0 * st.h);
    if (st.c == 1) {
      m.rows = (i1 - i0) * p_.width;
      m.a = reinterpret_cast<const char*>(dz);
      m.a_k = g_.dz_pitch * 4;
      m.b = reinterpret_cast<const char*>(shared_ + g_.x_columns);
      m.columns = s_.c_in;
      m.c_row = st.w * kBytes;
      multiply<AOrder::kAlongM, false, FloatDot>(m);
      return;
    }
    m.rows = s_.c_in;
    m.a = reinterpret_cast<const char*>(this->factor_in_);
    m.a_row = s_.mid() * 4;
    m.b = reinterpret_cast<const char*>(dz);
    m.b_packed = false;
    m.b_k = g_.dz_pitch * 4;
    m.columns = (i1 - i0) * p_.width;
    m.c_row = st.c * kBytes;
    multiply<AOrder::kAlongK, false, FloatDot>(m);
  }

  void write_out() { write_factor(g_.y_rows, g_.sum_out, s_.c_out, s_.out(), q_.grad_factor_out); }
  void write_in() { write_factor(g_.x_rows, g_.sum_in, s_.c_in, s_.mid(), q_.grad_factor_in); }

  void write_core_share() {
    const int64_t taps = s_.kernel_h * s_.kernel_w, a = s_.rank_in;
    const int64_t across = g_.merged ? s_.kernel_w : 1, first = this->share(s_.rank_out, 0);
    const int64_t last = this->share(s_.rank_out, 1), run = across * a;
    for (int64_t t = 0; t < taps; t += across) {
      const int64_t offset = g_.sum_core + t * s_.rank_out * a + first * run;
      this->add_parts(offset, (last - first) * run);
      for (int64_t b = first; b < last; ++b)
        this->write_transposed(this->first_sums() + offset + (b - first) * run, a, across, a,
                               static_cast<E*>(q_.grad_core) + b * a * taps + t, taps);
    }
  }

 private:
  // As enter, into lines [rank][pixel] of `pitch` words, for images whose pixels lie together.
  void enter_rows(const ImageRows& x, int64_t rows, int64_t width, int64_t used, int64_t channels, const float* factor,
                  int64_t rank, float* to, int64_t to_row, int64_t pitch, int64_t block) {
    if (!x.plane(width)) block = 1;
    float* flat = own_ + g_.flat;
    Product m;
    m.k = channels;
    m.b_packed = false;
    m.rows = rank;
    m.a = reinterpret_cast<const char*>(factor);
    m.a_k = rank * 4;
    m.b_k = x.channel;
    for (int64_t r = 0; r < rows; r += block) {
      const int64_t count = r + block < rows ? block : rows - r;
      m.b = x.data + r * x.row;
      m.columns = count == 1 ? used : count * width;
      m.c = reinterpret_cast<char*>(count == 1 ? to + r * to_row : flat);
      m.c_row = (count == 1 ? pitch : g_.flat_pitch) * 4;
      multiply<AOrder::kAlongM, true, FloatDot>(m);
      for (int64_t i = 0; i < count && count > 1; ++i) {
        for (int64_t q = 0; q < rank; ++q)
          copy_words(flat + q * g_.flat_pitch + i * width, used, to + (r + i) * to_row + q * pitch);
      }
    }
  }

  // A factor's sums from an image and rank-space lines [rank][pixel]; `columns` has room for the lines as
  // [pixel][rank].
  void add_factor(const ImageRows& x, int64_t rows, int64_t width, int64_t channels, const float* lines, int64_t pitch,
                  int64_t rank, float* columns, float* sum, bool add) {
    if (x.rows_form) {
      transpose_words(lines, pitch, rank, rows * width, columns, rank);
      accumulate(x, 1, rows, width, channels, columns, width * rank, 0, rank, sum, add, rows_a_, rows_b_);
      return;
    }
    const bool plane = x.plane(width);
    Product m;
    m.rows = rank;
    m.k = plane ? rows * width : width;
    m.taps = plane ? 1 : rows;
    m.a_tap = rows_a_;
    m.b_tap = rows_b_;
    for (int64_t r = 0; r < m.taps; ++r) {
      rows_a_[r] = r * width * 4;
      rows_b_[r] = r * x.row;
    }
    m.a = reinterpret_cast<const char*>(lines);
    m.a_row = pitch * 4;
    m.b = x.data;
    m.b_packed = false;
    m.b_k = x.pixel;
    m.columns = channels;
    m.c = reinterpret_cast<char*>(sum);
    m.c_row = channels * 4;
    m.init_mode = add ? Init::kAccumulate : Init::kZero;
    multiply<AOrder::kAlongK, true, FloatDot>(m);
  }

  void write_factor(bool in_order, int64_t offset, int64_t channels, int64_t rank, void* to) {
    if (in_order) {
      this->write_share(offset, channels * rank, to);
      return;
    }
    const int64_t first = this->share(channels, 0), last = this->share(channels, 1);
    for (int64_t r = 0; r < rank; ++r) this->add_parts(offset + r * channels + first, last - first);
    this->write_transposed(this->first_sums() + offset + first, channels, rank, last - first,
                           static_cast<E*>(to) + first * rank, rank);
  }

  int64_t *dz_a_, *dz_b_;
};
