// Backward pass of the bottleneck convolution, in bands: every part has a run of output rows.
//
// The run is taken in bands small enough for the cache. For each band the rank-space activations are made again, the
// gradients descend, and the weight gradients accumulate into the part's own sums, which a second phase adds up in a
// fixed order. Rows of Z and dV that the next band needs are kept, none is made twice within a part.

template <class T>
class BackwardBands : public BackwardStages<T> {
 public:
  using BackwardStages<T>::BackwardStages;

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

  // Adds up the parts' sums, in their order, and writes an even share of the weight gradients.
  void reduce() {
    add_share(g_.sum_out, s_.c_out * s_.rank_out, q_.grad_factor_out);
    add_share(g_.sum_in, s_.c_in * s_.rank_in, q_.grad_factor_in);
    add_share(g_.sum_bias, s_.c_out, q_.grad_bias);
    if (!q_.grad_core) return;
    const int64_t first = s_.rank_in * part_ / g_.threads, last = s_.rank_in * (part_ + 1) / g_.threads;
    const int64_t run = (last - first) * s_.rank_out;
    for (int64_t t = 0; t < s_.kernel_h * s_.kernel_w; ++t)
      add_parts(g_.sum_core + (t * s_.rank_in + first) * s_.rank_out, run);
    this->write_core(first_sums() + g_.sum_core, first, last);
  }

 private:
  using Stages = BackwardStages<T>;
  using Stages::activations_;
  using Stages::g_;
  using Stages::own_;
  using Stages::p_;
  using Stages::part_;
  using Stages::q_;
  using Stages::rows_a_;
  using Stages::rows_b_;
  using Stages::s_;
  using Stages::shared_;
  using typename Stages::E;

  float* first_sums() const { return shared_ + g_.shared_words; }

  // Adds the other parts' sums to the first's.
  void add_parts(int64_t offset, int64_t n) const {
    float* sum = first_sums() + offset;
    for (int64_t i = 1; i < g_.threads; ++i) {
      const float* other = sum + i * g_.part_words;
      for (int64_t j = 0; j < n; ++j) sum[j] += other[j];
    }
  }

  void add_share(int64_t offset, int64_t n, void* to) const {
    if (!to) return;
    const int64_t begin = n * part_ / g_.threads, end = n * (part_ + 1) / g_.threads;
    add_parts(offset + begin, end - begin);
    this->write_sums(first_sums() + offset, n, to);
  }

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
      const int64_t reach = g_.need_dz ? (g_.halo - 1) / p_.stride_h : 0;
      const int64_t dv_first = b0 > reach ? b0 - reach : 0;
      slide(own_ + g_.dv, g_.dv_row, dv_top, dv_filled, dv_first, started);
      const int64_t y_first = g_.need_dv && dv_filled < b0 ? dv_filled : b0;
      const ImageRows y_new = readable<E>(y_all, g_.gather_y, y_first, b1, p_.out_width, s_.c_out, own_ + g_.y_copy);
      ImageRows y_band = y_new;
      y_band.data += (b0 - y_first) * y_new.row;
      if (g_.need_dv) descend(y_new, y_first, b1, dv_top);
      dv_filled = b1;
      if (q_.grad_bias) accumulate_bias(y_band, b1 - b0, p_.out_width, 0, s_.c_out, own_ + g_.sum_bias);
      if (g_.need_z) {
        const int64_t top = b0 * p_.stride_h - p_.pad_top;
        const int64_t bottom = (b1 - 1) * p_.stride_h - p_.pad_top + g_.halo;
        slide(own_ + g_.z, g_.z_row, z_top, z_filled, top, started);
        refill(x_all, z_filled, bottom, z_top);
        z_filled = bottom;
      }
      const float* z = own_ + g_.z;
      if (g_.need_v) {
        this->make_v(z, b1 - b0, own_ + g_.v,
                     ahead(q_.grad_y, q_.grad_y_strides, n, b1, g_.band, p_.out_height, p_.out_width, s_.c_out), 0, 1);
        accumulate(y_band, 1, b1 - b0, p_.out_width, s_.c_out, own_ + g_.v, p_.out_width * s_.rank_out, 0, s_.rank_out,
                   own_ + g_.sum_out, std::exchange(added_.out, true), rows_a_, rows_b_);
      }
      if (q_.grad_core)
        this->accumulate_core(z, own_ + g_.dv + (b0 - dv_top) * g_.dv_row, 1, b1 - b0, own_ + g_.sum_core,
                              std::exchange(added_.core, true), 0, 1);
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
    for (int64_t row = from; row < to; ++row) {
      float* at = z + (row - top) * g_.z_row;
      if (row < 0 || row >= p_.height) clear(at, g_.z_row);
      else this->clear_sides_of_z(at);
    }
    const int64_t first = from < 0 ? 0 : from;
    const int64_t last = to > p_.height ? p_.height : to;
    if (first >= last || g_.z_used <= 0) return;
    const ImageRows rows = readable<E>(x, g_.gather_x, first, last, p_.width, s_.c_in, own_ + g_.x_copy);
    this->enter_z(rows, last - first, z + (first - top) * g_.z_row + p_.pad_left * s_.rank_in, 0, 1);
  }

  // Output rows [from, to) of grad_y into the window of dV whose first row is `top`.
  void descend(const ImageRows& y, int64_t from, int64_t to, int64_t top) {
    float* dv = own_ + g_.dv + (from - top) * g_.dv_row;
    for (int64_t r = 0; r < to - from; ++r) this->clear_sides_of_dv(dv + r * g_.dv_row);
    this->enter_dv(y, to - from, dv, 0, 1);
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
    float* dz = own_ + g_.dz;
    const int64_t dz_row = p_.width * s_.rank_in;
    for (int64_t i = i0; i < i1; ++i) {
      const Prefetch next = ahead(p_.x, p_.x_strides, n, i + g_.band * p_.stride_h, 1, p_.height, p_.width, s_.c_in);
      const Prefetch target = ahead(q_.grad_x, q_.grad_x_strides, n, i, 1, p_.height, p_.width, s_.c_in);
      this->make_dz(own_ + g_.dv, dv_top, i, 1, dz + (i - i0) * dz_row, next, target, 0, 1);
    }
    if (q_.grad_x) this->leave(n, i0, i1, dz, 0, 1);
    if (q_.grad_factor_in) {
      const ImageRows x = readable<E>(x_all, g_.gather_x, i0, i1, p_.width, s_.c_in, own_ + g_.x_copy);
      accumulate(x, 1, i1 - i0, p_.width, s_.c_in, dz, dz_row, 0, s_.rank_in, own_ + g_.sum_in,
                 std::exchange(added_.in, true), rows_a_, rows_b_);
    }
  }

  struct {
    bool core = false, out = false, in = false;
  } added_;
};
