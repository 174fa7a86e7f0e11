// How a backward call of the bottleneck convolution is laid out: bands or whole images, windows, sums and their places
// in the scratch.

struct BackwardGeometry {
  bool x_rows, y_rows;      // pixels lie together in x, in grad_y
  bool gather_x, gather_y;  // copied to dense float32 rows first
  bool need_z, need_v, need_dv, need_dz;
  bool merged_z, merged;  // taps of a kernel row are neighbours in Z; in dV too
  bool core_rows;         // bands work on [rank][pixel] (RowBands)
  bool narrow;            // weights and data are widened first
  bool whole;             // whole images at a time, every stage cut among the parts; else each part has its rows
  int64_t group, groups;  // whole: images at a time, and how often
  int64_t band;           // output rows a step
  int64_t halo;           // input rows an output row spans
  int64_t z_width, z_used, z_row, z_rows;
  // Window of dV: zero pixels on the left, zero rows above (whole images only), pixels, words a row, rows.
  int64_t dv_left, dv_above, dv_width, dv_row, dv_rows;
  // Where bands work on [rank][pixel]: words between ranks, and a row of Z.
  int64_t z_pitch, dv_pitch, v_pitch, dz_pitch, zr_row;
  int64_t row_slots;         // entries of a table of rows
  int64_t in_band;           // input rows finished in a step, at most
  int64_t x_block, y_block;  // rows of a product where pixels lie together
  int64_t flat_pitch;        // its pixels, padded
  // Word offsets in the part of the scratch that all share, then in each part's own. z, v, dv and dz lie in the shared
  // memory for whole images, else in each part's own.
  int64_t wide_in, wide_core, wide_out;  // the weights as floats, where they are narrower
  int64_t core, core_back, x_columns, x_copy, y_copy, shared_words;
  int64_t z, zr, v, dv, dz, columns, flat, taps;
  int64_t sum_core, sum_out, sum_in, sum_bias, part_words;
  int64_t threads;
  bool streams;  // lines of x, grad_y and grad_x are asked for ahead

  int64_t z_image() const { return z_rows * z_row; }
  int64_t dv_image() const { return dv_rows * dv_row; }
  // Output rows before a given one that touch the first input row of its window.
  int64_t reach(int64_t stride) const { return (halo - 1) / stride; }
  bool gathers() const { return narrow || gather_x || gather_y; }
};

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// Whether whole images go through the stages together: where parts would have only a few rows each, and where the
// weights, and with them every part's sums, would not stay in a private cache.
inline void choose_whole(const BottleneckConvParams& p, BackwardGeometry& g) {
  const BottleneckShape& s = p.shape;
  constexpr int64_t kWordsTogether = 256 * 1024;  // rank-space data of a group, shared by all parts
  constexpr int64_t kHeavyWeights = 64 * 1024;
  const int64_t pixels = p.out_height * p.out_width;
  const int64_t image = g.z_image() + g.dv_image() + pixels * s.out() + p.height * p.width * s.mid();
  const int64_t weights = s.core_elements() + s.c_in * s.mid() + s.c_out * s.out();
  const bool few_rows = g.threads > 1 && p.batch * p.out_height < 8 * g.threads;
  g.whole = image > 0 && image <= kWordsTogether && (few_rows || weights > kHeavyWeights);
  if (!g.whole) return;
  g.group = kWordsTogether / image;
  if (g.group > p.batch) g.group = p.batch;
  g.groups = (p.batch + g.group - 1) / g.group;
}

// Whether bands work on [rank][pixel]: by the lanes that the stages multiply a pixel, padding included, and what
// transposing and the rows' own products cost.
inline void choose_rows(const BottleneckConvParams& p, BackwardGeometry& g) {
  const BottleneckShape& s = p.shape;
  constexpr double kTranspose = 6.0;   // lanes a word, as in the forward pass
  constexpr double kProduct = 1600.0;  // lanes' worth of time that a product costs beside its tiles
  const auto number = [](int64_t n) { return static_cast<double>(n); };
  const double ring = number(s.ring), taps = number(s.taps()), width = number(p.out_width);
  const double a = number(s.rank_in), b = number(s.rank_out), c_in = number(s.c_in), c_out = number(s.c_out);
  const double mid = number(s.mid()), out = number(s.out());
  const int64_t across = g.merged ? s.kernel_w : 1;
  // V, the core's gradient, dZ; then what enters from pixels that lie together, or a factor's gradient from channels.
  double columns = ring * taps * (2 * a * lane_cost(s.rank_out) + b * lane_cost(s.rank_in));
  columns += g.x_rows ? c_in * lane_cost(s.mid()) + kTranspose * 2 * mid : c_in * (lane_cost(s.mid()) - mid);
  columns += g.y_rows ? c_out * lane_cost(s.out()) + kTranspose * out : c_out * (lane_cost(s.out()) - out);
  double rows =
      ring * taps * (2 * a * b * lane_cost(p.out_width) / width + b * lane_cost(across * s.rank_in) / number(across));
  rows += (g.x_rows ? c_in * mid : 0) + (g.y_rows ? c_out * out : 0) + kTranspose * (2 * mid + out);
  rows += 2 * ring * kProduct / width;
  g.core_rows = !g.whole && p.stride_w == 1 && !s.depthwise && rows < columns;
  if (!g.core_rows) return;
  // Not a multiple of half a kilobyte, lest lines fall on one set of the cache.
  const auto pitch = [](int64_t words) { return round_up(words, 16) + (round_up(words, 16) % 128 == 0 ? 16 : 0); };
  g.z_pitch = pitch(g.z_width);
  g.zr_row = s.mid() * g.z_pitch;
  g.dv_pitch = pitch(g.dv_width);
  g.dv_row = s.out() * g.dv_pitch;
}

template <class T>
inline BackwardGeometry backward_geometry(const BottleneckBackwardParams& q, int64_t threads) {
  const BottleneckConvParams& p = q.forward;
  const BottleneckShape& s = p.shape;
  BackwardGeometry g;
  g.threads = threads;
  g.narrow = T::kNarrow;
  const int64_t bytes = p.batch * (2 * p.height * p.width * s.c_in + p.out_height * p.out_width * s.c_out) *
                        static_cast<int64_t>(sizeof(typename T::Element));
  g.streams = bytes > threads * (int64_t{1} << 18);
  const auto rows_form = [](const Strides4& st, int64_t width) { return st.c != 1 && (st.w == 1 || width == 1); };
  g.x_rows = rows_form(p.x_strides, p.width);
  g.y_rows = rows_form(q.grad_y_strides, p.out_width);
  g.need_v = q.grad_factor_out;
  g.need_z = q.grad_core || g.need_v;
  g.need_dz = q.grad_x || q.grad_factor_in;
  g.need_dv = q.grad_core || g.need_dz;
  g.halo = p.dilation_h * (s.kernel_h - 1) + 1;
  g.z_width = (p.out_width - 1) * p.stride_w + p.dilation_w * (s.kernel_w - 1) + 1;
  const int64_t room = g.z_width - p.pad_left;
  g.z_used = room < 0 ? 0 : room < p.width ? room : p.width;
  g.z_row = round_up(g.z_width * s.mid(), 16);
  // Output pixels that touch an input pixel, from the first column's to the last column's; rows likewise.
  const int64_t first = floor_div(p.pad_left - p.dilation_w * (s.kernel_w - 1), p.stride_w);
  const int64_t last = floor_div(p.width - 1 + p.pad_left, p.stride_w);
  g.dv_left = first < 0 ? -first : 0;
  g.dv_width = g.dv_left + (last + 1 > p.out_width ? last + 1 : p.out_width);
  g.dv_row = round_up(g.dv_width * s.out(), 16);
  const int64_t first_row = floor_div(p.pad_top - p.dilation_h * (s.kernel_h - 1), p.stride_h);
  const int64_t last_row = floor_div(p.height - 1 + p.pad_top, p.stride_h);
  g.merged_z = p.dilation_w == 1 && s.ring == 1;
  g.merged = g.merged_z && p.stride_w == 1;

  g.band = p.out_height;
  g.in_band = p.height;
  g.z_rows = (p.out_height - 1) * p.stride_h + g.halo;
  g.dv_above = first_row < 0 ? -first_row : 0;
  g.dv_rows = g.dv_above + (last_row + 1 > p.out_height ? last_row + 1 : p.out_height);
  choose_whole(p, g);
  choose_rows(p, g);
  if (!g.whole) {
    g.group = g.groups = 1;
    g.dv_above = 0;
    // A band's data: larger ones were not faster, and take more scratch. A ring's rows are long, its sums small.
    const int64_t band_words = (s.ring > 1 ? 96 : 48) * 1024;
    const int64_t forms = g.core_rows ? 4 : 2;
    const int64_t row_words =
        p.width * p.stride_h * (s.c_in + forms * s.mid()) + p.out_width * (s.c_out + forms * s.out());
    g.band = band_words / (row_words > 0 ? row_words : 1);
    if (g.band < 1) g.band = 1;
    if (g.band > p.out_height) g.band = p.out_height;
    g.z_rows = (g.band - 1) * p.stride_h + g.halo;
    // Output rows that still touch input rows not finished, and the new ones.
    g.dv_rows = g.band + (g.need_dz ? g.reach(p.stride_h) : 0);
    // A step finishes the input rows above its last output row's window; an image's last step the rest of the image.
    g.in_band = g.band * p.stride_h + g.halo - 1;
    if (g.in_band > p.height) g.in_band = p.height;
  }
  // Whole images are read as planes: rows must follow each other.
  const bool plane_x = !g.whole || p.x_strides.h == p.width, plane_y = !g.whole || q.grad_y_strides.h == p.out_width;
  g.gather_x = (g.need_z || q.grad_factor_in) && (T::kNarrow || !(p.x_strides.c == 1 || (g.x_rows && plane_x)));
  g.gather_y = T::kNarrow || !(q.grad_y_strides.c == 1 || (g.y_rows && plane_y));
  constexpr int64_t kLinePixels = 32;
  const auto block = [&g](int64_t height, int64_t width) {
    const int64_t rows = (kLinePixels + width - 1) / (width > 0 ? width : 1);
    return g.whole || rows > height ? height : rows;
  };
  g.x_block = block(p.height, p.width);
  g.y_block = block(p.out_height, p.out_width);
  const int64_t in_pixels = p.width * g.x_block, out_pixels = p.out_width * g.y_block;
  g.flat_pitch = round_up(in_pixels > out_pixels ? in_pixels : out_pixels, 16) + 32;

  int64_t at = 0;
  const auto take = [&at](int64_t n) {
    const int64_t start = at;
    at += round_up(n, 16);
    return start;
  };
  // A line of V or dZ a rank; vectors are stored whole.
  g.v_pitch = round_up(g.band * p.out_width, 16) + 32;
  g.dz_pitch = round_up(g.in_band * p.width, 16) + 32;
  const int64_t kernel = s.kernel_h * s.kernel_w, rank = s.mid() > s.out() ? s.mid() : s.out();
  const int64_t z = g.need_z ? g.group * g.z_image() + 64 : 0, dv = g.need_dv ? g.group * g.dv_image() + 64 : 0;
  const int64_t v = g.need_v ? g.group * (g.core_rows ? g.v_pitch : g.band * p.out_width) * s.out() + 64 : 0;
  int64_t dz = g.need_dz ? g.group * (g.core_rows ? g.dz_pitch : g.in_band * p.width) * s.mid() + 64 : 0;
  // dV and V on their way between the two forms lie where dZ will, dZ itself beside it.
  const int64_t on_the_way = g.core_rows && (g.need_dv || g.need_v) ? g.dv_rows * p.out_width * s.out() + 64 : 0;
  if (dz < on_the_way) dz = on_the_way;
  const int64_t x_rows = g.whole ? p.height : g.z_rows > g.in_band ? g.z_rows : g.in_band;
  const int64_t y_rows = g.whole ? p.out_height : g.dv_rows;
  const int64_t x_copy = g.gather_x ? g.group * x_rows * p.width * s.c_in + 64 : 0;
  const int64_t y_copy = g.gather_y ? g.group * y_rows * p.out_width * s.c_out + 64 : 0;
  const auto take_activations = [&] {
    g.z = take(z);
    g.v = take(v);
    g.dv = take(dv);
    g.dz = take(dz);
    g.x_copy = take(x_copy);
    g.y_copy = take(y_copy);
  };
  // Sums that are not written straight to the results: all but the core's lie in torch's order.
  const auto take_sums = [&](bool all) {
    g.sum_core = take(q.grad_core ? s.core_elements() : 0);
    g.sum_out = take(all && q.grad_factor_out ? s.c_out * s.out() : 0);
    g.sum_in = take(all && q.grad_factor_in ? s.c_in * s.mid() : 0);
    g.sum_bias = take(all && q.grad_bias ? s.c_out : 0);
  };
  g.wide_in = take(T::kNarrow ? s.c_in * s.mid() : 0);
  g.wide_core = take(T::kNarrow ? s.core_elements() : 0);
  g.wide_out = take(T::kNarrow ? s.c_out * s.out() : 0);
  if (s.depthwise) {
    g.core = g.core_back = take(kernel * whole_vectors(s.rank_in));
  } else {
    g.core = take(g.need_v ? kernel * s.rank_in * padded_columns(s.rank_out) : 0);
    g.core_back = take(g.need_dz ? kernel * s.rank_out * padded_columns(s.rank_in) : 0);
  }
  g.x_columns = take(q.grad_x && q.grad_x_strides.c == 1 ? s.mid() * padded_columns(s.c_in) : 0);
  if (g.whole) {
    take_activations();
    take_sums(T::kNarrow);
  }
  g.shared_words = at;

  at = 0;
  // Four tables of 64-bit offsets for taps (two in columns form) and two for rows.
  g.row_slots = g.group * (g.band + g.in_band) * s.ring;
  g.taps = take(8 * kernel + 4 * g.row_slots + 16);
  const bool flat = g.x_rows || g.y_rows || (q.grad_x && q.grad_x_strides.c != 1);
  g.flat = take(flat ? rank * g.flat_pitch + 64 : 0);
  if (!g.whole) {
    take_activations();
    g.zr = take(g.core_rows && g.need_z ? g.z_rows * g.zr_row + 64 : 0);
    g.columns = take(g.core_rows && g.x_rows && q.grad_factor_in ? g.in_band * p.width * s.mid() + 64 : 0);
    take_sums(true);
  }
  g.part_words = at;
  return g;
}

// Packs this part's share of the forms that backward's products read.
inline void pack_backward(const BottleneckShape& s, const BackwardGeometry& g, const float* core, const float* in,
                          bool leaves_in_columns, int64_t part, float* to) {
  using F = Float32;
  const int64_t taps = s.kernel_h * s.kernel_w, a = s.rank_in, b = s.rank_out, n = g.threads;
  if (leaves_in_columns) pack_columns<F>(in, 1, 0, s.mid(), 1, s.c_in, s.mid(), to + g.x_columns, part, n);
  if (s.depthwise) {
    if (part == 0) pack_depthwise_columns<F>(core, a, taps, to + g.core);
    return;
  }
  if (g.need_v && !g.core_rows) pack_columns<F>(core, taps, 1, a, taps, b, a * taps, to + g.core, part, n);
  // All taps in reverse, as the transposed convolution meets them along a row of dV.
  if (g.need_dz && !g.core_rows)
    pack_columns<F>(core + taps - 1, taps, -1, b, a * taps, a, taps, to + g.core_back, part, n);
}
