// Backward pass of the bottleneck convolution.
//
// A piece of work is a run of output rows, taken in bands small enough for the cache. For each band the rank-space
// activations are made again (Z from x, V from Z), the gradients descend (dV from dy, dZ from dV, dx from dZ), and the
// weight gradients accumulate into the piece's own sums, which a second phase adds up in a fixed order. Rows of Z and
// dV that the next band needs are kept, none is made twice within a piece. Sums are float32; bfloat16 data is widened
// on the way in.

struct BackwardGeometry {
  bool x_rows, y_rows;        // pixels lie together in x, in grad_y
  bool gather_x, gather_y;    // copied to dense float32 rows first
  bool need_z, need_v, need_dv, need_dz, merged;
  int64_t band;               // output rows a step
  int64_t halo;               // input rows an output row spans
  int64_t z_width, z_used, z_row, z_rows;
  int64_t dv_left, dv_width, dv_row, dv_rows;  // window of dV: zero pixels on the left, pixels, words a row, rows
  int64_t in_band;            // input rows finished in a step, at most
  int64_t flat_pitch;
  // Word offsets: packed weights (shared), then per part the windows and the sums.
  int64_t in_columns, in_rows, core, core_back, out_columns, out_rows, x_columns, x_rows_form, packed_words;
  int64_t z, v, dv, dz, flat, x_copy, y_copy, taps;
  int64_t sum_core, sum_out, sum_in, sum_bias, part_words;
  int64_t threads;
};

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

template <class T>
inline BackwardGeometry backward_geometry(const BottleneckBackwardParams& q, int64_t threads) {
  const BottleneckConvParams& p = q.forward;
  const BottleneckShape& s = p.shape;
  BackwardGeometry g;
  g.threads = threads;
  const auto rows_form = [](const Strides4& st, int64_t width) { return st.c != 1 && (st.w == 1 || width == 1); };
  g.x_rows = rows_form(p.x_strides, p.width);
  g.y_rows = rows_form(q.grad_y_strides, p.out_width);
  g.gather_x = T::kNarrow || !(p.x_strides.c == 1 || g.x_rows);
  g.gather_y = T::kNarrow || !(q.grad_y_strides.c == 1 || g.y_rows);
  g.need_v = q.grad_factor_out;
  g.need_z = q.grad_core || g.need_v;
  g.need_dz = q.grad_x || q.grad_factor_in;
  g.need_dv = q.grad_core || g.need_dz;
  g.halo = p.dilation_h * (s.kernel_h - 1) + 1;
  g.z_width = (p.out_width - 1) * p.stride_w + p.dilation_w * (s.kernel_w - 1) + 1;
  const int64_t room = g.z_width - p.pad_left;
  g.z_used = room < 0 ? 0 : room < p.width ? room : p.width;
  g.z_row = round_up(g.z_width * s.rank_in, 16);
  // Output pixels that touch an input pixel, from the first column's to the last column's.
  const int64_t first = floor_div(p.pad_left - p.dilation_w * (s.kernel_w - 1), p.stride_w);
  const int64_t last = floor_div(p.width - 1 + p.pad_left, p.stride_w);
  g.dv_left = first < 0 ? -first : 0;
  const int64_t reach = last + 1 > p.out_width ? last + 1 : p.out_width;
  g.dv_width = g.dv_left + reach;
  g.dv_row = round_up(g.dv_width * s.rank_out, 16);
  g.merged = p.stride_w == 1 && p.dilation_w == 1;

  constexpr int64_t kBandWords = 96 * 1024;  // a band's data: most of half a megabyte of private cache
  const int64_t row_words = p.width * p.stride_h * (s.c_in + 2 * s.rank_in) + p.out_width * (s.c_out + 2 * s.rank_out);
  g.band = kBandWords / (row_words > 0 ? row_words : 1);
  if (g.band < 1) g.band = 1;
  if (g.band > p.out_height) g.band = p.out_height;
  g.z_rows = (g.band - 1) * p.stride_h + g.halo;
  // Output rows kept for input rows not finished yet, and the new ones.
  const int64_t kept = ceil_div(g.halo, p.stride_h) + 1;
  g.dv_rows = g.band + kept;
  // A step finishes the input rows above its last output row; the first and last step also those at the borders.
  g.in_band = g.band * p.stride_h + p.pad_top + g.halo + p.stride_h;
  if (g.in_band > p.height) g.in_band = p.height;
  const int64_t pixels = p.width > p.out_width ? p.width : p.out_width;
  const int64_t rank = s.rank_in > s.rank_out ? s.rank_in : s.rank_out;
  g.flat_pitch = round_up(pixels, 16) + 32;

  int64_t at = 0;
  const auto take = [&at](int64_t n) {
    const int64_t start = at;
    at += round_up(n, 16);
    return start;
  };
  const int64_t kernel = s.kernel_h * s.kernel_w;
  g.in_columns = take(s.c_in * padded_columns(s.rank_in));
  g.in_rows = take(s.rank_in * s.c_in);
  g.core = take(kernel * s.rank_in * padded_columns(s.rank_out));
  g.core_back = take(kernel * s.rank_out * padded_columns(s.rank_in));
  g.out_columns = take(s.c_out * padded_columns(s.rank_out));
  g.out_rows = take(s.rank_out * s.c_out);
  g.x_columns = take(s.rank_in * padded_columns(s.c_in));
  g.x_rows_form = take(s.c_in * s.rank_in);
  g.packed_words = at;

  at = 0;
  g.taps = take(4 * kernel + 4 * (g.band + g.in_band) + 16);
  g.z = take(g.need_z ? g.z_rows * g.z_row + 64 : 0);
  g.v = take(g.need_v ? g.band * p.out_width * s.rank_out + 64 : 0);
  g.dv = take(g.need_dv ? g.dv_rows * g.dv_row + 64 : 0);
  g.dz = take(g.need_dz ? g.in_band * p.width * s.rank_in + 64 : 0);
  g.flat = take(rank * g.flat_pitch + 64);
  const int64_t x_rows = g.z_rows > g.in_band ? g.z_rows : g.in_band;
  g.x_copy = take(g.gather_x ? x_rows * p.width * s.c_in + 64 : 0);
  g.y_copy = take(g.gather_y ? g.dv_rows * p.out_width * s.c_out + 64 : 0);
  g.sum_core = take(q.grad_core ? kernel * s.rank_in * s.rank_out : 0);
  g.sum_out = take(q.grad_factor_out ? s.c_out * s.rank_out : 0);
  g.sum_in = take(q.grad_factor_in ? s.c_in * s.rank_in : 0);
  g.sum_bias = take(q.grad_bias ? s.c_out : 0);
  g.part_words = at;
  return g;
}

// Rows of an image: element strides in bytes, floats.
struct ImageRows {
  const char* data = nullptr;
  int64_t row = 0, pixel = 0, channel = 0;
  bool rows_form = false;  // pixels lie together
};

template <class T>
class BottleneckBackward {
 public:
  BottleneckBackward(const BottleneckBackwardParams& q, const BackwardGeometry& g, int64_t part)
      : q_(q), p_(q.forward), s_(q.forward.shape), g_(g), packed_(static_cast<const float*>(q.scratch)),
        own_(static_cast<float*>(q.scratch) + g.packed_words + part * g.part_words) {
    kernel_a_ = reinterpret_cast<int64_t*>(own_ + g_.taps);
    kernel_b_ = kernel_a_ + s_.kernel_h * s_.kernel_w;
    rows_a_ = kernel_b_ + s_.kernel_h * s_.kernel_w;
    rows_b_ = rows_a_ + g_.band + g_.in_band;
  }

  static void pack(const BottleneckBackwardParams& q, const BackwardGeometry& g) {
    const BottleneckShape& s = q.forward.shape;
    const int64_t taps = s.kernel_h * s.kernel_w;
    const E* in = static_cast<const E*>(q.weights.factor_in);
    const E* core = static_cast<const E*>(q.weights.core);
    const E* out = static_cast<const E*>(q.weights.factor_out);
    float* to = static_cast<float*>(q.scratch);
    if (g.need_z && (!g.x_rows)) pack_columns<T>(in, 1, 0, s.c_in, s.rank_in, s.rank_in, 1, to + g.in_columns);
    if (g.need_z && g.x_rows) pack_rows<T>(in, s.rank_in, 1, 1, 0, s.c_in, s.rank_in, to + g.in_rows);
    if (g.need_v) pack_columns<T>(core, taps, 1, s.rank_in, taps, s.rank_out, s.rank_in * taps, to + g.core);
    // All taps in reverse, as the transposed convolution meets them along a row of dV.
    if (g.need_dz)
      pack_columns<T>(core + taps - 1, taps, -1, s.rank_out, s.rank_in * taps, s.rank_in, taps, to + g.core_back);
    if (g.need_dv && !g.y_rows) pack_columns<T>(out, 1, 0, s.c_out, s.rank_out, s.rank_out, 1, to + g.out_columns);
    if (g.need_dv && g.y_rows) pack_rows<T>(out, s.rank_out, 1, 1, 0, s.c_out, s.rank_out, to + g.out_rows);
    if (q.grad_x && q.grad_x_strides.c == 1)
      pack_columns<T>(in, 1, 0, s.rank_in, 1, s.c_in, s.rank_in, to + g.x_columns);
    if (q.grad_x && q.grad_x_strides.c != 1) pack_rows<T>(in, s.c_in, s.rank_in, 1, 0, s.rank_in, 1, to + g.x_rows_form);
  }

  // Output rows [begin, end) of all images, counted through the batch.
  void run_rows(int64_t begin, int64_t end) {
    clear(g_.sum_core, q_.grad_core ? s_.kernel_h * s_.kernel_w * s_.rank_in * s_.rank_out : 0);
    clear(g_.sum_out, q_.grad_factor_out ? s_.c_out * s_.rank_out : 0);
    clear(g_.sum_in, q_.grad_factor_in ? s_.c_in * s_.rank_in : 0);
    clear(g_.sum_bias, q_.grad_bias ? s_.c_out : 0);
    while (begin < end) {
      const int64_t n = begin / p_.out_height, first = begin % p_.out_height;
      int64_t last = first + (end - begin);
      if (last > p_.out_height) last = p_.out_height;
      run_image_rows(n, first, last);
      begin += last - first;
    }
  }

  // Adds up the pieces' sums, in their order, and writes an even share of the weight gradients.
  void reduce(int64_t part) {
    const int64_t taps = s_.kernel_h * s_.kernel_w, ab = s_.rank_in * s_.rank_out;
    share(part, s_.rank_out, q_.grad_core, [&](int64_t b) {
      E* to = static_cast<E*>(q_.grad_core) + b * s_.rank_in * taps;
      for (int64_t a = 0; a < s_.rank_in; ++a) {
        for (int64_t t = 0; t < taps; ++t) *to++ = from_float(total(g_.sum_core + t * ab + a * s_.rank_out + b));
      }
    });
    share(part, s_.c_out * s_.rank_out, q_.grad_factor_out, [&](int64_t i) {
      static_cast<E*>(q_.grad_factor_out)[i] = from_float(total(g_.sum_out + i));
    });
    share(part, s_.c_in * s_.rank_in, q_.grad_factor_in, [&](int64_t i) {
      static_cast<E*>(q_.grad_factor_in)[i] = from_float(total(g_.sum_in + i));
    });
    share(part, s_.c_out, q_.grad_bias, [&](int64_t i) {
      static_cast<E*>(q_.grad_bias)[i] = from_float(total(g_.sum_bias + i));
    });
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

  void clear(int64_t offset, int64_t n) { __builtin_memset(own_ + offset, 0, static_cast<size_t>(n) * 4); }

  float total(int64_t offset) const {
    const float* first = static_cast<const float*>(q_.scratch) + g_.packed_words + offset;
    float sum = 0.0f;
    for (int64_t i = 0; i < g_.threads; ++i) sum += first[i * g_.part_words];
    return sum;
  }

  template <class F>
  void share(int64_t part, int64_t n, const void* wanted, const F& f) {
    if (!wanted) return;
    for (int64_t i = n * part / g_.threads; i < n * (part + 1) / g_.threads; ++i) f(i);
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

  // Rows [first, last) of an image as the products read them: in place, or widened into `copy`. The result's row 0
  // is `first`.
  ImageRows readable(const ImageRows& from, bool gather, int64_t first, int64_t last, int64_t width, int64_t channels,
                     float* copy) const {
    ImageRows at = from;
    at.data = from.data + first * from.row;
    if (!gather) return at;
    ImageRows to;
    to.data = reinterpret_cast<const char*>(copy);
    to.rows_form = from.rows_form;
    to.row = width * channels * 4;
    to.pixel = from.rows_form ? 4 : channels * 4;
    to.channel = from.rows_form ? width * 4 : 4;
    const int64_t outer = from.rows_form ? channels : width, inner = from.rows_form ? width : channels;
    const int64_t outer_step = from.rows_form ? from.channel : from.pixel;
    const int64_t inner_step = (from.rows_form ? from.pixel : from.channel) / kBytes;
    for (int64_t r = first; r < last; ++r) {
      for (int64_t o = 0; o < outer; ++o) {
        const E* e = reinterpret_cast<const E*>(from.data + r * from.row + o * outer_step);
        if (inner_step == 1) {
          for (int64_t i = 0; i < inner; ++i) copy[i] = to_float(e[i]);
        } else {
          for (int64_t i = 0; i < inner; ++i) copy[i] = to_float(e[i * inner_step]);
        }
        copy += inner;
      }
    }
    return to;
  }

  // Pointwise product of image rows with a factor into rank-space rows [pixel][rank].
  void enter(const ImageRows& x, int64_t rows, int64_t width, int64_t channels, const float* columns,
             const float* a_rows, int64_t rank, float* to, int64_t to_row) {
    Product m;
    m.k = channels;
    if (!x.rows_form) {
      m.segments = rows;
      m.rows = width;
      m.a = x.data;
      m.a_row = x.pixel;
      m.a_segment = x.row;
      m.b = reinterpret_cast<const char*>(columns);
      m.columns = rank;
      m.c = reinterpret_cast<char*>(to);
      m.c_row = rank * 4;
      m.c_segment = to_row * 4;
      multiply<AOrder::kAlongK, false, FloatDot>(m);
      return;
    }
    float* flat = own_ + g_.flat;
    m.rows = rank;
    m.a = reinterpret_cast<const char*>(a_rows);
    m.a_row = channels * 4;
    m.b_packed = false;
    m.b_k = x.channel;
    m.columns = width;
    m.c = reinterpret_cast<char*>(flat);
    m.c_row = g_.flat_pitch * 4;
    for (int64_t r = 0; r < rows; ++r) {
      m.b = x.data + r * x.row;
      multiply<AOrder::kAlongK, true, FloatDot>(m);
      transpose_words(flat, g_.flat_pitch, rank, width, to + r * to_row, rank);
    }
  }

  // sum[channel][rank] += image^T * rank-space rows, over `rows` rows of `width` pixels.
  void accumulate(const ImageRows& x, int64_t rows, int64_t width, int64_t channels, const float* from,
                  int64_t from_row, int64_t rank, float* sum) {
    Product m;
    m.rows = channels;
    m.k = width;
    m.taps = rows;
    m.a_tap = rows_a_;
    m.b_tap = rows_b_;
    for (int64_t r = 0; r < rows; ++r) {
      rows_a_[r] = r * x.row;
      rows_b_[r] = r * from_row * 4;
    }
    m.a = x.data;
    m.b = reinterpret_cast<const char*>(from);
    m.b_packed = false;
    m.b_k = rank * 4;
    m.columns = rank;
    m.c = reinterpret_cast<char*>(sum);
    m.c_row = rank * 4;
    m.init_mode = Init::kAccumulate;
    if (x.rows_form) {
      m.a_row = x.channel;
      multiply<AOrder::kAlongK, false, FloatDot>(m);
    } else {
      m.a_k = x.pixel;
      multiply<AOrder::kAlongM, false, FloatDot>(m);
    }
  }

  void accumulate_bias(const ImageRows& y, int64_t rows) {
    float* sum = own_ + g_.sum_bias;
    for (int64_t r = 0; r < rows; ++r) {
      const char* row = y.data + r * y.row;
      if (!y.rows_form) {
        for (int64_t i = 0; i < p_.out_width; ++i) {
          const float* pixel = reinterpret_cast<const float*>(row + i * y.pixel);
          for (int64_t t = 0; t < s_.c_out; ++t) sum[t] += pixel[t];
        }
        continue;
      }
      for (int64_t t = 0; t < s_.c_out; ++t) {
        const float* pixels = reinterpret_cast<const float*>(row + t * y.channel);
        Wide wide = Wide::zero();
        const float one = 1.0f;
        int64_t i = 0;
        for (; i + Wide::kLanes <= p_.out_width; i += Wide::kLanes)
          wide = fma(Wide::load(pixels + i), Wide::broadcast(&one), wide);
        if (i < p_.out_width)
          wide = fma(Wide::load_first(pixels + i, static_cast<int>(p_.out_width - i)), Wide::broadcast(&one), wide);
        float lanes[Wide::kLanes];
        wide.store(lanes);
        float row_sum = 0.0f;
        for (int l = 0; l < Wide::kLanes; ++l) row_sum += lanes[l];
        sum[t] += row_sum;
      }
    }
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
      int64_t dv_first = b0;
      if (g_.need_dz && i0 < i1) {
        const int64_t reach = ceil_div(i0 + p_.pad_top - g_.halo + 1, p_.stride_h);
        dv_first = reach < 0 ? 0 : reach < b0 ? reach : b0;
      }
      slide(own_ + g_.dv, g_.dv_row, dv_top, dv_filled, dv_first, started);
      const int64_t y_first = g_.need_dv && dv_filled < b0 ? dv_filled : b0;
      const ImageRows y_new =
          readable(y_all, g_.gather_y, y_first, b1, p_.out_width, s_.c_out, own_ + g_.y_copy);
      ImageRows y_band = y_new;
      y_band.data += (b0 - y_first) * y_new.row;
      if (g_.need_dv) descend(y_new, y_first, b1, dv_top);
      dv_filled = b1;
      if (q_.grad_bias) accumulate_bias(y_band, b1 - b0);
      if (g_.need_z) {
        const int64_t top = b0 * p_.stride_h - p_.pad_top;
        const int64_t bottom = (b1 - 1) * p_.stride_h - p_.pad_top + g_.halo;
        slide(own_ + g_.z, g_.z_row, z_top, z_filled, top, started);
        refill(x_all, z_filled, bottom, z_top);
        z_filled = bottom;
      }
      if (g_.need_v) {
        remake_v(b1 - b0);
        accumulate(y_band, b1 - b0, p_.out_width, s_.c_out, own_ + g_.v, p_.out_width * s_.rank_out, s_.rank_out,
                   own_ + g_.sum_out);
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
        __builtin_memset(at, 0, static_cast<size_t>(g_.z_row) * 4);
        continue;
      }
      const int64_t right = (left + g_.z_used) * s_.rank_in;
      __builtin_memset(at, 0, static_cast<size_t>(left * s_.rank_in) * 4);
      __builtin_memset(at + right, 0, static_cast<size_t>(g_.z_row - right) * 4);
    }
    const int64_t first = from < 0 ? 0 : from;
    const int64_t last = to > p_.height ? p_.height : to;
    if (first >= last || g_.z_used <= 0) return;
    const ImageRows rows = readable(x, g_.gather_x, first, last, p_.width, s_.c_in, own_ + g_.x_copy);
    enter(rows, last - first, g_.z_used, s_.c_in, packed_ + g_.in_columns, packed_ + g_.in_rows, s_.rank_in,
          z + (first - top) * g_.z_row + left * s_.rank_in, g_.z_row);
  }

  // Output rows [from, to) of grad_y into the window of dV whose first row is `top`.
  void descend(const ImageRows& y, int64_t from, int64_t to, int64_t top) {
    float* dv = own_ + g_.dv + (from - top) * g_.dv_row;
    const int64_t left = g_.dv_left * s_.rank_out, right = (g_.dv_left + p_.out_width) * s_.rank_out;
    for (int64_t r = 0; r < to - from; ++r) {
      __builtin_memset(dv + r * g_.dv_row, 0, static_cast<size_t>(left) * 4);
      __builtin_memset(dv + r * g_.dv_row + right, 0, static_cast<size_t>(g_.dv_row - right) * 4);
    }
    enter(y, to - from, p_.out_width, s_.c_out, packed_ + g_.out_columns, packed_ + g_.out_rows, s_.rank_out,
          dv + left, g_.dv_row);
  }

  void remake_v(int64_t rows) {
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
    multiply<AOrder::kAlongK, false, FloatDot>(m);
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
    m.init_mode = Init::kAccumulate;
    for (int64_t y = 0; y < s_.kernel_h; ++y) {
      for (int64_t x = 0; x < across; ++x) {
        m.a = reinterpret_cast<const char*>(own_ + g_.z + y * p_.dilation_h * g_.z_row +
                                            x * p_.dilation_w * s_.rank_in);
        m.c = reinterpret_cast<char*>(own_ + g_.sum_core + (y * s_.kernel_w + x) * s_.rank_in * s_.rank_out);
        multiply<AOrder::kAlongM, false, FloatDot>(m);
      }
    }
  }

  // dZ, and from it dx and the gradient of factor_in, for input rows [i0, i1).
  void finish_input_rows(int64_t n, const ImageRows& x_all, int64_t i0, int64_t i1, int64_t dv_top) {
    float* dz = own_ + g_.dz;
    const int64_t dz_row = p_.width * s_.rank_in;
    for (int64_t i = i0; i < i1; ++i) transposed_row(i, dz + (i - i0) * dz_row, dv_top);
    if (q_.grad_x) leave(n, i0, i1, dz);
    if (q_.grad_factor_in) {
      const ImageRows x = readable(x_all, g_.gather_x, i0, i1, p_.width, s_.c_in, own_ + g_.x_copy);
      accumulate(x, i1 - i0, p_.width, s_.c_in, dz, dz_row, s_.rank_in, own_ + g_.sum_in);
    }
  }

  // One row of dZ: each residue class of columns modulo the stride meets its own taps.
  void transposed_row(int64_t i, float* to, int64_t dv_top) {
    Product m;
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
      multiply<AOrder::kAlongK, false, FloatDot>(m);
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
  const float* packed_;
  float* own_;
  int64_t *kernel_a_, *kernel_b_, *rows_a_, *rows_b_;
};

// All entry points of one element type. Phases of backward: pack (one piece), the rows, the sums.
template <class T, class TBackward = T>
struct Bottleneck : BottleneckForwardEntry<T> {
  using Forward = BottleneckForwardEntry<T>;

  static BottleneckPlan backward_plan(const BottleneckBackwardParams& q, int64_t threads) {
    const BackwardGeometry g = backward_geometry<TBackward>(q, threads);
    BottleneckPlan plan;
    plan.phases = 3;
    plan.parts = threads;
    plan.scratch_bytes = static_cast<size_t>(g.packed_words + g.part_words * threads) * 4;
    return plan;
  }

  static void backward_run(const BottleneckBackwardParams& q, int64_t threads, int64_t phase, int64_t part) {
    const BackwardGeometry g = backward_geometry<TBackward>(q, threads);
    if (phase == 0) {
      if (part == 0) BottleneckBackward<TBackward>::pack(q, g);
      return;
    }
    BottleneckBackward<TBackward> backward(q, g, part);
    const int64_t rows = q.forward.batch * q.forward.out_height;
    if (phase == 1) backward.run_rows(rows * part / threads, rows * (part + 1) / threads);
    else backward.reduce(part);
  }

  static constexpr BottleneckKernels table() {
    return {Forward::packed_bytes, Forward::pack, Forward::pack_for, Forward::plan, Forward::run,
            backward_plan,         backward_run};
  }
};
