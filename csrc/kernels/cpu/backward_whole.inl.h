// Backward pass of the bottleneck convolution, whole images at a time: every stage is cut among the parts.
//
// Where images are small against the weights, parts with rows of their own would each keep sums as large as all weights
// and make the rows at their seams twice. Here the rank-space activations of a group of images lie in shared memory,
// and every sum is written once, by the part that owns it, over all pixels of the group.

template <class T>
class BackwardWhole : public BackwardStages<T> {
 public:
  using BackwardStages<T>::BackwardStages;

  enum Step { kWiden, kEnter, kCore, kLeave };

  // The images of group `index`, one step after the other.
  void run(int64_t index, Step step) {
    first_ = index * g_.group;
    images_ = first_ + g_.group < p_.batch ? g_.group : p_.batch - first_;
    switch (step) {
      case kWiden: widen(); break;
      case kEnter: enter_images(); break;
      case kCore: core(index > 0); break;
      case kLeave: leave_images(index > 0); break;
    }
  }

  // Weight gradients that are narrower than their sums; after the last group.
  void finish() {
    this->write_sums(shared_ + g_.sum_out, s_.c_out * s_.out(), q_.grad_factor_out);
    this->write_sums(shared_ + g_.sum_in, s_.c_in * s_.mid(), q_.grad_factor_in);
    this->write_sums(shared_ + g_.sum_bias, s_.c_out, q_.grad_bias);
  }

 private:
  using Stages = BackwardStages<T>;
  using Stages::g_;
  using Stages::p_;
  using Stages::part_;
  using Stages::q_;
  using Stages::rows_a_;
  using Stages::rows_b_;
  using Stages::s_;
  using Stages::share;
  using Stages::shared_;
  using typename Stages::E;

  // Where a sum in torch's order accumulates: in the result, or beside it where that is narrower.
  float* sum(void* result, int64_t beside) const {
    return Stages::kBytes == 4 ? static_cast<float*>(result) : shared_ + beside;
  }

  // This group's images as floats.
  ImageRows x() const {
    if (!g_.gather_x) return this->x_images().at_image(first_);
    return widened_images(g_.x_rows, p_.height, p_.width, s_.c_in, shared_ + g_.x_copy);
  }

  ImageRows y() const {
    if (!g_.gather_y) return this->y_images().at_image(first_);
    return widened_images(g_.y_rows, p_.out_height, p_.out_width, s_.c_out, shared_ + g_.y_copy);
  }

  void widen() {
    if (first_ == 0) this->widen_weights();
    if (g_.gather_x)
      widen_images<E>(this->x_images().at_image(first_), images_, p_.height, p_.width, s_.c_in, shared_ + g_.x_copy,
                      part_, g_.threads);
    if (g_.gather_y)
      widen_images<E>(this->y_images().at_image(first_), images_, p_.out_height, p_.out_width, s_.c_out,
                      shared_ + g_.y_copy, part_, g_.threads);
  }

  void enter_images() {
    if (first_ == 0) this->pack();
    for (int64_t n = 0; n < images_; ++n) {
      if (g_.need_dv) enter_dv_image(y().at_image(n), shared_ + g_.dv + n * g_.dv_image());
      if (g_.need_z) enter_z_image(x().at_image(n), shared_ + g_.z + n * g_.z_image());
    }
  }

  void enter_z_image(const ImageRows& x, float* z) {
    const int64_t bottom = p_.height < g_.z_rows - p_.pad_top ? p_.height : g_.z_rows - p_.pad_top;
    for (int64_t r = share(g_.z_rows, 0); r < share(g_.z_rows, 1); ++r) {
      if (r < p_.pad_top || r >= p_.pad_top + bottom) clear(z + r * g_.z_row, g_.z_row);
      else this->clear_sides_of_z(z + r * g_.z_row);
    }
    if (bottom > 0 && g_.z_used > 0)
      this->enter_z(x, bottom, z + p_.pad_top * g_.z_row + p_.pad_left * s_.mid(), part_, g_.threads);
  }

  void enter_dv_image(const ImageRows& y, float* dv) {
    for (int64_t r = share(g_.dv_rows, 0); r < share(g_.dv_rows, 1); ++r) {
      if (r < g_.dv_above || r >= g_.dv_above + p_.out_height) clear(dv + r * g_.dv_row, g_.dv_row);
      else this->clear_sides_of_dv(dv + r * g_.dv_row);
    }
    this->enter_dv(y, p_.out_height, dv + g_.dv_above * g_.dv_row, part_, g_.threads);
  }

  void core(bool add) {
    const int64_t v_image = p_.out_height * p_.out_width * s_.out(), dz_image = p_.height * p_.width * s_.mid();
    const float *z = shared_ + g_.z, *dv = shared_ + g_.dv;
    for (int64_t n = 0; n < images_; ++n) {
      if (g_.need_v)
        this->make_v(z + n * g_.z_image(), p_.out_height, shared_ + g_.v + n * v_image, {}, part_, g_.threads);
      for (int64_t i = 0; g_.need_dz && i < p_.stride_h && i < p_.height; ++i) {
        float* to = shared_ + g_.dz + n * dz_image + i * p_.width * s_.mid();
        const int64_t rows = (p_.height - i + p_.stride_h - 1) / p_.stride_h;
        this->make_dz(dv + n * g_.dv_image(), -g_.dv_above, i, rows, to, {}, {}, part_, g_.threads);
      }
    }
    if (q_.grad_core)
      this->accumulate_core(z, dv + g_.dv_above * g_.dv_row, images_, p_.out_height, shared_ + g_.sum_core, add, part_,
                            g_.threads);
  }

  void leave_images(bool add) {
    const int64_t v_row = p_.out_width * s_.out(), dz_row = p_.width * s_.mid();
    if (q_.grad_factor_out)
      accumulate(y(), images_, p_.out_height, p_.out_width, s_.c_out, shared_ + g_.v, v_row, p_.out_height * v_row,
                 s_.out(), sum(q_.grad_factor_out, g_.sum_out), add, rows_a_, rows_b_, part_, g_.threads);
    if (q_.grad_factor_in)
      accumulate(x(), images_, p_.height, p_.width, s_.c_in, shared_ + g_.dz, dz_row, p_.height * dz_row, s_.mid(),
                 sum(q_.grad_factor_in, g_.sum_in), add, rows_a_, rows_b_, part_, g_.threads);
    if (q_.grad_core && first_ + images_ == p_.batch)
      this->write_core(shared_ + g_.sum_core, share(s_.rank_in, 0), share(s_.rank_in, 1));
    for (int64_t n = 0; n < images_ && q_.grad_x; ++n)
      this->leave(first_ + n, 0, p_.height, shared_ + g_.dz + n * p_.height * dz_row, part_, g_.threads);
    if (!q_.grad_bias) return;
    float* bias = sum(q_.grad_bias, g_.sum_bias);
    const int64_t begin = share(s_.c_out, 0), end = share(s_.c_out, 1);
    if (!add) clear(bias + begin, end - begin);
    for (int64_t n = 0; n < images_; ++n)
      accumulate_bias(y().at_image(n), p_.out_height, p_.out_width, begin, end, bias);
  }

  int64_t first_ = 0, images_ = 0;
};
