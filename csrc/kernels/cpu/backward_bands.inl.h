// Backward pass of the bottleneck convolution, in bands: every part has a run of output rows.
//
// The run is taken in bands small enough for the cache. For each band the rank-space activations are made again, the
// gradients descend, and the weight gradients accumulate into the part's own sums, which a second phase adds up in a
// fixed order. Rows of Z and dV that the next band needs are kept, none is made twice within a part.

// The stages of a band on rank-space rows [pixel][rank]: windows of Z and dV, and the band's V and dZ, in the part's
// own memory. Rows are counted from the windows' first.
template <class T>
class ColumnBands : public BackwardStages<T> {
 protected:
  using Stages = BackwardStages<T>;
  using Stages::g_;
  using Stages::own_;
  using Stages::p_;
  using Stages::q_;
  using Stages::rows_a_;
  using Stages::rows_b_;
  using Stages::s_;
  using Stages::Stages;

  float* z(int64_t row) const { return own_ + g_.z + row * g_.z_row; }
  float* dv(int64_t row) const { return own_ + g_.dv + row * g_.dv_row; }

  // Moves rows [from, to) of the window of Z to its front.
  void move_z(int64_t from, int64_t to) {
    __builtin_memmove(z(0), z(from), static_cast<size_t>((to - from) * g_.z_row) * 4);
  }

  void clear_z(int64_t row) { clear(z(row), g_.z_row); }

  void fill_z(const ImageRows& x, int64_t rows, int64_t row) {
    for (int64_t r = row; r < row + rows; ++r) this->clear_sides_of_z(z(r));
    if (g_.z_used > 0) this->enter_z(x, rows, z(row) + p_.pad_left * s_.mid(), 0, 1);
  }

  void fill_dv(const ImageRows& y, int64_t rows, int64_t row) {
    for (int64_t r = row; r < row + rows; ++r) this->clear_sides_of_dv(dv(r));
    this->enter_dv(y, rows, dv(row), 0, 1);
  }

  void band_v(int64_t rows, const Prefetch& next) { this->make_v(z(0), rows, own_ + g_.v, next, 0, 1); }

  void add_out(const ImageRows& y, int64_t rows, bool add) {
    accumulate(y, 1, rows, p_.out_width, s_.c_out, own_ + g_.v, p_.out_width * s_.out(), 0, s_.out(), own_ + g_.sum_out,
               add, rows_a_, rows_b_);
  }

  void add_core(int64_t dv_row, int64_t rows, bool add) {
    this->accumulate_core(z(0), dv(dv_row), 1, rows, own_ + g_.sum_core, add, 0, 1);
  }

  // Input row i of dZ into row `row` of the band's.
  void band_dz(int64_t i, int64_t row, int64_t dv_top, const Prefetch& next, const Prefetch& target) {
    this->make_dz(dv(0), dv_top, i, 1, own_ + g_.dz + row * p_.width * s_.mid(), next, target, 0, 1);
  }

  void band_leave(int64_t n, int64_t i0, int64_t i1) { this->leave(n, i0, i1, own_ + g_.dz, 0, 1); }

  void add_in(const ImageRows& x, int64_t rows, bool add) {
    accumulate(x, 1, rows, p_.width, s_.c_in, own_ + g_.dz, p_.width * s_.mid(), 0, s_.mid(), own_ + g_.sum_in, add,
               rows_a_, rows_b_);
  }

  void write_out() { this->write_share(g_.sum_out, s_.c_out * s_.out(), q_.grad_factor_out); }
  void write_in() { this->write_share(g_.sum_in, s_.c_in * s_.mid(), q_.grad_factor_in); }

  void write_core_share() {
    const int64_t first = this->share(s_.rank_in, 0), last = this->share(s_.rank_in, 1);
    const int64_t inner = s_.depthwise ? 1 : s_.rank_out;
    for (int64_t t = 0; t < s_.kernel_h * s_.kernel_w; ++t)
      this->add_parts(g_.sum_core + (t * s_.rank_in + first) * inner, (last - first) * inner);
    this->write_core(this->first_sums() + g_.sum_core, first, last);
  }
};

// Stages: ColumnBands or RowBands.
template <class Stages>
class BackwardBands : public Stages {
 public:
  using Stages::Stages;

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
    if (q_.grad_core && !added_.core) clear(own_ + g_.sum_core, s_.core_elements());
    if (q_.grad_factor_out && !added_.out) clear(own_ + g_.sum_out, s_.c_out * s_.out());
    if (q_.grad_factor_in && !added_.in) clear(own_ + g_.sum_in, s_.c_in * s_.mid());
  }

  // Adds up the parts' sums, in their order, and writes an even share of the weight gradients.
  void reduce() {
    if (q_.grad_factor_out) this->write_out();
    if (q_.grad_factor_in) this->write_in();
    if (q_.grad_bias) this->write_share(g_.sum_bias, s_.c_out, q_.grad_bias);
    if (q_.grad_core) this->write_core_share();
  }

 private:
  using Stages::g_;
  using Stages::own_;
  using Stages::p_;
  using Stages::q_;
  using Stages::s_;
  using typename Stages::E;

  // The input row at which output row `row`'s share of the image begins.
  int64_t input_row(int64_t row) const {
    if (row <= 0) return 0;
    if (row >= p_.out_height) return p_.height;
    const int64_t i = row * p_.stride_h - p_.pad_top;
    return i < 0 ? 0 : i > p_.height ? p_.height : i;
  }

  void run_image_rows(int64_t n, int64_t first, int64_t last) {
    const ImageRows x_all = this->x_images().at_image(n), y_all = this->y_images().at_image(n);
    int64_t z_top = 0, z_filled = 0, dv_top = 0, dv_filled = 0;
    bool started = false;
    for (int64_t b0 = first; b0 < last; b0 += g_.band) {
      const int64_t b1 = b0 + g_.band < last ? b0 + g_.band : last;
      const int64_t i0 = input_row(b0), i1 = input_row(b1);
      // Rows of dV for this band's weight gradients and for the input rows it finishes.
      // Its first row only ever moves down: rows once left behind are not made again.
      const int64_t reach = g_.need_dz ? g_.reach(p_.stride_h) : 0;
      const int64_t dv_first = b0 > reach ? b0 - reach : 0;
      if (!started || dv_filled <= dv_first) dv_filled = dv_first;
      else if (dv_first > dv_top)
        __builtin_memmove(this->dv(0), this->dv(dv_first - dv_top),
                          static_cast<size_t>((dv_filled - dv_first) * g_.dv_row) * 4);
      dv_top = dv_first;
      const int64_t y_first = g_.need_dv && dv_filled < b0 ? dv_filled : b0;
      const ImageRows y_new = readable<E>(y_all, g_.gather_y, y_first, b1, p_.out_width, s_.c_out, own_ + g_.y_copy);
      ImageRows y_band = y_new;
      y_band.data += (b0 - y_first) * y_new.row;
      if (g_.need_dv) this->fill_dv(y_new, b1 - y_first, y_first - dv_top);
      dv_filled = b1;
      if (q_.grad_bias) accumulate_bias(y_band, b1 - b0, p_.out_width, 0, s_.c_out, own_ + g_.sum_bias);
      if (g_.need_z) {
        const int64_t top = b0 * p_.stride_h - p_.pad_top;
        const int64_t bottom = (b1 - 1) * p_.stride_h - p_.pad_top + g_.halo;
        if (!started || z_filled <= top) z_filled = top;
        else if (top > z_top) this->move_z(top - z_top, z_filled - z_top);
        z_top = top;
        refill(x_all, z_filled, bottom, z_top);
        z_filled = bottom;
      }
      if (g_.need_v) {
        this->band_v(b1 - b0,
                     ahead(q_.grad_y, q_.grad_y_strides, n, b1, g_.band, p_.out_height, p_.out_width, s_.c_out));
        this->add_out(y_band, b1 - b0, std::exchange(added_.out, true));
      }
      if (q_.grad_core) this->add_core(b0 - dv_top, b1 - b0, std::exchange(added_.core, true));
      if (g_.need_dz && i0 < i1) finish_input_rows(n, x_all, i0, i1, dv_top);
      started = true;
    }
  }

  // Input rows [from, to) into the window of Z whose first row is `top`; those outside the image are zero.
  void refill(const ImageRows& x, int64_t from, int64_t to, int64_t top) {
    for (int64_t row = from; row < to; ++row) {
      if (row < 0 || row >= p_.height) this->clear_z(row - top);
    }
    const int64_t first = from < 0 ? 0 : from;
    const int64_t last = to > p_.height ? p_.height : to;
    if (first >= last) return;
    const ImageRows rows = readable<E>(x, g_.gather_x, first, last, p_.width, s_.c_in, own_ + g_.x_copy);
    this->fill_z(rows, last - first, first - top);
  }

  // Lines of the next band, asked for while this one is multiplied.
  Prefetch ahead(const void* image, const Strides4& strides, int64_t n, int64_t row, int64_t rows, int64_t height,
                 int64_t width, int64_t channels) const {
    if (!g_.streams || !image || row < 0 || row >= height) return {};
    const int64_t pixels = width * (rows < height - row ? rows : height - row);
    return lines_of(static_cast<const E*>(image) + n * strides.n + row * strides.h, strides, pixels, channels);
  }

  // dZ, and from it dx and the gradient of factor_in, for input rows [i0, i1).
  void finish_input_rows(int64_t n, const ImageRows& x_all, int64_t i0, int64_t i1, int64_t dv_top) {
    for (int64_t i = i0; i < i1; ++i) {
      const Prefetch next = ahead(p_.x, p_.x_strides, n, i + g_.band * p_.stride_h, 1, p_.height, p_.width, s_.c_in);
      const Prefetch target = ahead(q_.grad_x, q_.grad_x_strides, n, i, 1, p_.height, p_.width, s_.c_in);
      this->band_dz(i, i - i0, dv_top, next, target);
    }
    if (q_.grad_x) this->band_leave(n, i0, i1);
    if (q_.grad_factor_in) {
      const ImageRows x = readable<E>(x_all, g_.gather_x, i0, i1, p_.width, s_.c_in, own_ + g_.x_copy);
      this->add_in(x, i1 - i0, std::exchange(added_.in, true));
    }
  }

  struct {
    bool core = false, out = false, in = false;
  } added_;
};
